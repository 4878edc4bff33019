"""What a command says when a disk ends it: what was not written and why, what is saved where, how to go on.

    error: runs/lag/model was not written: No space left on device (0 bytes free); saved: the checkpoint
    of step 350 in runs/lag/checkpoints/step-00000350; once the disk takes files again: saferlhf-fast ppo-lag
    recipe.yaml resume=auto

Standard library only.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from saferlhf_fast.config import redact
from saferlhf_fast.config.overrides import split_words
from saferlhf_fast.config.stage_table import STAGE_SPECS, WITH_SETTINGS
from saferlhf_fast.errors import DiskError
from saferlhf_fast.runtime import disk
from saferlhf_fast.runtime.checkpoint import manifest
from saferlhf_fast.runtime.process_environment import LAUNCHER_PID

SHOWN = 200  # characters of another library's message


def of_run(error: Exception, folder: Path | None) -> DiskError | None:
    """The error that ends a run whose files could not be written, with what the run has saved.

    Args:
        error: What ended the stage.
        folder: Folder of the run; None for a stage without an output.

    Returns:
        None for an error that no disk has caused.
    """
    line = of_command(error, folder)
    return line and DiskError(f"{line}; {saved(folder)}" if folder is not None else str(line))


def of_command(error: Exception, place: Path | None = None) -> DiskError | None:
    """The error that ends a command whose files could not be written.

    Args:
        error: What ended the command.
        place: The folder that it writes into, where that is known.

    Returns:
        None for an error that no disk has caused.
    """
    if isinstance(error, DiskError):
        return error
    why = disk.cause(error, place)
    if why is None:
        return None
    if isinstance(error, OSError) and error.filename:
        return DiskError(f"{error.filename} was not written: {why}")
    text = " ".join(str(error).split())
    text = text if len(text) <= SHOWN else text[:SHOWN] + " …"
    return DiskError(f"a file was not written: {why}: {type(error).__name__}: {text}")


def saved(folder: Path) -> str:
    """What a run has saved, with the paths; only whole models and checkpoints count.

    Args:
        folder: Folder of the run.
    """
    names = ["model", "best", *sorted((path.name for path in folder.glob("step-*")), key=_by_step)]
    things = [f"the model in {folder / name}" for name in names if (folder / name / "config.json").is_file()]
    newest = manifest.newest_committed(folder)
    if newest is not None:
        things.append(f"the checkpoint of step {newest[0]} in {newest[1]}")
    finished = "the run is finished; " if (folder / "finished.json").is_file() else ""
    return finished + (f"saved: {', '.join(things)}" if things else "no model and no checkpoint is saved")


def continuation(command: str, words: Sequence[str], argv: Sequence[str]) -> str:
    """The end of the line: the command that goes on with what is saved, or starts again without anything.

    Args:
        command: The command that ended.
        words: What followed it on the command line, without the options of the command line itself.
        argv: The whole command line.
    """
    argv = list(argv)
    given = split_words(command, words)[1] if command in WITH_SETTINGS else {}
    if command in STAGE_SPECS and "resume" not in given:
        argv.append("resume=auto")
    if command == "demo" and "output" in given and "overwrite" not in given:  # it cannot be resumed
        argv.append("overwrite=true")
    started_by_other = "RANK" in os.environ and LAUNCHER_PID not in os.environ
    under = " (under the same launcher)" if started_by_other else ""
    return f"; once the disk takes files again{under}: {redact.text(shlex.join(['saferlhf-fast', *argv]))}"


def _by_step(name: str) -> int:
    number = name.removeprefix("step-")
    return int(number) if number.isdigit() else -1
