"""What a run depends on and writes down beside its settings: versions, device, git commit, where an earlier
run was set aside.
"""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from ..version import __version__

PACKAGES = ("torch", "transformers", "deepspeed", "triton", "tokenizers", "datasets", "peft", "numpy")


def set_aside_by(folder):
    """Where the unfinished run lies that this folder's run took the place of; None when there was none to
    keep.
    """
    return read_json(Path(folder).expanduser() / "started.json").get("set_aside")


def read_json(path):
    """Returns a JSON file's mapping; an empty one when there is none that can be read."""
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return done if isinstance(done, dict) else {}


def versions(cfg=None):
    """Returns what a run depends on besides its settings: versions, device, seed, git commit."""
    found = {
        "saferlhf-fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {
        **found,
        "device": _device(),
        "processes": process_count(),
        "seed": getattr(cfg, "seed", None),
        "git_commit": git_commit(),
    }


def process_count():
    return int(os.environ.get("WORLD_SIZE", "1"))


def _device():
    """Names the device when torch is loaded; it is never imported for this."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def git_commit():
    """Returns the commit of the checkout that this package runs from, "-dirty" when it has changes; else
    None.
    """
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():  # installed: a repository further up would be someone else's
        return None
    try:

        def git(*words):
            return subprocess.run(
                ["git", "-C", str(checkout), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()

        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path, value):
    """Writes JSON so that a reader sees the old file or the new one, never a half."""
    write_text(Path(path), json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path, text):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
