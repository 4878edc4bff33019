"""Importing DeepSpeed without what it prints, logs and compiles on the way."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch


def imported_deepspeed() -> Any:
    """The module deepspeed, set up for this package; no process group is needed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed announces each engine at INFO; its warnings still come through.
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has replaced; a user can do nothing about it.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(_is_relevant)
    if not torch.cuda.is_available():
        # On a CPU, init_distributed compiles shared-memory collectives for 35 s; gloo does without them. The
        # entry must be set before DeepSpeed reads it: reading it would try the compiler on every op, and
        # print its complaints.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed


def _is_relevant(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's warning that it has not tested our optimiser with ZeRO.

    tests/runtime/test_optimizers.py tests it.
    """
    return "untested optimizer" not in record.getMessage()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without what DeepSpeed prints and warns about; what it writes to stderr stays."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
