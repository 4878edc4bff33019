"""One writer for each run folder: `hold` claims a folder, and keeps the claim alive until `release`.

Rank 0 holds the claim for all ranks of a run. A thread touches the claim's file every few seconds; a touch
that fails is tried again, since a disk that hiccups is no reason to end a run. A run whose claim was removed,
or taken over while its machine stood still, has lost its folder: `RunLock.is_lost` says so to the training
loop, and `require_held` raises before anything is written.

folder_claims.py has the files and the rules by which a claim is judged. Other processes than rank 0 hold
nothing. Threads of one process share its claims: two runs of one process are not kept apart.
"""

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import folder_claims
from saferlhf_fast.runtime.folder_claims import PREFIX, Claim, Here, Verdict

CONFIRM = 1.0
"""Seconds after which a claim that seems to be lost is looked at again before it counts as lost."""

TRIES = 20
"""How often a claim is tried when other processes claim the folder at the same moments."""

QUICK = 1.5
"""Beats for which a check before a run watches a claim of another machine."""


def quick_patience() -> float:
    """Seconds for which a check before a run watches a claim of another machine."""
    return QUICK * folder_claims.BEAT


class RunLock:
    """A claim of this process on a folder, and the thread that keeps it alive."""

    def __init__(self, folder: Path, prefix: str, path: Path, token: str) -> None:
        """Starts the thread.

        Args:
            folder: The folder, as it is named to users.
            prefix: How the names of its claims begin.
            path: The claim's file.
            token: The token in it.
        """
        self.folder, self.prefix, self.path, self.token = folder, prefix, path, token
        self.created: list[Path] = []  # folders that were created for it, the innermost first
        self.pid = os.getpid()
        self.reason: str | None = None  # why the claim is lost
        self.last_look = time.monotonic()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="saferlhf-run-lock", daemon=True)
        self.thread.start()

    def _beat(self) -> None:
        """Touches the file until the claim is lost or released."""
        while not self.stopping.wait(folder_claims.BEAT) and self.reason is None:
            self.look(touch=True)

    def look(self, touch: bool = False) -> None:
        """Finds out whether the claim is lost. An error of the file system leaves that open.

        Args:
            touch: Touch the file where the claim stands.
        """
        reason = self._problem()
        if reason and not self.stopping.wait(CONFIRM):
            reason = self._problem()
        if self.stopping.is_set():  # released meanwhile
            return
        if reason:
            self.reason = reason
            return
        if reason is None:
            self.last_look = time.monotonic()
            if touch:
                with contextlib.suppress(OSError):
                    os.utime(self.path)

    def _problem(self) -> str | None:
        """Why the claim is lost; None while it stands, and "" where the file system does not say."""
        try:
            claim = folder_claims.read_claim(self.path)
            if claim is not None and claim.token not in (None, self.token):
                return f"it is held by {folder_claims.sentence(claim)}"
            number = int(self.path.name.rsplit(".", 2)[1])
            successor = folder_claims.read_claim(self.path.with_name(f"{self.prefix}.{number + 1}.json"))
            if claim is not None and successor is None:
                return None
            claims = [
                c for c in folder_claims.read_claims(self.path.parent, self.prefix) if c.number > number
            ]
        except OSError:
            return ""
        return (
            f"it was taken over by {folder_claims.sentence(claims[-1])}"
            if claims
            else f"its file {self.path.name} was removed"
        )

    def is_lost(self, look: bool = False) -> bool:
        """Whether the folder is not this process's any more.

        Args:
            look: Look at the file now; else only where the thread has not done so lately.
        """
        if self.reason is None and (look or time.monotonic() - self.last_look > 3 * folder_claims.BEAT):
            self.look()
        return self.reason is not None

    def loss(self) -> UserError:
        """The error for a folder that was lost."""
        return UserError(
            f"output: {self.folder} is not this run's any more: {self.reason}; the run ends and writes "
            "nothing more into it"
        )

    def release(self) -> None:
        """Removes the file and what was created for it and is empty; only in the process that claimed."""
        self.stopping.set()
        if os.getpid() != self.pid or self.reason is not None:
            return
        with contextlib.suppress(OSError):
            claim = folder_claims.read_claim(self.path)
            if claim is not None and claim.token == self.token:
                self.path.unlink()
            for folder in self.created:
                folder.rmdir()


_held: dict[tuple[Path, str], RunLock] = {}
_sessions = 0


# ---------------------------------------------------------------- claiming


def hold(folder: Path, key: str = "output", prefix: str = PREFIX) -> None:
    """Claims a folder for this process, which may hold it already; creates the folder.

    A claim of a dead process is taken over. Of several processes that do so, one gets the folder.

    Args:
        folder: The folder.
        key: Name of the setting in a refusal.
        prefix: How the names of the folder's claims begin.

    Raises:
        UserError: Another process writes to the folder, or it cannot be written.
    """
    place = (folder.resolve(), prefix)
    lock = _held.get(place)
    if lock is not None and not lock.is_lost(look=True):
        return
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        path, token = _claim(folder, key, prefix)
    except OSError as error:
        what = "written into" if folder.exists() else "created"
        raise UserError(f"{key}: {folder} cannot be {what}: {error.strerror or error}") from error
    _held[place] = RunLock(folder, prefix, path, token)
    _held[place].created = missing


