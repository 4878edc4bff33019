"""What runs between ranks: waiting for all of them, collectives and their speed, clocks."""

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from saferlhf_fast.commands.preflight.reports import Report

if TYPE_CHECKING:
    from torch.distributed import Store

MIB = 1 << 20
SKEW = 1.0  # seconds between clocks above which there is a warning


def meet(own: Report, rank: int, world: int, limit: int) -> "tuple[Store | None, list[Report], list[str]]":
    """Waits for all ranks, and exchanges their reports.

    Args:
        own: This rank's report.
        rank: The number of this process.
        world: How many processes there are.
        limit: How long to wait for a rank (seconds).

    Returns:
        The store through which ranks meet, all reports in rank order, and the reasons why not all ranks met;
        with a reason there are no reports, and perhaps no store.
    """
    from torch.distributed import DistError, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not hosts:
            _wait_for_listener(address, port, limit)
        store = TCPStore(
            address, port, is_master=hosts, wait_for_workers=False, timeout=timedelta(seconds=limit)
        )
        store.set(f"report/{rank}", json.dumps(own))
        if rank == 0:
            until = time.monotonic() + limit
            present: set[int] = set()
            while len(present) < world and time.monotonic() < until:
                present |= {r for r in range(world) if r not in present and store.check([f"report/{r}"])}
                time.sleep(0.05)
            missing = [
                f"rank {r}: did not show up at {address}:{port} within {limit} s"
                for r in range(world)
                if r not in present
            ]
            store.set("missing", json.dumps(missing))
        store.wait(["missing"], timedelta(seconds=limit + 10))
        missing = json.loads(store.get("missing"))
        reports = (
            [] if missing else [json.loads(x) for x in store.multi_get([f"report/{r}" for r in range(world)])]
        )
    except (DistError, OSError) as error:
        where = "cannot be the meeting point" if hosts else "rank 0 does not answer"
        first_line = str(error).splitlines()[0]
        reason = f"rank {rank} ({own['host']}): {where} at {address}:{port} within {limit} s: {first_line}"
        return None, [], [reason]
    if rank == 0 and missing:
        # the others read what is missing from the store of this process
        time.sleep(1.0)
    return store, reports, missing


def _wait_for_listener(address: str, port: int, limit: int) -> None:
    """Waits until a process listens at an address; OSError when none does in time.

    torch would print its C++ stack.
    """
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
    """All ranks, which have met: the collectives between them.

    Attributes:
        reports: What each rank reports, in rank order.
        rank: The number of this process.
        world: How many processes there are.
        cuda: Whether ranks have GPUs.
        device: This rank's device.
    """

    def __init__(
        self, store: "Store | None", reports: Sequence[Report], rank: int, world: int, limit: int
    ) -> None:
        """Starts the process group.

        Args:
            store: Where the ranks met; None when there is only one.
            reports: What each rank reports, in rank order.
            rank: The number of this process.
            world: How many processes there are.
            limit: How long a rank may take at each step (seconds).
        """
        import torch
        from torch import distributed

        from saferlhf_fast.runtime import watchdog

        self.torch, self.dist = torch, distributed
        self.reports, self.rank, self.world = reports, rank, world
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", reports[rank]["local_rank"]) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        if world > 1:
            assert store is not None, "several ranks meet through a store"
            distributed.init_process_group(
                "nccl" if self.cuda else "gloo",
                store=distributed.PrefixStore("cluster", store),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=limit + 30),
            )
            watchdog.begin(limit)

    def gather(self, value: Any) -> list[Any]:
        """Returns each rank's value, in rank order, on all ranks. It is a barrier too."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        self.dist.all_gather_object(values, value)
        return values

    def failed(self, reason: str | None) -> bool:
        """Returns whether any rank has a reason to end here; rank 0 prints the reasons.

        Args:
            reason: This rank's reason; None without one.
        """
        reasons = [
            f"rank {r} ({self.reports[r]['host']}): {why}" for r, why in enumerate(self.gather(reason)) if why
        ]
        return bool(reasons) and bool(print_reasons(reasons, self.rank))

    def say(self, line: str) -> None:
        """Prints a line, on rank 0, unless it is empty."""
        if self.rank == 0 and line:
            print(line, flush=True)

    def wrong_sum(self) -> str | None:
        """Returns the reason why a sum over ranks is wrong, or None."""
        total = self.torch.full((1000,), float(self.rank + 1), device=self.device)
        if self.world > 1:
            self.dist.all_reduce(total)
        expected = self.world * (self.world + 1) / 2
        return (
            None
            if bool((total == expected).all())
            else f"an all-reduce gave {total[0].item()}, expected {expected}"
        )

    def bandwidth(self) -> list[str]:
        """Measures all-reduce.

        Returns:
            Lines with the latency at 4 bytes, and GB/s at larger sizes. `bus` is 2·(n − 1)/n times the size
            over the time, which is what a link of a ring carries.
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

    def _seconds(self, count: int, times: int) -> float:
        """Returns the slowest rank's median time of an all-reduce of `count` fp32 numbers (seconds)."""
        data, durations = self.torch.zeros(count, device=self.device), []
        for _ in range(times + 1):
            self.dist.barrier()
            self._wait()
            begun = time.perf_counter()
            self.dist.all_reduce(data)
            self._wait()
            durations.append(time.perf_counter() - begun)
        return max(self.gather(statistics.median(durations[1:])))

    def _wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def clocks(self) -> str:
        """Returns a line about how far the machines' clocks are apart, read as all ranks leave a barrier."""
        rounds = []
        for _ in range(5 if self.world > 1 else 1):
            if self.world > 1:
                self.dist.barrier()
                self._wait()
            rounds.append(self.gather(time.time()))
        offsets = [statistics.median(times[r] - times[0] for times in rounds) for r in range(self.world)]
        most = max(range(self.world), key=lambda r: abs(offsets[r]))
        line = f"clocks: {abs(offsets[most]) * 1e3:.1f} ms apart at most (a barrier's jitter is in it)"
        return (
            line
            if abs(offsets[most]) <= SKEW
            else f"warning: {line}: rank {most} ({self.reports[most]['host']})"
        )


def print_reasons(reasons: Sequence[str], rank: int) -> int:
    """Prints why the check failed, on rank 0 and on a rank that alone has a reason.

    Args:
        reasons: "rank 3 (host): reason" for each rank that failed.
        rank: The number of this process.

    Returns:
        The exit code, 1.
    """
    if rank == 0 or len(reasons) == 1 and reasons[0].startswith(f"rank {rank} ("):
        print("\n".join(reasons), file=sys.stderr, flush=True)
    return 1
