"""`saferlhf-fast info --cluster`: does what a run will stand on work, between all ranks?

Run it under the run's own launcher.

    torchrun --nnodes 2 --nproc-per-node 8 … -m saferlhf_fast info --cluster --folder /shared/runs

In this order, and the first that fails ends it with exit code 1 and "rank 3 (host): reason": every rank shows
up within a limit; versions, GPUs and drivers are equal; collectives work, and how fast; the clocks agree; a
shared folder is seen and written by all, and a rename in it is atomic; the disk has room. Exit code 0: all of
it.
"""

import argparse
import ctypes
import errno
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import time
import uuid
from collections import Counter
from datetime import timedelta
from importlib import metadata
from pathlib import Path

from saferlhf_fast.config import inputs
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import provenance
from saferlhf_fast.version import __version__

EQUAL = (
    "python",
    "saferlhf-fast",
    "commit",
    "torch",
    "cuda",
    "nccl",
    "driver",
    "transformers",
    "deepspeed",
    "triton",
    "gpus",
)
"""What must be the same on all ranks."""
MIB = 1 << 20
SKEW = 1.0  # seconds between clocks that are worth a warning
LITTLE = 10 << 30  # bytes of free disk that are worth a warning
WAIT = 15.0  # seconds that a shared folder gets to show what another machine has written


def main(words):
    """Runs the check in this rank -> exit code."""
    args = arguments(words)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = report(args.folder)
    store, reports, reasons = meet(mine, rank, world, args.limit) if world > 1 else (None, [mine], [])
    reasons = reasons or compare(reports)
    if reasons:
        return _refused(reasons, rank)
    ranks = Ranks(store, reports, rank, world, args.limit)
    if rank == 0:
        print("\n".join(table(reports)), flush=True)
    if ranks.failed(ranks.add_up()):
        return 1
    for line in [*ranks.bandwidth(), ranks.clocks()]:
        ranks.say(line)
    if args.folder and ranks.failed(folder(args.folder, ranks)):
        return 1
    if args.folder:
        ranks.say(f"folder {args.folder}: seen and written by all ranks, renames are atomic")
    ranks.say("\n".join(warnings(reports)) or "nothing to warn of")
    return 0


def arguments(words):
    """--folder DIR, --limit SECONDS; UserError for anything else."""
    parser = argparse.ArgumentParser(prog="saferlhf-fast info", add_help=False, allow_abbrev=False)
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("--folder")
    parser.add_argument("--limit", default="60")
    args, rest = parser.parse_known_args(words)
    if rest:
        raise UserError(f"info --cluster takes --folder DIR and --limit SECONDS, got {' '.join(rest)}")
    if not args.limit.isdigit() or not int(args.limit):
        raise UserError(f"--limit: expected whole seconds from 1 on, got {args.limit}")
    args.limit = int(args.limit)
    if args.folder == "":
        raise UserError("--folder: expected a folder, got an empty text")
    args.folder = inputs.check_home(args.folder, "--folder")
    return args


# ---------------------------------------------------------------- reports


