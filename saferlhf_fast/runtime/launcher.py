"""Starting processes: one for each GPU of this machine, unless another launcher has started them.

    saferlhf-fast ppo-lag recipe.yaml                  all GPUs of this machine; one process on a CPU
    saferlhf-fast ppo-lag recipe.yaml --processes 2    two, on a CPU too
    srun saferlhf-fast ppo-lag recipe.yaml             those that srun has started (docs/multi-node.md)

`start` does what torchrun does on one machine, with the same variables and a store that this process hosts.
Unlike torchrun it passes signals on without ending the run itself (a rank writes a checkpoint first), returns
a rank's exit code, and lets the rank that failed print the error. Restarting is left to the scheduler: with
resume=auto, the same command resumes the run.
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from saferlhf_fast.config.stage_table import WITH_SETTINGS
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime.process_environment import LAUNCHER_PID, rank_environment

if TYPE_CHECKING:
    from torch.distributed import TCPStore

COMMANDS = tuple(name for name, spec in WITH_SETTINGS.items() if spec.several_processes)
"""Commands that run in several processes."""

GRACE = 120
"""Seconds that ranks get after a signal that ends the run, e.g. for a checkpoint (--grace)."""

SETTLE = 20
"""Seconds that ranks get to end by themselves when one has failed; watchdog.py gives them the reason."""

PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


# ---------------------------------------------------------------- how many


def wanted(
    option: str | None, check: Callable[[], object], environ: MutableMapping[str, str] = os.environ
) -> int:
    """Number of processes that this one is to start.

    Args:
        option: The value of --processes; None when it is not given.
        check: Refuses bad settings, as the ranks would. It is called when there may be several processes,
            before torch is imported.
        environ: The environment variables; WORLD_SIZE is set while `check` runs.

    Returns:
        The number; 1 where the command runs in this process.

    Raises:
        UserError: The option asks for what cannot be started here, or `check` refuses.
    """
    number = None if option is None else _number(option, "--processes", 1)
    if "RANK" in environ:
        started = environ.get("WORLD_SIZE", "1")
        if number not in (None, int(started)) and LAUNCHER_PID not in environ:
            raise UserError(
                f"--processes: expected none, a launcher has started {started} already; got {option}"
            )
        return 1
    likely = visible(environ)
    guess = number or likely
    if guess < 2:
        return 1
    _check_as_rank(guess, check, environ)
    gpus = _gpus() if likely else 0
    if number is not None and gpus and number > gpus:
        raise UserError(f"--processes: expected at most {gpus}, one for each GPU, got {option}")
    processes = number or max(1, gpus)
    if processes not in (1, guess):
        _check_as_rank(processes, check, environ)
    return processes


def _check_as_rank(processes: int, check: Callable[[], object], environ: MutableMapping[str, str]) -> None:
    """Calls check as a rank would: whether a run can be resumed depends on the number of processes."""
    environ["WORLD_SIZE"] = str(processes)
    try:
        check()
    finally:
        del environ["WORLD_SIZE"]


def _number(word: str, option: str, least: int) -> int:
    """The whole number that an option's value is. UserError for other words, and below `least`."""
    if not re.fullmatch(r"\d{1,5}", word) or int(word) < least:
        raise UserError(f"{option}: expected a whole number from {least} on, got {word}")
    return int(word)


def visible(environ: Mapping[str, str] = os.environ) -> int:
    """How many GPUs a process here may see, found without torch; only torch knows whether it can use them.

    Args:
        environ: The environment variables.
    """
    try:
        if metadata.version("torch").endswith("+cpu"):
            return 0
    except metadata.PackageNotFoundError:
        return 0
    count, named = installed(), environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return count
    listed = 0
    for device in map(str.strip, named.split(",")):  # CUDA stops at the first that it does not know
        if not device or device.startswith("-") or (device.isdigit() and int(device) >= count):
            break
        listed += 1
    return listed if count else 0


def installed() -> int:
    """Number of GPUs of this machine, from NVIDIA's management library, or by their files in /dev."""
    try:
        library, count = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_uint(0)
        if library.nvmlInit_v2() == 0:
            status = library.nvmlDeviceGetCount_v2(ctypes.byref(count))
            library.nvmlShutdown()
            if status == 0:
                return count.value
    except (OSError, AttributeError):
        pass
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").glob("nvidia*"))


