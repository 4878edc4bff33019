"""Joining the processes of a run and leaving them, and seeding."""

import os
import random
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ..errors import UserError
from . import watchdog
from .collectives import barrier, device, world_size
from .deepspeed_library import imported_deepspeed

if TYPE_CHECKING:
    from ..config.sections import Engine


def start(cfg: "Engine", seed: int) -> None:
    """Joins the processes and seeds this one; every stage calls it first. It may be called several times.

    Every rank gets the same seed, since models and data orders must agree. Sampling has a seed for each
    sequence.

    Args:
        cfg: The engine's settings (threads, timeout).
        seed: Seed of the run.

    Raises:
        UserError: Not all ranks have joined within engine.timeout.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    # There is no launcher, or accelerate has left its variables in a single process, without an address.
    # DeepSpeed would then look for mpi4py.
    alone = (
        "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1" and "MASTER_ADDR" not in os.environ
    )
    if alone:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    deepspeed = imported_deepspeed()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if not torch.distributed.is_initialized():
        _join(deepspeed, cfg.timeout)
    # a child process would take these variables for a launcher's, and use our port
    if alone:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    watchdog.begin(60 * cfg.timeout)
    seed_all(seed)


def _join(deepspeed: Any, minutes: float) -> None:
    """Makes the process group; UserError when not all ranks have joined in time.

    A collective's own time limit is longer than that of the watchdog, which knows which rank is to blame.
    Groups that DeepSpeed makes take the limit from torch's defaults.
    """
    limit = timedelta(minutes=minutes, seconds=30)
    c10d: Any = torch.distributed.distributed_c10d
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = limit
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False, timeout=limit
        )
    except torch.distributed.DistError as error:
        raise UserError(
            f"engine.timeout: expected {world_size()} processes to find each other at "
            f"{os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {minutes:g} minutes, got: {str(error).splitlines()[0]}; "
            "saferlhf-fast info --cluster finds out who is missing"
        ) from error


def started() -> bool:
    """Whether `start` was called in this process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def finish() -> None:
    """Waits for the other ranks at the end of a program.

    The process group is left to end with the process. Destroying it while DeepSpeed still uses it aborted
    about one of ten runs ("terminate called without an active exception", exit code −6).
    """
    if started():
        barrier()
        watchdog.end()


def seed_all(seed: int) -> None:
    """Seeds the generators of Python, numpy and torch."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
