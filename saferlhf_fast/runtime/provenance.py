"""What a run records beside its settings: versions, device, git commit, and where an older run was moved."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ..version import __version__
from .disk import write_json as write_json
from .disk import write_text as write_text

PACKAGES = ("torch", "transformers", "deepspeed", "triton", "tokenizers", "datasets", "peft", "numpy")


def set_aside_by(folder: str | Path) -> str | None:
    """Where the unfinished run is that was set aside for the run in this folder.

    Returns:
        The path; None when no run was set aside.
    """
    return read_json(Path(folder).expanduser() / "started.json").get("set_aside")


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON file's mapping; an empty one when there is no file that can be read as one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def versions(cfg: object = None) -> dict[str, Any]:
    """Returns what a run depends on besides its settings: versions, device, number of processes, git commit.

    Args:
        cfg: A config, whose seed is added.
    """
    packages: dict[str, str | None] = {
        "saferlhf-fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        **packages,
        "device": _device(),
        "processes": process_count(),
        "seed": getattr(cfg, "seed", None),
        "git_commit": git_commit(),
    }


def process_count() -> int:
    """Number of processes of this run, without torch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _device() -> str | None:
    """Name of the device; None while torch is not loaded, which is never imported for this."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def git_commit() -> str | None:
    """Returns the commit of the checkout that this package runs from.

    Returns:
        The hash, with "-dirty" behind it when a tracked file has changes; None outside a checkout.
    """
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():  # installed: a repository further up would be someone else's
        return None
    try:

        def git(*words: str) -> str:
            return subprocess.run(
                ["git", "-C", str(checkout), *words],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=10,
                check=True,
            ).stdout.strip()

        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """The local time, as 2026-01-31T12:30:00+0100."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
