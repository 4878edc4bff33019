"""A trained model's part of a checkpoint: DeepSpeed writes and reads it, through `CheckpointWriter` and
within the allow-list.
"""

import contextlib
import os

from ...config import redact
from . import safe_pickle
from .writer import CheckpointWriter


def save(model, folder, name, files):
    """Writes an engine's weights, optimiser, schedule and counters; every rank must call it. files: a
    `CheckpointWriter` of the folder.
    """
    deepspeed = model.deepspeed
    deepspeed.checkpoint_engine = files
    deepspeed.config = redact.values(deepspeed.config)  # it is written into every shard
    # a script of DeepSpeed's beside each checkpoint
    deepspeed._copy_recovery_script = lambda folder: None
    with _quiet():
        deepspeed.save_checkpoint(str(folder), tag=name, save_latest=False)


def load(model, folder, name, universal=False):
    """Gives an engine that has not stepped yet the state that `save` wrote; every rank must call it.

    universal: the folder is one of `checkpoint convert`, for any number of processes.
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
def _quiet():
    """Without what DeepSpeed prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
