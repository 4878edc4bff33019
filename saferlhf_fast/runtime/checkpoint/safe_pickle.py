"""Loading what DeepSpeed wrote without running it: a pickle may name the classes below and nothing else.

DeepSpeed calls `torch.load(weights_only=False)` wherever it reads a checkpoint, which runs whatever code the
file names. Within `guarded()` every torch.load of this process uses weights_only=True and this list.
"""

import contextlib
import pickle
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError

ALLOWED = (
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)
"""What DeepSpeed's shards of ZeRO 0 to 3 hold besides tensors and plain containers: numbers and positions."""


def load(path: str | Path, **options: Any) -> Any:
    """Reads a file as torch.load does, if it names no code but ALLOWED and tensors.

    Args:
        path: The file.
        **options: For torch.load; map_location is the CPU when not given, and weights_only is always True.

    Returns:
        What the file holds.

    Raises:
        UserError: The file names other code, which was not run; the message says which file and what code.
    """
    from ..deepspeed_library import imported_deepspeed

    imported_deepspeed()
    options = {"map_location": "cpu", **options, "weights_only": True}
    allowed = [
        getattr(import_module(module), name) for module, name in (entry.split(":") for entry in ALLOWED)
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            return _TORCH_LOAD(path, **options)
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), str(error)
        )
        raise UserError(
            f"{path} asks for code that a checkpoint has no need of, which was not run: "
            f"{' '.join(reason.split())[:240]}"
        ) from error


_TORCH_LOAD = torch.load


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Context in which every torch.load, DeepSpeed's too, is `load`."""
    before, torch.load = (
        torch.load,
        lambda f, *positional, **options: load(f, **_named(positional), **options),
    )
    try:
        yield
    finally:
        torch.load = before


def _named(positional: tuple[Any, ...]) -> dict[str, Any]:
    """torch.load's positional arguments after the file, by name."""
    return {"map_location": positional[0]} if positional else {}
