"""How a part of the GPU window can end other than well, and where what it leaves is kept."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "gpu_window"  # an ignored folder: `again` reads there what the first command found


class OutOfTime(Exception):
    """The section's time is up."""


class NotRun(Exception):
    """Something that cannot run here; the text is the reason."""


class Dead(Exception):
    """A kernel has broken the device's context: only a new process can go on."""


class Stop(Exception):
    """Nothing that follows would mean anything."""


def describe(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
