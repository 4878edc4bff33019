"""Ranks watch over one another: when one fails, hangs or is killed, all end within seconds and say which one
and why.

Without this, the others would wait in a collective until it times out and then blame the network. Every rank
has a thread that looks at the store through which the ranks have found each other, every few seconds: it says
that it is alive and where its main thread stands, and reads whether a rank has failed. Processes of the same
machine are also looked up by their number, and rank 0 looks at everybody's state:

    failed   its main thread raised: `failed` says so before the process ends
    gone     its process is not there any more, or has been silent for LOST seconds
    hangs    a main thread has not come on for the time limit (engine.timeout): to blame are the ranks that do
    not wait in a
             collective, those behind the others where there are several

Nothing runs in a run of one process. `begin` and `end` are called by engine.start and engine.finish.
"""

import atexit
import contextlib
import json
import linecache
import os
import re
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

INTERVAL = 3.0  # seconds between two looks at the store
# a rank of another machine that is silent for so long is gone; a long call may hold its threads up
LOST = 120.0
SUSPECT = 20.0  # the same, when a collective has already failed
# seconds that a main thread gets to raise the same error itself before its process is ended
GRACE_SECONDS = 2.0
PACKAGE = Path(__file__).resolve().parents[1]

_watch = None
_begun = 0


class Fault(NamedTuple):
    """Why a run ends: a line that names the rank, the exit code, the ranks that will not answer any more."""

    rank: int
    line: str
    code: int = 1
    gone: tuple = ()
    quiet: bool = False


def begin(timeout, interval=INTERVAL):
    """Starts to watch; every rank calls it once the ranks have joined.

    Nothing happens in a run of one process.

    timeout: seconds after which a rank that has not come on hangs · interval: seconds between two looks.
    """
    global _watch, _begun
    if _watch is not None:
        _watch.timeout = timeout
    elif dist.is_initialized() and dist.get_world_size() > 1:
        _begun += 1
        if _begun == 1:
            atexit.register(_at_exit)
        _watch = Watch(timeout, interval, f"watch/{_begun}")


def failed(error, code=1):
    """Tells the others that this rank's main thread ends with an error, and waits until they know.

    -> None in a run of one process; else (line, code): what to print instead of the error ("" for nothing,
    when rank 0 says the same; None for the error itself) and the exit code. The caller ends the process with
    os._exit: what a failed collective leaves behind can hold a regular exit up.
    """
    global _watch
    if _watch is None:
        return None
    watch, _watch = _watch, None
    try:
        return watch.failed(error, code)
    except Exception:  # the store is gone too: the error speaks for itself
        return None, code


def end(limit=None):
    """Ends the watch when this rank is done; rank 0, which may host the store, waits for the others.

    limit: seconds that it waits at most; the time limit of the watch when not given.
    """
    global _watch
    if _watch is not None:
        watch, _watch = _watch, None
        watch.end(limit)


def _at_exit():
    error = getattr(sys, "last_value", None)
    failed(error) if error is not None else end(SUSPECT)