def _gpus() -> int:
    """Number of GPUs that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


# ---------------------------------------------------------------- starting them


def start(words: Sequence[str], processes: int, grace: str | None = None) -> int:
    """Runs `saferlhf-fast <words>` in processes of this machine, and waits for them.

    Args:
        words: The command line, without the program's name.
        processes: How many.
        grace: The value of --grace, seconds that ranks get to end after a signal; None when it is not given.

    Returns:
        The exit code: 0, or that of the rank that failed first.
    """
    return Group(words, processes, GRACE if grace is None else _number(grace, "--grace", 1)).run()


class Group:
    """The processes of one run on this machine."""

    def __init__(self, words: Sequence[str], processes: int, grace: int) -> None:
        self.words, self.processes, self.grace = words, processes, grace
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.codes: dict[int, int] = {}  # exit code by rank, in the order in which they ended
        # the last signal that ends the run, and when the ranks that are still running are killed
        self.end_signal: int | None = None
        self.deadline: float | None = None
        self.interrupts = 0
        self.signalled: set[int] = set()  # ranks that this process has sent a signal

    def run(self) -> int:
        """Starts the ranks, waits for them, kills those that are left, and returns the exit code."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=max(128, self.processes))
        handled = [
            number
            for number in map(signal.Signals.__getitem__, PASSED_ON)
            if signal.getsignal(number) != signal.SIG_IGN
        ]  # a signal that is ignored, as under nohup, stays ignored
        before = {number: signal.signal(number, self._pass_on) for number in handled}
        try:
            print(
                f"starting {self.processes} processes on this machine"
                + (", one for each GPU" if visible() else "")
                + " (--processes 1 for one)",
                flush=True,
            )
            for rank in range(self.processes):
                self.ranks.append(
                    subprocess.Popen(
                        _command(self.words),
                        start_new_session=True,
                        env=rank_environment(rank, self.processes, listener),
                    )
                )
            if self.end_signal is not None:  # it came while they were being started
                self._send(self.end_signal)
            store = _store(listener)  # noqa: F841 lives as long as this function
            self._wait()
        finally:
            for process in self.ranks:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._code()

    def _wait(self) -> None:
        """Waits until all have ended; SETTLE seconds after a failure the others get SIGTERM, then SIGKILL."""
        settle: float | None = None
        while len(self.codes) < self.processes:
            time.sleep(0.05)
            for rank, process in enumerate(self.ranks):
                if rank not in self.codes and process.poll() is not None:
                    self._ended(rank, process)
            now = time.monotonic()
            if self.deadline is not None and now > self.deadline:
                self._send(signal.SIGKILL)
            elif self.deadline is None and any(self.codes.values()):
                settle = settle or now + SETTLE
                if now > settle:
                    self._send(signal.SIGTERM)
                    self.deadline = now + min(self.grace, SETTLE)

    def _ended(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Notes a rank's exit code, and reports the first rank that another program has killed."""
        self.codes[rank] = code = process.returncode
        if code < 0 and rank not in self.signalled and len([c for c in self.codes.values() if c]) == 1:
            print(
                f"error: rank {rank} (process {process.pid}) was ended by {signal.Signals(-code).name}"
                + ("; the kernel does so when memory runs out" if code == -signal.SIGKILL else ""),
                file=sys.stderr,
                flush=True,
            )

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """Sends a signal that this process gets to all ranks.

        The ranks end after their step (preemption.py), at Ctrl-C at once; a second Ctrl-C kills them.
        """
        self._send(number)
        if number == signal.SIGUSR2:  # it does not end a run
            return
        self.interrupts += number == signal.SIGINT
        self.end_signal = number
        self.deadline = time.monotonic() + (self.grace if self.interrupts < 2 else 0)

    def _send(self, number: int) -> None:
        """Sends a signal to the ranks that are still running."""
        for rank, process in enumerate(self.ranks):
            if process.poll() is None:
                self.signalled.add(rank)
                process.send_signal(number)

    def _code(self) -> int:
        """0, or the exit code of the first rank that failed; 128 + n after signal n, as in shells.

        Ranks that this process has ended because of another one count only when there is no other code.
        """
        failed = [code for code in self.codes.values() if code]
        if not failed:
            return 0
        own = [
            code
            for rank, code in self.codes.items()
            if code and not (rank in self.signalled and self.end_signal is None)
        ]
        code = (own or failed)[0]
        return 128 - code if code < 0 else code


def _command(words: Sequence[str]) -> list[str]:
    """The command line of a rank. -P: the current folder, which may hold a random.py, is not on sys.path."""
    return [sys.executable, "-P", "-m", "saferlhf_fast", *words]


def _store(listener: socket.socket) -> "TCPStore":
    """The store in which ranks find each other.

    Ranks that connect while torch is still being imported wait in the listener's backlog.
    """
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    return TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
