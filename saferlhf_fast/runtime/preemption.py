"""Ending a run on a signal: SIGTERM (clusters before they take a node back) and SIGUSR1 (SLURM's warning).

Between `listen` and `ignore` a signal is only noted. The training loop calls `requested` at the end of each
step; if there was a signal, it writes a checkpoint and raises Preempted. The signal may come several times: a
cluster sends it to every process, and a launcher passes it on. Outside `listen` and `ignore`, signals do what
they do by default.
"""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
_previous_handlers: dict[int, Any] = {}
_requested: int | None = None


class Preempted(SystemExit):
    """The run was stopped by a signal and has written a checkpoint, if the disk has taken it.

    The exit code is 128 + the signal's number, as in shells.
    """

    def __init__(self, step: int, newest: tuple[int, Path] | None) -> None:
        """Takes the signal that was noted; SIGTERM where the signal went to another rank.

        Args:
            step: The last step of the run.
            newest: Step and folder of the newest finished checkpoint; None where there is none.
        """
        global _requested
        number, _requested = _requested or signal.SIGTERM, None
        super().__init__(128 + int(number))
        self.step, self.newest, self.name = step, newest, signal.Signals(number).name

    def __str__(self) -> str:
        begun = f"{self.name}: stopped after step {self.step}"
        if self.newest is None:
            return f"{begun}; no checkpoint was written, so resume=auto starts from the beginning"
        at, folder = self.newest
        older = "" if at == self.step else f", of step {at}: the one of step {self.step} was not written"
        return f"{begun}; resume=auto continues from {folder}{older}"


def listen() -> None:
    """Notes signals from now on. Only a process's main thread can.

    A signal that came after the last step of a stage still counts: the next stage ends after its first step.
    """
    if threading.current_thread() is threading.main_thread():
        for number in WATCHED:
            _previous_handlers[number] = signal.signal(number, _note)


def ignore() -> None:
    """Gives signals back the handlers that they had before `listen`."""
    while _previous_handlers:
        number, handler = _previous_handlers.popitem()
        signal.signal(number, handler)


def requested() -> int | None:
    """The number of the signal that came; None without one."""
    return _requested


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = number