class Watch:
    """The watch of one rank: a thread, its client of the store, and what it has seen."""

    def __init__(self, timeout, interval, prefix):
        self.timeout, self.interval, self.prefix = timeout, interval, prefix
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.host, self.main = socket.gethostname(), threading.get_ident()
        self.count, self.state = 0, "runs"
        self.at, self.stood, self.signature, self.waits = "", 0.0, None, False
        # rank -> (last count, seconds since it changed)
        self.silent = dict.fromkeys(range(self.world), (None, 0.0))
        self.fault, self.known = None, threading.Event()
        self.main_speaks, self.stopping = threading.Event(), threading.Event()
        self.doubts, self.troubles = False, 0
        self.store = self._client()
        self.store.set(f"who/{self.rank}", json.dumps(_identity(self.host)))
        self._beat(0.0)
        if self.rank == 0:
            self.store.set("fault", "-")
        self.who = [json.loads(x) for x in self.store.multi_get([f"who/{r}" for r in range(self.world)])]
        self.near = [
            r
            for r, who in enumerate(self.who)
            if who["space"] == self.who[self.rank]["space"] and r != self.rank
        ]
        self.store.wait(
            ["fault", *([f"beat/{r}" for r in range(self.world)] if self.rank == 0 else ["beat/0"])]
        )
        self.thread = threading.Thread(target=self._run, name="saferlhf-watch", daemon=True)
        self.thread.start()

    def _client(self):
        """A client of the ranks' store of its own: the main thread's may block for as long as a rank does not
        come.
        """
        client = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=SUSPECT),
        )
        return dist.PrefixStore(self.prefix, client)

    # ------------------------------------------------------------ the thread

    def _run(self):
        last = time.monotonic()
        while not self.stopping.wait(self.interval):
            now = time.monotonic()
            # a process that was stopped has not waited
            passed, last = min(now - last, 2 * self.interval), now
            try:
                fault = self._look(passed)
                self.troubles = 0
            except RuntimeError:
                fault = self._reconnect()
            if fault is not None and not self.stopping.is_set():
                self._end(fault)
                return

    def _look(self, passed):
        """One look at the store -> Fault or None. passed: seconds since the last one."""
        # first: who fails says so before it ends
        dead = [r for r in self.near if not _alive(self.who[r])]
        self._beat(passed)
        everyone = self.rank == 0 or self.doubts
        asked = list(range(self.world)) if everyone else sorted({0, *dead})
        fault, *beats = self.store.multi_get(["fault", *(f"beat/{r}" for r in asked)])
        if fault != b"-":
            return Fault(*json.loads(fault))
        beats = dict(zip(asked, map(json.loads, beats)))
        gone = [r for r in dead if beats[r]["state"] != "ended"]
        if gone:
            return self.post(
                Fault(
                    gone[0],
                    f"{self.names(gone)} {_are(gone)} gone without a word: killed, or out of memory",
                    1,
                    tuple(gone),
                )
            )
        return self._silence(beats, passed) or (self._hang(beats) if self.rank == 0 else None)

    def _silence(self, beats, passed):
        """Ranks of other machines that have said nothing for long; those of this one while they are alive may
        hang.
        """
        for r, beat in beats.items():
            count, seconds = self.silent[r]
            self.silent[r] = (beat["count"], 0.0 if beat["count"] != count else seconds + passed)
        far = SUSPECT if self.doubts else max(SUSPECT, min(LOST, self.timeout))
        return self._mute(
            [
                r
                for r in beats
                if r != self.rank
                and beats[r]["state"] != "ended"
                and self.silent[r][1] > (max(self.timeout, far) if r in self.near else far)
            ]
        )

    def _mute(self, ranks):
        """The Fault that ranks are silent, None without any."""
        return (
            self.post(
                Fault(
                    ranks[0],
                    f"{self.names(ranks)} {_are(ranks)} gone: no sign of life for "
                    f"{self.silent[ranks[0]][1]:.0f} s",
                    1,
                    tuple(ranks),
                )
            )
            if ranks
            else None
        )

    def _hang(self, beats):
        """Whose main thread holds the others up, once somebody's has not come on for the time limit."""
        running = {r: beat for r, beat in beats.items() if beat["state"] != "ended"}
        longest = max((beat["stood"] for beat in running.values()), default=0.0)
        if longest < self.timeout:
            return None
        mute = [r for r in running if self.silent[r][1] > 4 * self.interval]
        if mute:  # where they stood last is not where they stand
            return self._mute(mute)
        behind = [r for r, beat in running.items() if not beat["waits"]]
        if not behind:
            places = _few(f"rank {r} at {beat['at']}" for r, beat in running.items())
            return self.post(Fault(0, f"all ranks have waited for each other for {longest:.0f} s: {places}"))
        least = min(running[r]["collectives"] for r in behind)
        behind = [r for r in behind if running[r]["collectives"] == least]
        places = _few(f"{self.names([r])} hangs at {running[r]['at']}" for r in behind)
        return self.post(
            Fault(behind[0], f"{places}; a rank has not come on for {longest:.0f} s (engine.timeout)")
        )

    def _beat(self, passed):
        """Says that this rank is alive and where its main thread stands."""
        self._sample(passed)
        self.count += 1
        self.store.set(
            f"beat/{self.rank}",
            json.dumps(
                {
                    "count": self.count,
                    "state": self.state,
                    "stood": round(self.stood, 1),
                    "waits": self.waits,
                    "at": self.at,
                    "collectives": self.signature[0],
                }
            ),
        )

    def _sample(self, passed):
        """Looks where the main thread stands: the same collective, frames and instructions as before is no
        progress.
        """
        frames = sys._current_frames()
        stack, frame = [], frames.get(self.main)
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
        while stack and stack[0].f_code.co_filename == __file__:
            stack.pop(0)
        signature = (_collectives(), [(id(frame), frame.f_lasti) for frame in stack])
        self.stood = self.stood + passed if signature == self.signature else 0.0
        self.signature, self.at = signature, _place(stack)
        self.waits = bool(stack) and (
            _waits(stack[0])
            or (
                "torch/autograd" in stack[0].f_code.co_filename  # hooks run in a thread of autograd's
                and any(
                    _waits(f)
                    for thread, f in frames.items()
                    if thread not in (self.main, threading.get_ident())
                )
            )
        )

    def _reconnect(self):
        """After an error of the store: None when it answers again, else the Fault that it is gone."""
        if (
            0 in self.near
            and not _alive(self.who[0])
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        ):
            return Fault(
                0, f"{self.names([0])} is gone, and the store with it: killed, or out of memory", gone=(0,)
            )
        try:
            with socket.create_connection(
                (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=SUSPECT
            ):
                pass  # torch would print its C++ stack
            self.store = self._client()
            self.store.check(["fault"])
            self.troubles += 1
            if self.troubles < 3:
                return None
            raise RuntimeError("answers, and then not")
        except (OSError, RuntimeError):
            place = f"the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not answer"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return Fault(
                -1, f"the launcher of the first machine is gone: {place}", gone=tuple(range(self.world))
            )
        return Fault(0, f"{self.names([0])} is gone: {place}", gone=tuple(range(self.world)))

    def _end(self, fault):
        """Ends this process, unless its main thread is about to end by itself."""
        self.fault = fault
        self.known.set()
        if self.main_speaks.wait(GRACE_SECONDS):
            return
        self._acknowledge()
        if not fault.quiet:
            _say(f"[rank {self.rank}] ended: {fault.line}")
        leave(fault.code)

    def _acknowledge(self):
        """This rank needs the store no more."""
        with contextlib.suppress(RuntimeError):
            self.store.add("seen", 1)

    # ------------------------------------------------------------ what the main thread calls

    def post(self, fault):
        """Writes a fault down for all ranks -> the one that stands: the first."""
        return Fault(*json.loads(self.store.compare_set("fault", "-", json.dumps(fault))))

    def failed(self, error, code):
        """See the function `failed`."""
        self.main_speaks.set()
        quiet = isinstance(error, KeyboardInterrupt)
        if _follows(error) and not quiet:
            self.doubts = True
            if self.known.wait(SUSPECT + 4 * self.interval):
                self.report_failure(self.fault)
                return (
                    "" if self.fault.quiet else f"[rank {self.rank}] ended: {self.fault.line}"
                ), self.fault.code
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        self.store.set(f"error/{self.rank}", text)
        fault = self.post(Fault(self.rank, f"{self.names([self.rank])}: {text}", code, (), quiet))
        said = "" if self.rank != 0 and (quiet or self._rank_0_says(text)) else None
        self.report_failure(fault)
        return said, code

    def _rank_0_says(self, text):
        """Whether rank 0 ends with the same error: then one line is enough."""
        until = time.monotonic() + GRACE_SECONDS + 1
        while time.monotonic() < until:
            if self.store.check(["error/0"]):
                return self.store.get("error/0").decode() == text
            time.sleep(0.05)
        return False

    def report_failure(self, fault):
        """Waits until all others know: this process may host the store, or its end make the launcher end the
        others.
        """
        self._acknowledge()
        with contextlib.suppress(RuntimeError):
            until = time.monotonic() + 3 * self.interval + GRACE_SECONDS
            while self.store.add("seen", 0) < self.world - len(fault.gone) and time.monotonic() < until:
                time.sleep(0.05)
        self.stopping.set()

    def end(self, limit):
        """See the function `end`."""
        self.state = "ended"
        self.main_speaks.set()
        with contextlib.suppress(RuntimeError):
            self._beat(0.0)
            self.store.add("ended", 1)
            until = time.monotonic() + (limit or self.timeout)
            while self.rank == 0 and self.store.add("ended", 0) < self.world and time.monotonic() < until:
                if self.known.wait(0.05):
                    if not self.fault.quiet:
                        _say(f"[rank 0] ended: {self.fault.line}")
                    self._acknowledge()
                    break
        self.stopping.set()
        self.thread.join(SUSPECT)

    def names(self, ranks):
        """ "rank 1 (node7, process 4242)" or "ranks 8, 9 (node8)"."""
        hosts = ", ".join(dict.fromkeys(self.who[r]["host"] for r in ranks))
        if len(ranks) == 1:
            return f"rank {ranks[0]} ({hosts}, process {self.who[ranks[0]]['pid']})"
        return f"ranks {_few(map(str, ranks), 16)} ({hosts})"


def leave(code):
    """Ends the process at once, with what it has written; what a broken collective left behind is not waited
    for.
    """
    flushing = threading.Thread(
        target=lambda: [stream.flush() for stream in (sys.stdout, sys.stderr)], daemon=True
    )
    flushing.start()
    flushing.join(1.0)
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(code)


def _say(line):
    os.write(2, (line + "\n").encode(errors="replace"))


def _are(ranks):
    return "is" if len(ranks) == 1 else "are"


def _few(texts, most=4):
    texts = list(texts)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


# ---------------------------------------------------------------- processes and frames


def _identity(host):
    """Who this process is: its number, when it began, and in which machine (or container) the number counts."""
    try:
        space = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        space = f"unknown {os.urandom(8).hex()}"  # nobody's neighbour
    return {"host": host, "pid": os.getpid(), "born": _born(os.getpid()), "space": space}


def _born(pid):
    """Start time of a process in clock ticks; None when it is not there, or dead and not yet waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _alive(who):
    return _born(who["pid"]) == who["born"]


def _collectives():
    """Collectives that this rank has called, in all groups: a rank that is behind has called fewer."""
    try:
        return sum(
            group._get_sequence_number_for_group() for group in list(dist.distributed_c10d._world.pg_map)
        )
    except (AttributeError, RuntimeError):
        return 0


def _waits(frame):
    """Whether a frame stands in a collective, waiting for other ranks."""
    name = frame.f_code.co_filename
    if "/torch/distributed/" in name or "/deepspeed/comm/" in name:
        return True
    return (
        "/deepspeed/" in name
        and re.search(r"\b(wait|synchronize)\(", linecache.getline(name, frame.f_lineno)) is not None
    )


def _place(stack):
    """ "saferlhf_fast/rollout/batch.py:31 generate, in torch/x.py:7 f": the innermost line of ours and the
    innermost of all.
    """
    if not stack:
        return "its end"
    ours = next((frame for frame in stack if frame.f_code.co_filename.startswith(str(PACKAGE))), stack[0])

    def shown(path):
        return path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else "/".join(path.parts[-2:])

    places = [
        f"{shown(Path(f.f_code.co_filename))}:{f.f_lineno} {f.f_code.co_name}" for f in (ours, stack[0])
    ]
    return ", in ".join(dict.fromkeys(places))


def _follows(error):
    """Whether an error only says that another rank went away or did not come."""
    if isinstance(error, dist.DistError):
        return True
    trace, name = error.__traceback__, ""
    while trace is not None:
        name, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    if "/torch/distributed/" in name or "/deepspeed/comm/" in name:
        return True
    return (
        isinstance(error, RuntimeError)
        and re.search(r"gloo|NCCL|closed by peer|Timed out waiting", str(error)) is not None
    )
