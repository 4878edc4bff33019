"""Whether all ranks share a folder: each sees what others write, and a rename replaces a file at once."""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saferlhf_fast.commands.preflight.ranks import Ranks

WAIT = 15.0  # seconds within which a shared folder must show what another machine has written


def problem(path: str | Path, ranks: "Ranks") -> str | None:
    """Checks a folder between all ranks. Every rank calls it; the files that it writes are removed.

    Args:
        path: The folder.
        ranks: All ranks.

    Returns:
        The reason why this rank cannot share the folder with the others, None when it can.
    """
    root = Path(path) / ranks.gather(f".saferlhf-fast-{uuid.uuid4().hex}")[0]
    reason = _attempt(_make, root, ranks.rank)
    try:
        for step in (_write_nonce, _read_nonce, _read_all, _rename):
            reasons = ranks.gather(reason)
            if any(reasons):
                return reason
            reason = _attempt(step, root, ranks.rank, ranks.world)
        ranks.gather(None)  # no rank reads any more
        return reason
    finally:
        if ranks.rank == 0:
            shutil.rmtree(root, ignore_errors=True)


def _attempt(call: Callable[..., str | None], *arguments: object) -> str | None:
    """Returns what a step reports, or an OSError that stopped it, in one line."""
    try:
        return call(*arguments)
    except OSError as error:
        return f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")


def _make(root: Path, rank: int) -> str | None:
    """Rank 0 creates a folder of its own inside the folder that is checked."""
    parent = root.parent
    if not parent.is_dir():
        return (
            f"{parent} {'is a file' if parent.exists() else 'does not exist'}; "
            "expected the folder that runs write to"
        )
    try:
        if rank == 0:
            root.mkdir()
    except OSError as error:  # its own message names a folder that the user does not know
        return f"{parent} cannot be written into: {error.strerror}"
    return None


def _write_nonce(root: Path, rank: int, world: int) -> str | None:
    """Rank 0 writes a file with a random text."""
    if rank == 0:
        (root / "nonce").write_text(root.name)
        _put(root, 0)
    return None


def _read_nonce(root: Path, rank: int, world: int) -> str | None:
    """All ranks read what rank 0 has written, and write a file of their own."""
    if _until((root / "nonce").read_text, root.name) != root.name:
        return (
            f"{root.parent}: what rank 0 has written there is not seen within {WAIT:.0f} s; "
            "is it the same folder?"
        )
    (root / f"rank{rank}").write_text(str(rank))
    return None


def _read_all(root: Path, rank: int, world: int) -> str | None:
    """Rank 0 reads what all ranks have written."""
    unseen = [
        r for r in range(world if rank == 0 else 0) if _until((root / f"rank{r}").read_text, str(r)) != str(r)
    ]
    return (
        f"{root.parent}: what ranks {', '.join(map(str, unseen))} have written there is not seen"
        if unseen
        else None
    )


def _rename(root: Path, rank: int, world: int, times: int = 50) -> str | None:
    """Rank 0 replaces a file by a rename many times; no other rank may ever see half a file, or none."""
    if rank == 0:
        for number in range(1, times + 1):
            _put(root, number)
            time.sleep(0.01)
        return None
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        try:
            text = (root / "value").read_text()
        except OSError as error:
            if error.errno == errno.ESTALE:  # NFS: the file that was open has been replaced
                continue
            return (
                f"{root.parent}: a file that is replaced by a rename was not there for a moment: "
                f"{error.strerror}"
            )
        if len(text) != 64 * 1024 or len(set(text.split())) != 1:
            return f"{root.parent}: a rename is not atomic: half a file was read"
        if text.split()[0] == f"{times:07d}":
            return None
        time.sleep(0.005)
    return f"{root.parent}: a renamed file is not seen within {WAIT:.0f} s"


def _put(root: Path, number: int) -> None:
    """Replaces the file `value` by a rename."""
    temporary = root / "value.tmp"
    temporary.write_text(f"{number:07d} " * (8 * 1024))
    os.replace(temporary, root / "value")


def _until(read: Callable[[], str], expected: str) -> str | None:
    """Reads again and again, since attributes may be cached; returns what was read last.

    It ends when the expected text was read, or the time is up.
    """
    until = time.monotonic() + WAIT
    text: str | None = None
    while text != expected and time.monotonic() < until:
        try:
            text = read()
        except FileNotFoundError:
            pass
        if text != expected:
            time.sleep(0.1)
    return text
