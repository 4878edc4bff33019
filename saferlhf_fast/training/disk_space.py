"""Whether a disk has room for what a run will save: a warning before the first step, with both numbers.

What is counted: the models that are kept (the last one, the best one, one for each save_interval), and as
many checkpoints as there are at once. A checkpoint has the weights as they are trained, and for each trained
weight two moments of the optimiser in fp32, and its fp32 copy where training has another precision or ZeRO
shards it. Other files are small. The space of files that the run will delete is not counted.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime import console, disk, engine
from ..runtime.checkpoint import manifest

if TYPE_CHECKING:
    from ..config.sections import Checkpoint


def model_bytes(model: engine.Engine) -> int:
    """Bytes of a model's weights, as its folder has them."""
    return _weights(model)[0] * _width(model)


def checkpoint_bytes(model: engine.Engine) -> int:
    """About how many bytes a model has in a checkpoint."""
    total, trained = _weights(model)
    copy = 4 if model.zero_stage or model.precision != "float32" else 0
    return total * _width(model) + trained * (8 + copy)


def checkpoints_at_once(settings: "Checkpoint", steps: int) -> int:
    """Most checkpoints that are on the disk at one time: a new one is written before old ones are deleted.

    Args:
        settings: When checkpoints are written, and how many are kept.
        steps: Steps that the run will make.
    """
    most = settings.keep + 1 + settings.keep_best
    by_interval = steps // settings.interval if settings.interval else 0
    return most if settings.minutes else min(most, by_interval)


def warn_if_scarce(
    folder: Path, settings: "Checkpoint", models: Iterable[engine.Engine], kept: list[int], steps: int
) -> None:
    """Warns, on rank 0, when less is free than the run may need.

    Args:
        folder: Folder of the run.
        settings: When checkpoints are written, and how many are kept.
        models: The trained models.
        kept: Bytes of each model folder that the run will leave or write beside another.
        steps: Steps that the run will make.
    """
    free = disk.free_bytes(folder)
    if engine.rank() != 0 or free is None:
        return
    there = sum(manifest.is_committed(path) for _, path in manifest.listed(folder))
    number = max(0, checkpoints_at_once(settings, steps) - there)
    one = sum(map(checkpoint_bytes, models))
    needed = sum(kept) + number * one
    if needed <= free:
        return
    console.warn(
        f"{folder}: {disk.size_text(free)} are free, the run may need {disk.size_text(needed)}: {len(kept)} "
        f"model(s) with {disk.size_text(sum(kept))}, {number} checkpoint(s) of {disk.size_text(one)} "
        "(checkpoint.keep, keep_best, and the one that is being written)"
    )


def _weights(model: engine.Engine) -> tuple[int, int]:
    """How many weights a model has, and how many of them are trained."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _width(model: engine.Engine) -> int:
    """Bytes of a weight."""
    return 4 if model.precision == "float32" else 2
