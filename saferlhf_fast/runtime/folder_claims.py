"""Who writes to a folder: a file in_use.<n>.json, which the writer touches every few seconds.

The file with the highest n counts. A writer whose predecessor is dead creates n + 1, and the file system lets
exactly one of several do so (O_EXCL, on NFS too); then it deletes n. Nothing is renamed or locked: flock is
not kept by every shared file system, and NFS cannot exchange two names in one step.

Whether a writer is dead:

    same machine and container    its process number and start time tell it at once
    same machine, started again   dead
    same SLURM job, requeued      dead: SLURM has ended the earlier attempt
    anywhere else                 dead when its file has not changed for LIMIT seconds. Clocks of two hosts
                                  are never compared: the change is watched for, and a file's age is its
                                  distance from a new file in the same folder

This module judges; run_lock.py holds claims. Standard library only.
"""

import contextlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

from saferlhf_fast.runtime.process_identity import Identity, is_gone, machine_id, own_identity, was_restarted

PREFIX = "in_use"
PROBE = ".saferlhf-fast-"
"""How the names of files begin that are created only to try a folder."""

BEAT = 10.0
"""Seconds between two touches of a claim."""

LIMIT = 120.0
"""Seconds without a touch after which a writer of another machine is dead; a long call may block threads."""


class Record(TypedDict):
    """What a claim's file holds.

    Attributes:
        process: The process that writes to the folder.
        machine: Its `machine_id()`.
        job: Its SLURM job, and which attempt of it; None outside SLURM.
        since: When it claimed the folder, in its local time.
        inode: Number of the claim's file. It is another one in a copy of the folder.
        token: Random; no two claims have the same.
    """

    process: Identity
    machine: str
    job: tuple[str, int] | None
    since: str
    inode: int
    token: str


class Claim(NamedTuple):
    """A claim as it was read.

    Attributes:
        path: Its file.
        number: The n of its name.
        record: What the file holds; None while it is being written, or when it is damaged.
        inode: Number of the file.
        touched: When the file was last touched, in nanoseconds of the file system's clock.
    """

    path: Path
    number: int
    record: Record | None
    inode: int
    touched: int

    @property
    def token(self) -> str | None:
        """Its token; None without a record."""
        return self.record["token"] if self.record else None


