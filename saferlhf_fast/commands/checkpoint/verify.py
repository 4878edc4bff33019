"""Verifying a checkpoint by itself, without a run: for the commands. Standard library only."""

from pathlib import Path

from ...errors import UserError
from ...runtime.checkpoint import manifest


def whole(folder):
    """-> the manifest of a checkpoint all of whose files are as they were written; UserError otherwise."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder; expected a checkpoint, e.g. runs/lag/checkpoints/step-00000012"
        )
    values = manifest.read(folder)
    why = manifest.problem(folder, values)
    if why is not None:
        raise UserError(why)
    return values


def newest(path):
    """A checkpoint's folder, or a run's -> the checkpoint's: of a run the newest one that is whole."""
    path = Path(path).expanduser().resolve()
    if (path / manifest.NAME).exists() or manifest.step_of(path):
        return path
    passed = []
    for _, folder in manifest.listed(path):
        if manifest.step_of(folder)[1]:  # converted: the one that it was made from is meant
            continue
        try:
            whole(folder)
            return folder
        except UserError as error:
            passed.append(str(error))
    raise UserError(
        f"{path}: expected a checkpoint, or the folder of a run that has a whole one"
        + (f"; {'; '.join(passed)}" if passed else "")
    )
