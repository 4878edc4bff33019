"""Being told to stop: SIGTERM (clusters before they take a node back) and SIGUSR1 (SLURM's warning) end a run
after its step.

Within `listen` … `ignore` a signal is noted; the loop asks at the end of each step, writes a checkpoint and
raises Preempted. It may come several times: a cluster tells every process, and a launcher passes it on.
Outside, signals do what they always do.
"""

import signal
import threading

WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
_before, _asked = {}, None


class Preempted(SystemExit):
    """The run was told to end and has written a checkpoint; exit code 128 + the signal's number, as shells
    have it.
    """

    def __init__(self, step, checkpoint):
        global _asked
        number, _asked = _asked or signal.SIGTERM, None  # another rank was asked
        super().__init__(128 + int(number))
        self.step, self.checkpoint, self.name = step, checkpoint, signal.Signals(number).name

    def __str__(self):
        return f"{self.name}: stopped after step {self.step}; resume=auto goes on from {self.checkpoint}"


def listen():
    """Notes signals from now on. Only a process's main thread can.

    One that came after the last step of a stage still counts: the next stage ends after its first step.
    """
    if threading.current_thread() is threading.main_thread():
        for number in WATCHED:
            _before[number] = signal.signal(number, _note)


def ignore():
    """Signals do again what they did before `listen`."""
    while _before:
        number, handler = _before.popitem()
        signal.signal(number, handler)


def asked():
    """The signal that came, or None."""
    return _asked


def _note(number, frame):
    global _asked
    _asked = number
