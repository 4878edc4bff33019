"""Output on terminals of any encoding: characters that it does not have are written in ASCII.

Output into a file on a full disk is lost there; the command goes on. The standard library only, as the
command line's help needs it.
"""

import codecs
import contextlib
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any

from . import disk

HANDLER = "saferlhf-readable"
"""The name of the error handler for Python's encoders."""

SPELLED = {
    **{"…": "...", "–": "-", "—": "-", "−": "-", "‑": "-", "×": "x", "·": "*", "•": "*", "±": "+-"},
    **{"²": "^2", "³": "^3", "½": "1/2", "ᵀ": "^T", "√": "sqrt", "∝": "~", "≈": "~", "∞": "infinity"},
    **{"≤": "<=", "≥": ">=", "≠": "!=", "→": "->", "←": "<-", "⏎": "\\n", "✓": "yes", "✗": "no"},
    **{"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\xa0": " "},
    **{"µ": "u", "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta"},
    **{"λ": "lambda", "μ": "mu", "ν": "nu", "π": "pi", "ρ": "rho", "σ": "sigma"},
    **{"Δ": "Delta", "Σ": "sum", "│": "|", "┃": "|", "─": "-", "━": "-", "═": "="},
}
"""Characters of this package's own texts; all others are written as escapes, such as \\xe9."""


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Returns (ASCII for the characters that cannot be encoded, where to go on), as codecs asks for."""
    assert isinstance(error, UnicodeEncodeError), f"only encoders use this handler, got {error!r}"
    characters = error.object[error.start : error.end]
    return "".join(SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters), (
        error.end
    )


def make_readable(*streams: Any) -> None:
    """Lets text streams write every character: in their encoding, or else in ASCII.

    Args:
        streams: Such as sys.stdout; what is no stream of an encoding stays as it is.
    """
    codecs.register_error(HANDLER, _readable)
    for stream in streams:
        if hasattr(stream, "reconfigure") and not getattr(stream, "closed", True):
            stream.reconfigure(errors=HANDLER)


class _LossyFile:
    """The file under an output stream: what its disk does not take is lost, and no error says so."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.closed, self.lost = descriptor, False, 0

    def write(self, data: Any) -> int:
        try:
            return os.write(self.descriptor, data)
        except OSError as error:
            if error.errno not in disk.NUMBERS:
                raise
            self.lost += len(data)
            return len(data)

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.descriptor

    def flush(self) -> None:
        """Nothing is kept here."""

    def close(self) -> None:
        """The descriptor stays open: others write to it too."""
        self.closed = True


@contextlib.contextmanager
def outliving_full_disks() -> Iterator[Callable[[], int]]:
    """Context in which stdout and stderr may be files on a full disk, as in `saferlhf-fast sft … > log`.

    It yields a function that returns how many bytes of stdout are lost.
    """
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    lossy: dict[str, Any] = {}
    files: dict[str, _LossyFile] = {}

    def lost() -> int:
        for stream in lossy.values():
            stream.flush()
        return files["stdout"].lost if "stdout" in files else 0

    try:
        for name, stream in before.items():
            if _is_file(stream):
                stream.flush()
                raw: Any = _LossyFile(stream.fileno())
                files[name] = raw
                lossy[name] = io.TextIOWrapper(
                    io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=name == "stderr"
                )
                setattr(sys, name, lossy[name])
        yield lost
    finally:
        for name, stream in lossy.items():
            stream.flush()
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])


def _is_file(stream: Any) -> bool:
    """Whether a stream writes into a file, or a device that is no terminal."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
        return stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False