def report(where=None):
    """What this rank stands on: versions, GPUs, host, free disk of `where` (bytes) -> dict that JSON can
    hold.
    """
    import torch

    found = {
        "host": socket.gethostname(),
        "address": _address(),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "python": platform.python_version(),
        "saferlhf-fast": __version__,
        "commit": provenance.git_commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "nccl": None,
        "gpus": [],
    }
    for name in ("transformers", "deepspeed", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["free"] = shutil.disk_usage(where if where and Path(where).is_dir() else ".").free
    return found


def _address():
    """The address by which this host reaches rank 0's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
            return probe.getsockname()[0]
        except OSError:
            return "unknown"


def _driver():
    """Version of NVIDIA's driver, None without one."""
    try:
        library, text = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() != 0:
            return None
        found = library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
        library.nvmlShutdown()
        return text.value.decode() if found == 0 else None
    except (OSError, AttributeError):
        return None


def compare(reports):
    """Reports in rank order -> what is not as it must be, "rank 3 (host): reason", by rank."""
    reasons = []
    for name in EQUAL:
        values = [json.dumps(one.get(name)) for one in reports]
        usual = Counter(values).most_common(1)[0][0]  # the first of equals: rank 0's
        reasons += [
            (r, f"{name} is {_show(value)}, most ranks have {_show(usual)}")
            for r, value in enumerate(values)
            if value != usual
        ]
    for r, one in enumerate(reports):
        if one["gpus"] and one["local_rank"] >= len(one["gpus"]):
            reasons.append(
                (r, f"is number {one['local_rank']} of its machine, which shows it {len(one['gpus'])} GPUs")
            )
    return [f"rank {r} ({reports[r]['host']}): {reason}" for r, reason in sorted(reasons)]


def _show(value):
    value = json.loads(value)
    if isinstance(value, list):
        return ", ".join(f"{n} × {name}" for name, n in Counter(value).items()) or "none"
    return "not there" if value is None else value


def warnings(reports):
    """Lines about what is not wrong but will be noticed."""
    return [
        f"warning: rank {r} ({one['host']}): {one['free'] / 1e9:.1f} GB of disk are free"
        for r, one in enumerate(reports)
        if one["free"] < LITTLE and one["local_rank"] == 0
    ]


def table(reports):
    """Lines for people: versions, and one line for each rank."""
    one = reports[0]
    hosts = dict.fromkeys(report["host"] for report in reports)
    versions = [f"{name} {one[name]}" for name in EQUAL if name not in ("gpus", "commit") and one[name]]
    lines = [
        f"{len(reports)} rank{'s' * (len(reports) > 1)} on {len(hosts)} machine{'s' * (len(hosts) > 1)}, all "
        f"with " + ", ".join(versions)
    ]
    for r, report in enumerate(reports):
        device = report["gpus"][report["local_rank"]] if report["gpus"] else "cpu"
        lines.append(
            f"  rank {r:>3}  {report['host']}  {report['address']}  {device}  {report['free'] / 1e9:.1f} GB "
            f"free"
        )
    return lines


# ---------------------------------------------------------------- between ranks


def meet(mine, rank, world, limit):
    """Waits for all ranks -> (store, reports in rank order, reasons why not)."""
    from torch.distributed import DistError, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not hosts:
            _knock(address, port, limit)
        store = TCPStore(
            address, port, is_master=hosts, wait_for_workers=False, timeout=timedelta(seconds=limit)
        )
        store.set(f"report/{rank}", json.dumps(mine))
        if rank == 0:
            until, there = time.monotonic() + limit, set()
            while len(there) < world and time.monotonic() < until:
                there |= {r for r in range(world) if r not in there and store.check([f"report/{r}"])}
                time.sleep(0.05)
            missing = [
                f"rank {r}: did not show up at {address}:{port} within {limit} s"
                for r in range(world)
                if r not in there
            ]
            store.set("missing", json.dumps(missing))
        store.wait(["missing"], timedelta(seconds=limit + 10))
        missing = json.loads(store.get("missing"))
        reports = (
            [] if missing else [json.loads(x) for x in store.multi_get([f"report/{r}" for r in range(world)])]
        )
    except (DistError, OSError) as error:
        where = "cannot be the meeting point" if hosts else "rank 0 does not answer"
        return (
            None,
            [],
            [
                f"rank {rank} ({mine['host']}): {where} at {address}:{port} within {limit} s: "
                f"{str(error).splitlines()[0]}"
            ],
        )
    if rank == 0 and missing:
        # the others read the verdict in the store of this process
        time.sleep(1.0)
    return store, reports, missing


def _knock(address, port, limit):
    """Waits until somebody listens; OSError when nobody does in time. torch would print its C++ stack."""
    until = time.monotonic() + limit
    while True:
        try:
            socket.create_connection((address, port), timeout=limit).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


class Ranks:
    """All ranks, met: collectives between them."""

    def __init__(self, store, reports, rank, world, limit):
        import torch
        from torch import distributed

        from saferlhf_fast.runtime import watchdog

        self.torch, self.dist, self.reports, self.rank, self.world = torch, distributed, reports, rank, world
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", reports[rank]["local_rank"]) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        if world > 1:
            distributed.init_process_group(
                "nccl" if self.cuda else "gloo",
                store=distributed.PrefixStore("cluster", store),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=limit + 30),
            )
            watchdog.begin(limit)

    def gather(self, value):
        """One value of each rank, which JSON can hold, on all ranks; also a barrier."""
        if self.world == 1:
            return [value]
        out = [None] * self.world
        self.dist.all_gather_object(out, value)
        return out

    def failed(self, reason):
        """Whether a rank has a reason to end here; rank 0 prints them. reason: this rank's, None without one."""
        reasons = [
            f"rank {r} ({self.reports[r]['host']}): {why}" for r, why in enumerate(self.gather(reason)) if why
        ]
        return bool(reasons) and bool(_refused(reasons, self.rank))

    def say(self, line):
        if self.rank == 0 and line:
            print(line, flush=True)

    def add_up(self):
        """Reason why a sum over ranks is wrong, or None."""
        total = self.torch.full((1000,), float(self.rank + 1), device=self.device)
        if self.world > 1:
            self.dist.all_reduce(total)
        expected = self.world * (self.world + 1) / 2
        return (
            None
            if bool((total == expected).all())
            else f"an all-reduce gave {total[0].item()}, expected {expected}"
        )

    def bandwidth(self):
        """Lines about all-reduce: latency at 4 bytes, then GB/s; bus: 2·(n − 1)/n times the size over the
        time, what a link carries in a ring.
        """
        if self.world == 1:
            return []
        lines = [
            f"all-reduce, {'nccl' if self.cuda else 'gloo'}: latency {self._seconds(1, 50) * 1e6:.0f} µs"
        ]
        for size in [MIB, 64 * MIB, 512 * MIB] if self.cuda else [MIB, 16 * MIB]:
            seconds = self._seconds(size // 4, 5)
            bus = size / seconds * 2 * (self.world - 1) / self.world
            lines.append(
                f"  {size // MIB:>4} MiB  {seconds * 1e3:8.2f} ms  {size / seconds / 1e9:7.2f} GB/s  "
                f"bus {bus / 1e9:7.2f} GB/s"
            )
        return lines

    def _seconds(self, count, times):
        """Median time of an all-reduce of `count` fp32 numbers, of the slowest rank."""
        data, taken = self.torch.zeros(count, device=self.device), []
        for _ in range(times + 1):
            self.dist.barrier()
            self._wait()
            begun = time.perf_counter()
            self.dist.all_reduce(data)
            self._wait()
            taken.append(time.perf_counter() - begun)
        return max(self.gather(statistics.median(taken[1:])))

    def _wait(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def clocks(self):
        """A line about how far the machines' clocks are apart: when all leave a barrier."""
        rounds = []
        for _ in range(5 if self.world > 1 else 1):
            if self.world > 1:
                self.dist.barrier()
                self._wait()
            rounds.append(self.gather(time.time()))
        apart = [statistics.median(times[r] - times[0] for times in rounds) for r in range(self.world)]
        most = max(range(self.world), key=lambda r: abs(apart[r]))
        line = f"clocks: {abs(apart[most]) * 1e3:.1f} ms apart at most (a barrier's jitter is in it)"
        return (
            line
            if abs(apart[most]) <= SKEW
            else f"warning: {line}: rank {most} ({self.reports[most]['host']})"
        )


def _refused(reasons, rank):
    if rank == 0 or len(reasons) == 1 and reasons[0].startswith(f"rank {rank} ("):
        print("\n".join(reasons), file=sys.stderr, flush=True)
    return 1


# ---------------------------------------------------------------- a shared folder


def folder(path, ranks):
    """Reason why this rank cannot share a folder with the others, None when it can.

    Every rank calls it; what it writes, it removes.
    """
    root = Path(path) / ranks.gather(f".saferlhf-fast-{uuid.uuid4().hex}")[0]
    reason = _attempt(_make, root, ranks.rank)
    try:
        for step in (_write_nonce, _read_nonce, _read_all, _rename):
            whose = ranks.gather(reason)
            if any(whose):
                return reason
            reason = _attempt(step, root, ranks.rank, ranks.world)
        ranks.gather(None)  # nobody reads any more
        return reason
    finally:
        if ranks.rank == 0:
            shutil.rmtree(root, ignore_errors=True)


def _attempt(call, *arguments):
    """What call says, or what hindered it, in a line."""
    try:
        return call(*arguments)
    except OSError as error:
        return f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")


def _make(root, rank):
    parent = root.parent
    if not parent.is_dir():
        return f"{parent} {'is a file' if parent.exists() else 'does not exist'}; expected the folder that runs write to"
    try:
        return root.mkdir() if rank == 0 else None
    except OSError as error:  # it names a folder that nobody knows
        return f"{parent} cannot be written into: {error.strerror}"


def _write_nonce(root, rank, world):
    if rank == 0:
        (root / "nonce").write_text(root.name)
        _put(root, 0)
    return None


def _read_nonce(root, rank, world):
    """All see what rank 0 has written, and write a file of their own."""
    if _until(lambda: (root / "nonce").read_text(), root.name) != root.name:
        return f"{root.parent}: what rank 0 has written there is not seen within {WAIT:.0f} s; is it the same folder?"
    (root / f"rank{rank}").write_text(str(rank))
    return None


def _read_all(root, rank, world):
    """Rank 0 sees what all have written."""
    unseen = [
        r
        for r in range(world if rank == 0 else 0)
        if _until(lambda r=r: (root / f"rank{r}").read_text(), str(r)) != str(r)
    ]
    return (
        f"{root.parent}: what ranks {', '.join(map(str, unseen))} have written there is not seen"
        if unseen
        else None
    )


def _rename(root, rank, world, times=50):
    """Rank 0 replaces a file by a rename, again and again; the others must never see half of one, or none."""
    if rank == 0:
        for number in range(1, times + 1):
            _put(root, number)
            time.sleep(0.01)
        return None
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        try:
            text = (root / "value").read_text()
        except OSError as error:
            if error.errno == errno.ESTALE:  # NFS: the file that was open is the replaced one
                continue
            return f"{root.parent}: a file that is replaced by a rename was not there for a moment: {error.strerror}"
        if len(text) != 64 * 1024 or len(set(text.split())) != 1:
            return f"{root.parent}: a rename is not atomic: half a file was read"
        if text.split()[0] == f"{times:07d}":
            return None
        time.sleep(0.005)
    return f"{root.parent}: a renamed file is not seen within {WAIT:.0f} s"


def _put(root, number):
    temporary = root / "value.tmp"
    temporary.write_text(f"{number:07d} " * (8 * 1024))
    os.replace(temporary, root / "value")


def _until(read, expected):
    """Reads again until what is expected is there or the time is up: attributes may be cached -> what was
    read.
    """
    until, found = time.monotonic() + WAIT, None
    while found != expected and time.monotonic() < until:
        try:
            found = read()
        except FileNotFoundError:
            pass
        if found != expected:
            time.sleep(0.1)
    return found
