"""Telling whether a process of this machine is still running.

A process number alone does not tell: a later process may get the same one. The time at which the process
started is compared too. A process of another machine or container cannot be looked up; only that its machine
has been started again since can be told.
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


def is_gone(process: Identity) -> bool:
    """Whether a process of this machine or container certainly runs no more.

    Where /proc hides the processes of other users, a process that cannot be looked up may be running.

    Args:
        process: A process whose `space` is this process's own.
    """
    try:
        fields = Path(f"/proc/{process['pid']}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(process["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False
    return fields[0] in "ZX" or fields[19] != process["born"]


def machine_id() -> str:
    """What tells this machine from others of the same name, also after a new start; "" if unknown."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""


def was_restarted(process: Identity, machine: str, here: Identity) -> bool:
    """Whether a process ran on this very machine before the machine was last started.

    It is told only outside containers: those of one image may share their name and machine id.

    Args:
        process: The process.
        machine: `machine_id()` where it ran.
        here: The identity of this process.
    """
    then, now = process["space"].partition("pid:"), here["space"].partition("pid:")
    return (
        process["host"] == here["host"]
        and bool(machine)
        and machine == machine_id()
        and then[2] == now[2] == _HOST_NAMESPACE
        and then[0] != now[0]
    )


_HOST_NAMESPACE = "[4026531836]"  # the kernel gives the namespace outside all containers this fixed number