def _claim(folder: Path, key: str, prefix: str) -> tuple[Path, str]:
    """Creates the claim that counts, and removes dead ones; returns its file and token."""
    me = folder_claims.here()
    for attempt in range(TRIES):
        time.sleep(0.05 * attempt)
        folder.mkdir(parents=True, exist_ok=True)
        before = folder_claims.read_claims(folder, prefix)
        if before and _is_in_use(before[-1], me, None):
            raise _refusal(folder, key, before[-1])
        number = before[-1].number + 1 if before else 1
        path = folder / f"{prefix}.{number}.json"
        try:
            token = folder_claims.create(path, me)
        except (FileExistsError, FileNotFoundError):
            continue  # another process was faster, or has removed the folder that it had created
        judged = {(claim.number, claim.token) for claim in before}
        after = [c for c in folder_claims.read_claims(folder, prefix) if c.token != token]
        if {(claim.number, claim.token) for claim in after} - judged:
            folder_claims.remove(path)  # somebody came while the dead claim was judged
            continue
        for claim in after:
            folder_claims.remove(claim.path)
        if before and before[-1].record:
            process = before[-1].record["process"]
            print(
                f"{folder}: taken over from pid {process['pid']} on host {process['host']}, which has ended "
                "without a word",
                flush=True,
            )
        return path, token
    raise UserError(f"{key}: {folder} is being claimed by other processes; expected one")


def _is_in_use(claim: Claim, me: Here, patience: float | None) -> bool:
    """Whether the process behind a claim writes to its folder; a line says so where that takes time."""

    def waiting(seconds: float) -> None:
        print(
            f"{claim.path.parent}: waiting up to {seconds:.0f} s for a sign of life of "
            f"{folder_claims.sentence(claim)}",
            flush=True,
        )

    return folder_claims.watch(claim, me, patience, waiting) is Verdict.ALIVE


def _refusal(folder: Path, key: str, claim: Claim) -> UserError:
    """The error that another process writes to a folder."""
    return UserError(f"{key}: {folder} is in use by {folder_claims.sentence(claim)}")


def refuse_if_in_use(folder: Path, key: str, patience: float | None, prefix: str = PREFIX) -> None:
    """Raises where another process writes to a folder; changes nothing.

    Args:
        folder: The folder, which need not exist.
        key: Name of the setting in a refusal.
        patience: Seconds to watch a claim of another machine; None for as long as it takes.
        prefix: How the names of the folder's claims begin.

    Raises:
        UserError: Another process writes to the folder, or it cannot be read.
    """
    try:
        claims = folder_claims.read_claims(folder, prefix)
        in_use = claims and not _is_own(claims[-1]) and _is_in_use(claims[-1], folder_claims.here(), patience)
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be read: {error.strerror or error}") from error
    if in_use:
        raise _refusal(folder, key, claims[-1])


def refuse_around(folder: Path, key: str, patience: float | None, inside: bool) -> None:
    """Raises where another process writes to a folder above or inside, as `run` and the demo have them.

    Args:
        folder: The folder.
        key: Name of the setting in a refusal.
        patience: As in `refuse_if_in_use`.
        inside: Whether the folders inside are looked at; they are when the folder is to be moved or deleted.

    Raises:
        UserError: Another process writes to one of them.
        OSError: One cannot be read.
    """
    for above in folder.absolute().parents[:2]:
        if os.access(above, os.R_OK):  # /home may only be entered
            refuse_if_in_use(above, f"{key}: {folder} is inside another run's folder", patience)
    if not inside:
        return
    claims = [
        claim
        for place, _, names in os.walk(folder)
        for name in names
        if folder_claims.is_claim_on_any(name) and Path(place) != folder
        if (claim := folder_claims.read_claim(Path(place, name))) is not None and not _is_own(claim)
    ]
    for claim in claims:
        if _is_in_use(claim, folder_claims.here(), patience):
            raise _refusal(claim.path.parent, f"{key}: {folder} holds another run's folder", claim)


def _is_own(claim: Claim) -> bool:
    """Whether this process made a claim."""
    return claim.token is not None and any(claim.token == lock.token for lock in _held.values())


# ---------------------------------------------------------------- while it is held


def locks_on(path: str | Path) -> list[RunLock]:
    """This process's claims on a path's folder and on those above it, the innermost first.

    Args:
        path: The folder, or something in it.
    """
    real = Path(path).resolve()
    return [lock for place in (real, *real.parents) if (lock := _held.get((place, PREFIX))) is not None]


def require_held(path: str | Path) -> None:
    """Raises where this process has lost the folder of a path; to be called before something is written.

    Args:
        path: The folder, or something in it.

    Raises:
        UserError: The folder is not this process's any more.
    """
    for lock in locks_on(path):
        if lock.is_lost(look=True):
            raise lock.loss()


def is_held(folder: str | Path) -> bool:
    """Whether this process holds a folder."""
    lock = _held.get((Path(folder).resolve(), PREFIX))
    return lock is not None and not lock.is_lost()


# ---------------------------------------------------------------- releasing


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Context that releases at its end what was claimed in it; until then `finish` releases nothing."""
    global _sessions
    before, _sessions = set(_held), _sessions + 1
    try:
        yield
    finally:
        _sessions -= 1
        for place in set(_held) - before:
            _held.pop(place).release()


def finish(folder: str | Path) -> None:
    """Releases a folder whose run is finished, unless a session does so later."""
    if not _sessions:
        release(folder)


def release(folder: str | Path, prefix: str = PREFIX) -> None:
    """Releases a folder, where this process holds it."""
    lock = _held.pop((Path(folder).resolve(), prefix), None)
    if lock is not None:
        lock.release()


def moved(folder: Path, place: Path) -> None:
    """Ends the claim on a folder that this process has renamed.

    Args:
        folder: Its former path, resolved.
        place: Where it is now.
    """
    lock = _held.pop((folder, PREFIX), None)
    if lock is not None:
        lock.stopping.set()
        folder_claims.remove(place / lock.path.name)


def release_all() -> None:
    """Releases all folders of this process."""
    while _held:
        _held.popitem()[1].release()


atexit.register(release_all)
