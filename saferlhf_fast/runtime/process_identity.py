"""Telling whether a process of this machine is still running.

A process number alone does not tell: a later process may get the same one. The time at which the process
started is compared too. A process of another machine or container cannot be looked up.
"""

import os
from pathlib import Path
from typing import TypedDict


class Identity(TypedDict):
    """A process, as JSON can hold it.

    Attributes:
        host: Name of the machine.
        pid: The process number.
        born: When the process started, in clock ticks; None where that cannot be read.
        space: The machine, or container, in which the number counts.
    """

    host: str
    pid: int
    born: str | None
    space: str


def own_identity(host: str) -> Identity:
    """The identity of this process, which runs on the machine `host`."""
    try:
        space = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        space = f"unknown {os.urandom(8).hex()}"  # equal to no other process's
    return {"host": host, "pid": os.getpid(), "born": start_time(os.getpid()), "space": space}


def start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks; None when it does not exist, or is dead but not waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_running(process: Identity) -> bool:
    """Whether a process of this machine is still running."""
    return start_time(process["pid"]) == process["born"]