class Verdict(Enum):
    """Whether the writer that made a claim is still writing."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"  # yet: its file has to be watched


class Here(NamedTuple):
    """The process that looks at claims, or makes one."""

    process: Identity
    machine: str
    job: tuple[str, int] | None


def here(environ: Mapping[str, str] = os.environ) -> Here:
    """This process.

    Args:
        environ: The environment variables.
    """
    return Here(_own_process(os.getpid()), machine_id(), slurm_job(environ))


@cache
def _own_process(pid: int) -> Identity:
    """The identity of this process. pid: its number, which is another one after a fork."""
    return own_identity(socket.gethostname())


def slurm_job(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """The SLURM job of this process and how often it was requeued; None outside SLURM."""
    job, restarts = environ.get("SLURM_JOB_ID"), environ.get("SLURM_RESTART_COUNT", "0")
    if not job or not restarts.isdigit():
        return None
    return f"{environ.get('SLURM_CLUSTER_NAME', '')}/{job}", int(restarts)


# ---------------------------------------------------------------- reading


def is_claim(name: str, prefix: str = PREFIX) -> bool:
    """Whether a file name is that of a claim."""
    return re.fullmatch(rf"{re.escape(prefix)}\.\d{{1,9}}\.json", name, re.ASCII) is not None


def is_claim_on_any(name: str) -> bool:
    """Whether a file name is that of a claim, whatever it begins with (see `run_folder.hold_output`)."""
    start, _, rest = name.rpartition(PREFIX)
    return is_claim(PREFIX + rest) and (not start or start.endswith("."))


def is_bookkeeping(name: str) -> bool:
    """Whether a file is a claim or a try, so that a folder with nothing else counts as empty."""
    return is_claim(name) or name.startswith(PROBE)


def read_claims(folder: Path, prefix: str = PREFIX) -> list[Claim]:
    """The claims on a folder, the one that counts last; none when the folder does not exist.

    Args:
        folder: The folder.
        prefix: How the claims' names begin.

    Raises:
        OSError: The folder cannot be read.
    """
    try:
        names = [name for name in os.listdir(folder) if is_claim(name, prefix)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    claims = [read_claim(folder / name) for name in names]
    return sorted((claim for claim in claims if claim), key=lambda claim: claim.number)


def read_claim(path: Path) -> Claim | None:
    """Reads a claim; None when it does not exist any more.

    The file is opened even for its time, since an NFS client asks the server again only then.
    """
    try:
        with open(path, "rb") as file:
            status, text = os.fstat(file.fileno()), file.read(65536)
    except FileNotFoundError:
        return None
    number = int(path.name.rsplit(".", 2)[1])
    return Claim(path, number, _record(text), status.st_ino, status.st_mtime_ns)


def _record(text: bytes) -> Record | None:
    """The content of a claim; None when it is not complete."""
    try:
        values = json.loads(text)
        process = values["process"]
        complete = isinstance(process["pid"], int) and all(
            isinstance(text, str)
            for text in (
                process["host"],
                process["space"],
                values["token"],
                values["since"],
                values["machine"],
            )
        )
        values["inode"], values["job"], process["born"]  # noqa: B018 they have to be there
    except (ValueError, KeyError, TypeError):
        return None
    return cast(Record, values) if complete else None


# ---------------------------------------------------------------- judging


def judge(claim: Claim, me: Here) -> Verdict:
    """Whether the writer behind a claim is alive, as far as that is known without watching its file.

    Args:
        claim: The claim.
        me: The process that looks.
    """
    record = claim.record
    if record is None:
        return Verdict.UNKNOWN
    process = record["process"]
    if process["space"] == me.process["space"]:
        if is_gone(process):
            return Verdict.DEAD
        # a copy of the folder names a process that writes to the original: only its own file is touched
        return Verdict.ALIVE if record["inode"] == claim.inode else Verdict.UNKNOWN
    if was_restarted(process, record["machine"], me.process):
        return Verdict.DEAD
    if record["job"] and me.job and record["job"][0] == me.job[0] and record["job"][1] < me.job[1]:
        return Verdict.DEAD
    return Verdict.UNKNOWN


def seconds_silent(claim: Claim) -> float | None:
    """Seconds since a claim was touched, by the clock of its file system; None when that cannot be told."""
    try:
        with tempfile.NamedTemporaryFile(prefix=PROBE, dir=claim.path.parent) as probe:
            newest = os.fstat(probe.fileno()).st_mtime_ns
    except OSError:
        return None
    return max(0.0, (newest - claim.touched) / 1e9)


_first_seen: dict[tuple[Path, int, int], float] = {}
"""{path, inode and touch of a claim: when this process first saw it so, by its monotonic clock}"""


def watch(
    claim: Claim, me: Here, patience: float | None, waiting: Callable[[float], object] | None = None
) -> Verdict:
    """Whether the writer behind a claim is alive; where that is not known, its file is watched.

    Args:
        claim: The claim.
        me: The process that looks.
        patience: Seconds to watch at most, then the verdict stays UNKNOWN; None for as long as it takes.
        waiting: Called once with the seconds that it may take, before the first wait.

    Raises:
        OSError: The file cannot be read.
    """
    verdict = judge(claim, me)
    if verdict is not Verdict.UNKNOWN:
        return verdict
    silent, begun = seconds_silent(claim), time.monotonic()
    watched = begun - _first_seen.setdefault((claim.path, claim.inode, claim.touched), begun)
    # three beats even for an old file: the clock may have been set forward since
    needed = max(3 * BEAT - watched, LIMIT - (watched if silent is None else silent))
    if patience is not None and silent is not None and silent > LIMIT:
        return Verdict.UNKNOWN  # most likely dead, and not to be waited for now
    if waiting and (patience is None or patience > 0):
        waiting(max(0.0, needed))
    passed = 0.0
    while True:
        # read after the time: this process may have stood still while the writer touched the file
        new = read_claim(claim.path)
        if new is None:
            return Verdict.DEAD
        if (new.inode, new.touched) != (claim.inode, claim.touched):
            if claim.record is None and new.record is not None:  # it was being written
                return watch(new, me, patience)
            return Verdict.ALIVE
        if passed > needed:
            return Verdict.DEAD
        if patience is not None and passed > patience:
            return Verdict.UNKNOWN
        time.sleep(min(1.0, BEAT / 10))
        passed = time.monotonic() - begun


def sentence(claim: Claim) -> str:
    """Who writes to a folder, as "pid 12 on host a since 2026-01-31T12:30:00+0100; heartbeat 3 s ago"."""
    silent = seconds_silent(claim)
    beat = "" if silent is None else f"; heartbeat {silent:.0f} s ago"
    if claim.record is None:
        return f"a process that has not written its name into {claim.path.name} yet{beat}"
    process = claim.record["process"]
    return f"pid {process['pid']} on host {process['host']} since {claim.record['since']}{beat}"


# ---------------------------------------------------------------- writing


def create(path: Path, me: Here) -> str:
    """Creates a claim's file, and returns its token.

    Args:
        path: The file.
        me: The process that claims.

    Raises:
        FileExistsError: There is such a file.
        OSError: It cannot be written.
    """
    token = os.urandom(16).hex()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        record: Record = {
            "process": me.process,
            "machine": me.machine,
            "job": me.job,
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "inode": os.fstat(descriptor).st_ino,
            "token": token,
        }
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=1) + "\n")
    except BaseException:
        remove(path)
        raise
    return token


def remove(path: Path) -> None:
    """Removes a claim's file as far as that is possible; a file that stays is judged dead later."""
    with contextlib.suppress(OSError):
        path.unlink()
