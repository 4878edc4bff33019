"""Files on disks that may be full, damaged or gone: whole or not there, and the cause in one line.

`whole_file`, `write_text` and `write_json` write under a temporary name, flush to the disk, and rename.
`writing` turns what any library raises when it cannot write into a DiskError that names file and cause.
Standard library only.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import DiskError

NUMBERS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO),  # a mount or a disk that is gone
)
"""Errors that a disk causes, and no mistake in a program or its input."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors and tokenizers write "(os error 28)", pyarrow "[errno 28]", others the C library's text
_NUMBER = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)
_TEXTS = {os.strerror(number): number for number in NUMBERS[:5]}
# torch.save into a path says no more than that it has written less than it wanted
_TORCH = re.compile(
    r"PytorchStreamWriter failed writing|unexpected pos \d+ vs|iostream error|file write failed"
)


def cause(error: BaseException, place: str | Path | None = None) -> str | None:
    """Why a file could not be written, if a disk was the reason.

    Args:
        error: An error of any library; what it was raised from is looked at too.
        place: Where the file was to go, for the space that is left.

    Returns:
        Words for a message; None for an error that no disk has caused.
    """
    number = _number(error)
    if number is None:
        return None
    text = os.strerror(number) if number else "it could not be written completely"
    if number == errno.EFBIG:
        return f"{text} (for this system: ulimit -f, or the largest file of the file system)"
    return f"{text} ({free_text(place)})" if place is not None and number in (*_FULL, 0) else text


def _number(error: BaseException) -> int | None:
    """The error number of a failed write, 0 where a library does not say it; None for another error."""
    seen: set[int] = set()
    current: BaseException | None = error
    unnumbered: int | None = None
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in NUMBERS:
            return current.errno
        text = str(current)
        numbers = [int(found) for found in _NUMBER.findall(text)]
        numbers += [number for words, number in _TEXTS.items() if words in text]
        known = next((number for number in numbers if number in NUMBERS), None)
        if known is not None:
            return known
        if isinstance(current, RuntimeError) and _TORCH.search(text):
            unnumbered = 0
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return unnumbered


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Context in which a failed write becomes one line that names the file; the cause stays attached.

    Args:
        path: What is written: a file, or a folder with files.

    Raises:
        DiskError: It could not be written.
    """
    try:
        yield
    except DiskError:
        raise
    # safetensors, tokenizers and torch have errors of their own for a full disk
    except Exception as error:
        why = cause(error, path)
        if why is None and isinstance(error, OSError):
            why = error.strerror or str(error)
        if why is None:
            raise
        raise DiskError(f"{path} was not written: {why}") from error


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Context that yields a temporary path, whose file gets the name `path` at the end.

    A reader sees the old file or the new one, never half a file. When the block fails, the old one stays.

    Args:
        path: The file, in a folder that exists.

    Raises:
        DiskError: The file could not be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the file is whole; some network file systems cannot do this
        sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all.

    Args:
        path: The file, in a folder that exists.
        text: Its content.

    Raises:
        DiskError: The file could not be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Writes a JSON file, whole or not at all.

    Args:
        path: The file, in a folder that exists.
        value: What JSON can hold.

    Raises:
        DiskError: The file could not be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: str | Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: str | Path) -> None:
    """Flushes a folder, and all files and folders in it, to the disk."""
    for inner in Path(folder).rglob("*"):
        if not inner.is_symlink():
            sync(inner)
    sync(folder)


def free_bytes(place: str | Path) -> int | None:
    """Free bytes where a file would be, which need not exist; None where the system does not say."""
    path = Path(place).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def free_text(place: str | Path) -> str:
    """How much is free where a file would be, in words."""
    free = free_bytes(place)
    return "it is not known how much is free" if free is None else f"{size_text(free)} free"


def size_text(count: float) -> str:
    """A number of bytes as 532 bytes, 7.1 kB, 1.2 MB, 3.4 GB or 5.6 TB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def copy_folder(source: Path, target: Path) -> None:
    """Copies a folder, whole or not at all.

    Args:
        source: The folder.
        target: Where the copy is to be; nothing is there yet.

    Raises:
        DiskError: The copy could not be written; nothing is left of it.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(target):
        shutil.copytree(source, temporary)
        sync_all(temporary)
        temporary.rename(target)
