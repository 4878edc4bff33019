"""How a part of the GPU window can fail, and where its rows are stored."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "gpu_window"  # ignored by git: `again` reads the first command's rows there


class OutOfTime(Exception):
    """The section's time is over."""


class NotRun(Exception):
    """Something that cannot run here; the text is the reason."""


class Dead(Exception):
    """A kernel has broken the device's context: only a new process can continue."""


class Stop(Exception):
    """The following sections would be meaningless."""


def describe(error):
    """Returns an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
