"""The one exception for mistakes of the caller's: bad recipes, bad data, bad folders.

The command line turns it into a single line and exit code 2 (`--debug` shows the traceback). It is a
ValueError, so that library users catch what they expect. Everything else that is raised is a bug of ours.
"""

import sys
from importlib import util

EXIT_CODE = 2


class UserError(ValueError):
    """Bad input: the message names the file, row or field, what was expected and what came, in one line."""


class NonFinite(UserError):
    """A loss or a gradient is NaN or infinite; the step that found it is not taken."""


class MissingExtra(UserError, ImportError):
    """Packages that a part of the project needs are not installed; the message names the extra that brings
    them.
    """


def require(what, extra, *names):
    """MissingExtra when one of the packages `names`, which `what` needs, is not installed; nothing is
    imported.
    """
    # find_spec raises ValueError for a name that is set to None in sys.modules.
    missing = [name for name in names if sys.modules.get(name, ...) is None or util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{what} needs {', '.join(missing)}: pip install 'saferlhf-fast[{extra}]'")
