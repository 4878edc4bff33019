"""When one rank fails, hangs or is killed, all ranks end within seconds and say which one and why.

Without this, the others would wait in a collective until it times out and then blame the network. Every rank
has a thread that looks every few seconds at the store through which the ranks have found each other. The
thread writes that its rank is alive and where its main thread is, and reads whether a rank has failed. It
also looks up the processes of the same machine by their number, and rank 0 looks at the state of all ranks:

    failed   its main thread raised: `failed` writes it before the process ends
    gone     its process does not exist any more, or has written nothing for LOST seconds
    hangs    a main thread has made no progress for the time limit (engine.timeout). To blame are the ranks
             that do not wait in a collective; where there are several, those that have called fewer

Nothing runs in a run of one process. engine.start and engine.finish call `begin` and `end`.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from . import run_lock
from .process_identity import Identity, is_running, own_identity
from .rank_reports import Beat, Fault, few, is_or_are, name_ranks, read_fault
from .stack_sampler import StackSampler, blames_another_rank

INTERVAL = 3.0  # seconds between two looks at the store
# Seconds after which a silent rank of another machine is gone; a long call may block its threads for a while.
LOST = 120.0
SUSPECT = 20.0  # the same, when a collective has already failed
# seconds that a main thread gets to raise the same error itself before its process is ended
GRACE_SECONDS = 2.0

_watchdog: "Watchdog | None" = None
_begun = 0  # watchdogs that this process has started


def begin(timeout: float, interval: float = INTERVAL) -> None:
    """Starts the watchdog; every rank calls it once the ranks have joined.

    Nothing happens in a run of one process.

    Args:
        timeout: Seconds without progress after which a rank hangs.
        interval: Seconds between two looks.
    """
    global _watchdog, _begun
    if _watchdog is not None:
        _watchdog.timeout = timeout
    elif dist.is_initialized() and dist.get_world_size() > 1:
        _begun += 1
        if _begun == 1:
            atexit.register(_at_exit)
        _watchdog = Watchdog(timeout, interval, f"watch/{_begun}")


def failed(error: BaseException, code: int = 1) -> tuple[str | None, int] | None:
    """Tells the other ranks that this rank's main thread ends with an error, and waits until they know.

    The caller then ends the process with `leave`: what a failed collective leaves behind can block a regular
    exit.

    Args:
        error: The error.
        code: The exit code that goes with it.

    Returns:
        None in a run of one process. Else what to print instead of the error, and the exit code; the text is
        "" for nothing, where rank 0 prints the same error, and None for the error itself.
    """
    global _watchdog
    if _watchdog is None:
        return None
    watchdog, _watchdog = _watchdog, None
    try:
        return watchdog.failed(error, code)
    except Exception:  # the store is gone too: the error itself has to do
        return None, code


def end(limit: float | None = None) -> None:
    """Ends the watchdog when this rank is done; rank 0, which may host the store, waits for the others.

    Args:
        limit: Seconds to wait at most; the watchdog's time limit when not given.
    """
    global _watchdog
    if _watchdog is not None:
        watchdog, _watchdog = _watchdog, None
        watchdog.end(limit)


def _at_exit() -> None:
    """Covers programs that end without a call of `failed` or `end`."""
    error = getattr(sys, "last_value", None)
    failed(error) if error is not None else end(SUSPECT)


class Watchdog:
    """The watchdog of one rank: a thread, its client of the store, and what it has seen."""

    def __init__(self, timeout: float, interval: float, prefix: str) -> None:
        """Starts the thread once every rank has written its identity.

        Args:
            timeout: Seconds without progress after which a rank hangs.
            interval: Seconds between two looks.
            prefix: In front of the store's keys, another one for each watchdog of the process.
        """
        self.timeout, self.interval, self.prefix = timeout, interval, prefix
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.main_thread = StackSampler(threading.get_ident(), [__file__])
        self.count, self.state = 0, "runs"
        # for each rank its last count, and the seconds since it changed
        self.silent: dict[int, tuple[int | None, float]] = dict.fromkeys(range(self.world), (None, 0.0))
        self.fault: Fault | None = None
        self.known = threading.Event()  # the thread has read a fault
        self.main_reports, self.stopping = threading.Event(), threading.Event()
        self.doubts, self.store_failures = False, 0  # doubts: a collective has failed in this rank
        self.store = self._client()
        self.store.set(f"who/{self.rank}", json.dumps(own_identity(socket.gethostname())))
        self._beat(0.0)
        if self.rank == 0:
            self.store.set("fault", "-")
        self.who: list[Identity] = [
            json.loads(x) for x in self.store.multi_get([f"who/{r}" for r in range(self.world)])
        ]
        self.near = [  # the other ranks of this machine
            r
            for r, who in enumerate(self.who)
            if who["space"] == self.who[self.rank]["space"] and r != self.rank
        ]
        self.store.wait(
            ["fault", *([f"beat/{r}" for r in range(self.world)] if self.rank == 0 else ["beat/0"])]
        )
        self.thread = threading.Thread(target=self._run, name="saferlhf-watch", daemon=True)
        self.thread.start()

    def _client(self) -> dist.PrefixStore:
        """A client of the ranks' store for this thread alone: the main thread's may block for any time."""
        client = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=SUSPECT),
        )
        return dist.PrefixStore(self.prefix, client)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        last = time.monotonic()
        while not self.stopping.wait(self.interval):
            now = time.monotonic()
            # limited: the time for which this process was stopped does not count
            passed, last = min(now - last, 2 * self.interval), now
            try:
                fault = self._look(passed)
                self.store_failures = 0
            except RuntimeError:
                fault = self._reconnect()
            if fault is not None and not self.stopping.is_set():
                self._end(fault)
                return

    def _look(self, passed: float) -> Fault | None:
        """Looks at the store once. passed: seconds since the last look."""
        # before the store is read: a rank that fails writes it before its process ends
        dead = [r for r in self.near if not is_running(self.who[r])]
        self._beat(passed)
        everyone = self.rank == 0 or self.doubts
        ranks = list(range(self.world)) if everyone else sorted({0, *dead})
        fault, *texts = self.store.multi_get(["fault", *(f"beat/{r}" for r in ranks)])
        if fault != b"-":
            return read_fault(fault)
        beats: dict[int, Beat] = dict(zip(ranks, map(json.loads, texts)))
        gone = [r for r in dead if beats[r]["state"] != "ended"]
        if gone:
            named = f"{name_ranks(self.who, gone)} {is_or_are(gone)}"
            line = f"{named} gone without a word: killed, or out of memory"
            return self.post(Fault(gone[0], line, 1, tuple(gone)))
        return self._silence(beats, passed) or (self._hang(beats) if self.rank == 0 else None)

    def _silence(self, beats: Mapping[int, Beat], passed: float) -> Fault | None:
        """The Fault that ranks have written nothing for too long.

        The limit is longer for ranks of this machine, whose processes are running: they may just hang.
        """
        for r, beat in beats.items():
            count, seconds = self.silent[r]
            self.silent[r] = (beat["count"], 0.0 if beat["count"] != count else seconds + passed)
        far = SUSPECT if self.doubts else max(SUSPECT, min(LOST, self.timeout))
        return self._silent_fault(
            [
                r
                for r in beats
                if r != self.rank
                and beats[r]["state"] != "ended"
                and self.silent[r][1] > (max(self.timeout, far) if r in self.near else far)
            ]
        )

    def _silent_fault(self, ranks: Sequence[int]) -> Fault | None:
        """Posts that ranks are silent; None without any."""
        if not ranks:
            return None
        named = f"{name_ranks(self.who, ranks)} {is_or_are(ranks)}"
        line = f"{named} gone: no sign of life for {self.silent[ranks[0]][1]:.0f} s"
        return self.post(Fault(ranks[0], line, 1, tuple(ranks)))

    def _hang(self, beats: Mapping[int, Beat]) -> Fault | None:
        """The Fault of the rank that blocks the others, once one has made no progress for the time limit."""
        running = {r: beat for r, beat in beats.items() if beat["state"] != "ended"}
        longest = max((beat["stalled"] for beat in running.values()), default=0.0)
        if longest < self.timeout:
            return None
        silent = [r for r in running if self.silent[r][1] > 4 * self.interval]
        if silent:  # where they are now is not known
            return self._silent_fault(silent)
        behind = [r for r, beat in running.items() if not beat["waits"]]
        if not behind:
            places = few(f"rank {r} at {beat['at']}" for r, beat in running.items())
            return self.post(Fault(0, f"all ranks have waited for each other for {longest:.0f} s: {places}"))
        least = min(running[r]["collectives"] for r in behind)
        behind = [r for r in behind if running[r]["collectives"] == least]
        places = few(f"{name_ranks(self.who, [r])} hangs at {running[r]['at']}" for r in behind)
        return self.post(
            Fault(behind[0], f"{places}; a rank has made no progress for {longest:.0f} s (engine.timeout)")
        )

    def _beat(self, passed: float) -> None:
        """Writes that this rank is alive and where its main thread is. passed: see `_look`."""
        self.main_thread.sample(passed)
        self.count += 1
        beat: Beat = {
            "count": self.count,
            "state": self.state,
            "stalled": round(self.main_thread.seconds, 1),
            "waits": self.main_thread.waits,
            "at": self.main_thread.position,
            "collectives": self.main_thread.collectives,
        }
        self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def _reconnect(self) -> Fault | None:
        """After an error of the store: None when it answers again, else the Fault that it is gone."""
        if (
            0 in self.near
            and not is_running(self.who[0])
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        ):
            return Fault(
                0,
                f"{name_ranks(self.who, [0])} is gone, and the store with it: killed, or out of memory",
                gone=(0,),
            )
        try:
            with socket.create_connection(
                (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=SUSPECT
            ):
                pass  # tried first, since torch's client prints its C++ stack when nobody answers
            self.store = self._client()
            self.store.check(["fault"])
            self.store_failures += 1
            if self.store_failures < 3:
                return None
            raise RuntimeError("answers, and then not")
        except (OSError, RuntimeError):
            place = f"the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not answer"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return Fault(
                -1, f"the launcher of the first machine is gone: {place}", gone=tuple(range(self.world))
            )
        return Fault(0, f"{name_ranks(self.who, [0])} is gone: {place}", gone=tuple(range(self.world)))

    def _end(self, fault: Fault) -> None:
        """Ends this process, unless its main thread is about to end by itself."""
        self.fault = fault
        self.known.set()
        if self.main_reports.wait(GRACE_SECONDS):
            return
        self._acknowledge()
        if not fault.quiet:
            _write_error(f"[rank {self.rank}] ended: {fault.line}")
        leave(fault.code)

    def _acknowledge(self) -> None:
        """Counts this rank among those that know of the fault and need the store no more."""
        with contextlib.suppress(RuntimeError):
            self.store.add("seen", 1)

    # ------------------------------------------------------------ what the main thread calls

    def post(self, fault: Fault) -> Fault:
        """Writes a fault for all ranks unless there is one already; returns the first one, which counts."""
        return read_fault(self.store.compare_set("fault", "-", json.dumps(fault)))

    def failed(self, error: BaseException, code: int) -> tuple[str | None, int]:
        """See the function `failed`."""
        self.main_reports.set()
        quiet = isinstance(error, KeyboardInterrupt)
        if blames_another_rank(error) and not quiet:
            self.doubts = True
            if self.known.wait(SUSPECT + 4 * self.interval):
                assert self.fault is not None, "`known` is set after `fault`"
                self.report_failure(self.fault)
                return (
                    "" if self.fault.quiet else f"[rank {self.rank}] ended: {self.fault.line}"
                ), self.fault.code
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        self.store.set(f"error/{self.rank}", text)
        fault = self.post(Fault(self.rank, f"{name_ranks(self.who, [self.rank])}: {text}", code, (), quiet))
        line = "" if self.rank != 0 and (quiet or self._rank_0_prints(text)) else None
        self.report_failure(fault)
        return line, code

    def _rank_0_prints(self, text: str) -> bool:
        """Whether rank 0 ends with the same error: then one line is enough."""
        until = time.monotonic() + GRACE_SECONDS + 1
        while time.monotonic() < until:
            if self.store.check(["error/0"]):
                return self.store.get("error/0").decode() == text
            time.sleep(0.05)
        return False

    def report_failure(self, fault: Fault) -> None:
        """Waits until all other ranks know of a fault.

        If this process ended at once, the store might end with it, or the launcher end the other ranks.
        """
        self._acknowledge()
        with contextlib.suppress(RuntimeError):
            until = time.monotonic() + 3 * self.interval + GRACE_SECONDS
            while self.store.add("seen", 0) < self.world - len(fault.gone) and time.monotonic() < until:
                time.sleep(0.05)
        self.stopping.set()

    def end(self, limit: float | None) -> None:
        """See the function `end`."""
        self.state = "ended"
        self.main_reports.set()
        with contextlib.suppress(RuntimeError):
            self._beat(0.0)
            self.store.add("ended", 1)
            until = time.monotonic() + (limit or self.timeout)
            while self.rank == 0 and self.store.add("ended", 0) < self.world and time.monotonic() < until:
                if self.known.wait(0.05):
                    assert self.fault is not None, "`known` is set after `fault`"
                    if not self.fault.quiet:
                        _write_error(f"[rank 0] ended: {self.fault.line}")
                    self._acknowledge()
                    break
        self.stopping.set()
        self.thread.join(SUSPECT)


def leave(code: int) -> NoReturn:
    """Ends the process at once, after its output is flushed.

    A regular exit could wait for what a broken collective has left behind.
    """

    def tidy() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        run_lock.release_all()  # which a regular exit would do

    # a pipe that nobody reads or a dead disk must not keep the process
    flushing = threading.Thread(target=tidy, daemon=True)
    flushing.start()
    flushing.join(1.0)
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(code)


def _write_error(line: str) -> None:
    """Writes a line to stderr, past Python's buffers."""
    os.write(2, (line + "\n").encode(errors="replace"))
