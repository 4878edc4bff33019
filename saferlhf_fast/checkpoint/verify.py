"""Verifying a checkpoint by itself, without a run: for the commands. Standard library only."""

from pathlib import Path

from ..errors import UserError
from . import manifest


def whole(folder):
    """-> the manifest of a checkpoint all of whose files are as they were written; UserError otherwise."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected a checkpoint, e.g. runs/lag/checkpoints/step-00000012")
    values = manifest.read(folder)
    why = manifest.problem(folder, values)
    if why is not None:
        raise UserError(why)
    return values


def newest(path):
    """A checkpoint's folder, or a run's -> the checkpoint's: of a run the newest one that is whole."""
    path = Path(path).expanduser()
    if (path / manifest.NAME).exists() or manifest.step_of(path):
        return path
    found = [folder for _, folder in manifest.listed(path) if manifest.is_committed(folder)]
    if not found:
        raise UserError(f"{path}: expected a checkpoint, or the folder of a run that has some")
    return found[0]
