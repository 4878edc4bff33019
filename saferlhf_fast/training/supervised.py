"""The loop of every supervised stage: batches in a fixed global order, one loss, evaluation, saving.

A stage brings a SupervisedTask; the loop owns order, normalisation, logging and stopping. The set of examples
in each optimiser step depends on the seed and the global batch size alone, never on ranks or micro-batches,
and the loss is a sum over examples divided by the global weight, so runs on 1 and 2 processes agree.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config.load import to_dict
from ..config.stage_table import STAGE_SPECS
from ..data.batches import batch_order
from ..errors import UserError
from ..models.packing import pack_into_microbatches
from ..runtime import console, disk, engine
from ..runtime.checkpoint.checkpointer import Checkpoints
from ..runtime.checkpoint.state import ResumableDict
from ..runtime.metrics import Metrics
from .anomalies import LossSpikeMonitor, NonFiniteGuard
from .best_checkpoint import BestCheckpoint
from .disk_space import model_bytes, warn_if_scarce
from .stage_helpers import go_on_without

if TYPE_CHECKING:
    from ..config.sections import Training
    from ..config.stages import DPOConfig, ModerationConfig, PreferenceConfig, SFTConfig

Sums = dict[str, torch.Tensor]
"""Sums over examples by name, 0-d."""


@dataclasses.dataclass(frozen=True)
class SupervisedTask:
    """The parts in which supervised stages differ.

    Attributes:
        weigh: Example -> its weight in the mean: 1 for a pair, its trained tokens for a text.
        loss: (model, examples) -> (sum over examples of weight × loss, weighted sums of other numbers).
        tokens: Example -> tokens that pass through the model.
        save: Writes the model into a folder; every rank calls it.
        write_export_metadata: Writes config and tokenizer into a folder, for exports of checkpoints.
    """

    weigh: Callable[[Any], int]
    loss: Callable[[Any, Sequence[Any]], tuple[torch.Tensor, Sums]]
    tokens: Callable[[Any], int]
    save: Callable[[Path], None]
    write_export_metadata: Callable[[Path], None] | None = None


def total_steps(n: int, train: "Training", world: int) -> int:
    """Number of optimiser steps of a run over n examples on `world` ranks.

    Args:
        n: Number of training examples.
        train: Batch size, epochs and the limit of steps.
        world: Number of ranks.
    """
    per_epoch = math.ceil(n / global_size(train, world))
    steps = max(1, math.ceil(train.epochs * per_epoch))
    return min(steps, train.max_steps) if train.max_steps else steps


def epochs_after(step: int, n: int, size: int) -> float:
    """Number of epochs after some optimiser steps; the last step of an epoch may have fewer examples.

    Args:
        step: Steps done.
        n: How many examples there are.
        size: Examples of a step, on all ranks together.
    """
    whole, rest = divmod(step, math.ceil(n / size))
    return whole + rest * size / n


def global_size(train: "Training", world: int) -> int:
    """Examples of one optimiser step, over all ranks and micro-batches."""
    return train.batch_size * train.accumulation * world


def train_supervised(
    model: engine.Engine,
    task: SupervisedTask,
    examples: Sequence[Any],
    held_out: Sequence[Any],
    cfg: "SFTConfig | PreferenceConfig | DPOConfig | ModerationConfig",
    folder: Path,
    label: str,
) -> dict[str, Any]:
    """Trains a model, and leaves the kept weights in folder/model; every rank must call it.

    With `cfg.resume` it resumes from a checkpoint in the folder.

    Args:
        model: The engine of the model.
        task: What the stage brings.
        examples: Examples to train on.
        held_out: Examples to evaluate on; may be empty.
        cfg: Settings of the stage.
        folder: Folder of the run.
        label: Name of the stage.

    Returns:
        steps, train/loss, skipped_steps, and the evaluation of the kept weights (eval/…).

    Raises:
        NonFinite: If too many steps in a row gave numbers that are not finite.
    """
    train, world = cfg.train, engine.world_size()
    steps, size = total_steps(len(examples), train, world), global_size(train, world)
    budget = train.pass_tokens(STAGE_SPECS[label].sequences)
    metrics = Metrics(folder, cfg.log, to_dict(cfg), label)
    best, guard = best_of(train.best_metric, task, folder), NonFiniteGuard(min(cfg.engine.max_skips, steps))
    latest, spikes = ResumableDict(last={}, loss=float("nan")), LossSpikeMonitor(("loss",))
    # the names are those in checkpoints
    state: dict[str, Any] = {"best": best, "skips": guard, "known": latest, "metrics": metrics}
    with (
        Checkpoints(
            cfg, label, folder, {"model": model}, state, {"model": task.write_export_metadata}
        ) as checkpoints,
        console.track(steps, label, cfg.log.progress) as bar,
    ):
        start = checkpoints.resume()
        warn_if_scarce(folder, cfg.checkpoint, [model], _kept(model, train, steps - start), steps - start)
        bar.begin_at(start)
        batches = islice(_endless_batches(len(examples), size, cfg.seed), start, None)
        for step, indices in zip(range(start + 1, steps + 1), batches):
            batch = [examples[i] for i in indices]
            values, bad = train_step(model, task, batch, budget)
            guard.note(step, bad, lambda: save_batch(batch, folder, step))  # noqa: B023 (called at once)
            latest["loss"] = values["loss"]
            if step % cfg.log.interval == 0 or step == steps or bad:
                epoch = epochs_after(step, len(examples), size)
                metrics.log(step, {**{f"train/{k}": v for k, v in values.items()}, "train/epoch": epoch})
            spikes.look(step, values)
            score = None
            if held_out and (step == steps or (train.eval_interval and step % train.eval_interval == 0)):
                latest["last"] = evaluate(model, task, held_out, budget)
                metrics.log(step, latest["last"])
                go_on_without(lambda: best.offer(step, latest["last"]), cfg.checkpoint.required)  # noqa: B023
                score = score_of(latest["last"], train.best_metric or "eval/loss")
            if train.save_interval and step % train.save_interval == 0 and step < steps:
                go_on_without(lambda: task.save(folder / f"step-{step}"), cfg.checkpoint.required)  # noqa: B023
            bar.advance(tokens=sum(task.tokens(e) for e in batch), line=_line(values))
            checkpoints.after_step(step, score)
        checkpoints.finish()
    kept = settle(best, latest["last"], task, folder)
    if guard.total:
        console.warn(f"{guard.total} of {steps} steps were left out: their numbers were not finite")
    metrics.close()
    return {"steps": steps, "train/loss": latest["loss"], "skipped_steps": guard.total, **kept}


def _kept(model: engine.Engine, train: "Training", steps: int) -> list[int]:
    """Bytes of the model folders that a run of so many steps writes: the last, the best, the ones between."""
    between = (steps - 1) // train.save_interval if train.save_interval else 0
    return [model_bytes(model)] * (1 + (train.best_metric is not None) + between)


def train_step(
    model: engine.Engine, task: SupervisedTask, batch: Sequence[Any], budget: int
) -> tuple[dict[str, float], list[str]]:
    """Takes one optimiser step on a global batch; one device read before the step and one after it.

    Args:
        model: The engine of the model.
        task: What the stage brings.
        batch: The examples of all ranks.
        budget: Most tokens of a forward pass.

    Returns:
        (loss, grad_norm, lr and the task's numbers; names of what was not finite), the same on all ranks.
        When something was not finite, the step is skipped on all ranks.
    """
    model.train()
    sums = over_passes(model, task, batch, budget, sum(task.weigh(e) for e in batch), train=True)
    bad = engine.not_finite({"loss": sums["loss"], "gradient norm": model.local_norm()})
    if bad:
        lr = model.lr
        model.discard()
        return {**_read(sums, float("nan")), "lr": lr}, bad
    step_values = model.step()
    if step_values["skipped"]:
        bad = ["gradient norm"]
    return {**_read(sums, step_values["grad_norm"]), "lr": step_values["lr"]}, bad


@torch.no_grad()
def evaluate(
    model: engine.Engine, task: SupervisedTask, examples: Sequence[Any], budget: int
) -> dict[str, float]:
    """Weighted means over examples of all ranks: eval/loss, and the task's numbers as eval/<name>.

    Args:
        model: The engine of the model.
        task: What the stage brings.
        examples: The examples to evaluate on.
        budget: Most tokens of a forward pass.
    """
    model.train(False)
    sums = over_passes(model, task, examples, budget, sum(task.weigh(e) for e in examples), train=False)
    return {f"eval/{name}": value for name, value in _read(sums).items()}


def over_passes(
    model: engine.Engine,
    task: SupervisedTask,
    batch: Sequence[Any],
    budget: int,
    weight: int,
    train: bool,
) -> Sums:
    """Runs the forward passes of this rank's share of a batch and, in training, their backward passes.

    A rank that has no example in a pass repeats the shortest one at weight zero, because the other ranks wait
    for it in collectives.

    Args:
        model: The engine of the model.
        task: What the stage brings.
        batch: The examples of all ranks.
        budget: Most tokens of a pass.
        weight: Sum of the weights of all examples, by which everything is divided.
        train: True to run the backward passes.

    Returns:
        This rank's share of the batch's means: loss, and the task's numbers.
    """
    lengths = [task.tokens(e) for e in batch]
    shortest = batch[min(range(len(batch)), key=lengths.__getitem__)]
    sums: Sums = {}
    for indices in pack_into_microbatches(lengths, budget, engine.world_size())[engine.rank()]:
        loss, stats = task.loss(model, [batch[i] for i in indices] or [shortest])
        scale = (1.0 if indices else 0.0) / weight
        if train:
            model.backward(loss * scale)
        for name, value in {"loss": loss, **stats}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().float() * scale
    return sums


def _read(sums: Sums, grad_norm: torch.Tensor | float | None = None) -> dict[str, float]:
    """Adds up over ranks and reads the device once; grad_norm is the same on all ranks."""
    names = list(sums)
    packed = engine.all_reduce(torch.stack([sums[name] for name in names]))
    if grad_norm is None:
        return with_deviation(dict(zip(names, packed.tolist())))
    norm_1 = torch.as_tensor(grad_norm, dtype=torch.float32, device=packed.device).reshape(1)
    *values, norm = torch.cat([packed, norm_1]).tolist()
    return {**with_deviation(dict(zip(names, values))), "grad_norm": norm}


def with_deviation(values: Mapping[str, float]) -> dict[str, float]:
    """The same numbers, with x_std in place of each mean square x_square, whose mean is x_mean."""
    out = dict(values)
    for name in [n for n in values if n.endswith("_square")]:
        stem = name.removesuffix("_square")
        out[f"{stem}_std"] = max(0.0, out.pop(name) - out[f"{stem}_mean"] ** 2) ** 0.5
    return out


def best_of(metric: str | None, task: SupervisedTask, folder: str | Path) -> BestCheckpoint:
    """A BestCheckpoint that keeps the weights of the best evaluation by a metric in folder/best.

    Without a metric it keeps none.
    """

    def save_best() -> None:
        # on disk alone: a checkpoint of the run names the step, not the weights
        task.save(Path(folder) / "best")

    return BestCheckpoint(lambda values: score_of(values, metric), None if metric is None else save_best)


def settle(
    best: BestCheckpoint, last: Mapping[str, float], task: SupervisedTask, folder: str | Path
) -> dict[str, Any]:
    """Leaves the kept weights in folder/model; every rank must call it.

    Args:
        best: The best evaluation, with or without weights in folder/best.
        last: The last evaluation of the run.
        task: What the stage brings; it saves the model.
        folder: Folder of the run.

    Returns:
        The evaluation of the kept weights, and `best_step` when they are not the last ones.
    """
    folder = Path(folder)
    if best.keep is None or best.step is None:
        task.save(folder / "model")
        return dict(last)
    has_best, has_model = engine.gather_objects([(folder / name).exists() for name in ("best", "model")])[0]
    if not (has_best or has_model):
        console.warn(
            f"the best weights (step {best.step}) are gone from {folder / 'best'}; the last ones are kept"
        )
        task.save(folder / "model")
        return dict(last)
    if engine.rank() == 0 and has_best:  # else a run that was killed here had moved it
        shutil.rmtree(folder / "model", ignore_errors=True)
        (folder / "best").rename(folder / "model")
    engine.barrier()
    return {**best.evaluation, "best_step": best.step}


def score_of(values: Mapping[str, float], metric: str | None) -> tuple[float, ...]:
    """An evaluation's score by a metric, higher is better, as BestCheckpoint and checkpoints take it.

    Raises:
        UserError: If the evaluation has no such metric.
    """
    if metric is None or metric not in values:
        raise UserError(f"train.best_metric: expected one of {', '.join(sorted(values))}, got {metric}")
    return (-values[metric] if "loss" in metric else values[metric],)


def save_batch(batch: Sequence[Any], folder: str | Path, step: int) -> Path:
    """Writes the examples of a global batch, on rank 0, and returns the file's path."""
    path = Path(folder) / f"nonfinite_batch_step{step}.jsonl"
    if engine.rank() == 0:
        lines = (json.dumps(dataclasses.asdict(example), default=str) + "\n" for example in batch)
        disk.write_text(path, "".join(lines))
    return path


def _endless_batches(n: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yields the indices of each global batch, epoch after epoch."""
    epoch = 0
    while True:
        yield from batch_order(n, size, seed, epoch)
        epoch += 1


def _line(values: Mapping[str, float]) -> str:
    shown = ["loss", "accuracy", "accuracy_sign", "reward_accuracy"]
    return "  ".join(f"{name} {values[name]:.4f}" for name in shown if name in values)
