"""A trained model in a checkpoint: DeepSpeed's files, written by writer.py and read by safe_pickle.py."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...config import redact
from . import safe_pickle
from .writer import CheckpointWriter

if TYPE_CHECKING:
    from ..engine import Engine


def save(model: "Engine", folder: Path, name: str, files: CheckpointWriter) -> None:
    """Writes an engine's weights, optimiser, schedule and counters; every rank must call it.

    Args:
        model: The trained model.
        folder: The checkpoint's folder.
        name: The model's name, and that of its folder in the checkpoint.
        files: The writer of that folder.
    """
    deepspeed = model.deepspeed
    deepspeed.checkpoint_engine = files
    deepspeed.config = redact.values(deepspeed.config)  # it is written into every shard
    # DeepSpeed would copy a script of its own beside each checkpoint
    deepspeed._copy_recovery_script = lambda folder: None
    with _quiet():
        deepspeed.save_checkpoint(str(folder), tag=name, save_latest=False)


def load(model: "Engine", folder: Path, name: str, universal: bool = False) -> None:
    """Restores the state that `save` wrote; every rank must call it.

    Args:
        model: An engine that has made no step yet.
        folder: The checkpoint's folder.
        name: The model's name in the checkpoint.
        universal: The folder comes from `checkpoint convert`, for any number of processes.

    Raises:
        FileNotFoundError: The checkpoint has no such model.
        UserError: A file names code that does not belong in a checkpoint.
    """
    deepspeed = model.deepspeed
    deepspeed.checkpoint_engine = CheckpointWriter(folder)
    deepspeed._config.load_universal_checkpoint = universal
    try:
        with safe_pickle.guarded(), _quiet():
            path, _ = deepspeed.load_checkpoint(str(folder), tag=name)
    finally:
        deepspeed._config.load_universal_checkpoint = False
    if path is None:
        raise FileNotFoundError(f"{folder}/{name}: nothing to load")
    model.skipped_steps = deepspeed.skipped_steps


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context without what DeepSpeed prints."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
