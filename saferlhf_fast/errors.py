"""The one exception for mistakes of the caller: bad recipes, bad data, bad folders.

The command line turns it into a single line and exit code 2 (`--debug` shows the traceback). It is a
ValueError, so that library users catch what they expect. Any other exception is a bug in this package.
"""

import sys
from importlib import util

EXIT_CODE = 2


class UserError(ValueError):
    """Bad input: the message names the file, row or field, what was expected and what it got, in one line."""


class NonFinite(UserError):
    """A loss or a gradient is NaN or infinite; the step that found it is not taken."""


class DiskError(UserError):
    """A file could not be written: the disk is full, damaged, read-only or gone; no mistake in the input."""


class MissingExtra(UserError, ImportError):
    """Packages that are needed are not installed; the message names the extra that installs them."""


def require(what: str, extra: str, *names: str) -> None:
    """Checks that packages are installed, without importing them.

    Args:
        what: What needs them, for the message.
        extra: The extra of this package that installs them.
        names: Names under which they are imported.

    Raises:
        MissingExtra: One of them is not installed.
    """
    # find_spec raises ValueError for a name that is set to None in sys.modules.
    missing = [name for name in names if sys.modules.get(name, ...) is None or util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{what} needs {', '.join(missing)}: pip install 'saferlhf-fast[{extra}]'")
