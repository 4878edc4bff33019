"""Verifies checkpoints without a run, for the commands. Standard library only."""

from pathlib import Path
from typing import Any

from ...errors import UserError
from ...runtime.checkpoint import manifest


def whole(folder: str | Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint all of whose files are as they were written.

    Raises:
        UserError: There is no such folder, or a file is missing or damaged.
    """
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


def newest(path: str | Path) -> Path:
    """Returns the folder of a checkpoint: of a run, that of its newest one without damage.

    Args:
        path: The folder of a checkpoint, which is returned unchecked, or of a run.

    Raises:
        UserError: The run has no checkpoint without damage.
    """
    path = Path(path).expanduser().resolve()
    if (path / manifest.NAME).exists() or manifest.step_of(path):
        return path
    problems = []
    for _, folder in manifest.listed(path):
        step_and_universal = manifest.step_of(folder)
        if step_and_universal is not None and step_and_universal[1]:  # converted: its source is taken
            continue
        try:
            whole(folder)
            return folder
        except UserError as error:
            problems.append(str(error))
    raise UserError(
        f"{path}: expected a checkpoint, or the folder of a run that has a whole one"
        + (f"; {'; '.join(problems)}" if problems else "")
    )
