"""The loop of every supervised stage: batches in a fixed global order, one loss, evaluation, saving.

A stage brings a SupervisedTask; the loop owns order, normalisation, logging and stopping. The set of examples
in each optimiser step depends on the seed and the global batch size alone, never on ranks or micro-batches,
and the loss is a sum over examples divided by the global weight, so runs on 1 and 2 processes agree.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from ..config.stage_table import STAGE_SPECS
from ..data.batches import global_batches
from ..errors import UserError
from ..models.packing import pack_into_microbatches
from ..runtime import console, engine
from ..runtime.checkpoint.checkpointer import Checkpoints, ResumableDict
from .anomalies import LossSpikeMonitor, NonFiniteGuard
from .best_checkpoint import BestCheckpoint


@dataclasses.dataclass(frozen=True)
class SupervisedTask:
    """What a supervised stage is made of."""

    weigh: Callable  # example -> its weight in the mean: 1 for a pair, its trained tokens for a text
    loss: Callable  # (model, examples) -> (sum over examples of weight × loss, {name: weighted sum})
    tokens: Callable  # example -> tokens that pass through the model
    save: Callable  # folder -> None; every rank calls it
    # folder -> None; writes config and tokenizer, for exports of checkpoints
    write_export_metadata: Callable | None = None


def total_steps(n, train, world):
    """Optimiser steps of a run over n examples."""
    per_epoch = math.ceil(n / global_size(train, world))
    steps = max(1, math.ceil(train.epochs * per_epoch))
    return min(steps, train.max_steps) if train.max_steps else steps


def global_size(train, world):
    """Examples of one optimiser step, over all ranks and micro-batches."""
    return train.batch_size * train.accumulation * world


def train_supervised(model, task, examples, held_out, cfg, folder, metrics, label):
    """Trains an engine -> {"steps", "train/loss", "eval/…"} of the kept weights, which lie in folder/model.

    label: the stage's name. With cfg.resume it goes on from a checkpoint in the folder.
    """
    train, world = cfg.train, engine.world_size()
    steps = total_steps(len(examples), train, world)
    size = global_size(train, world)
    budget = train.pass_tokens(STAGE_SPECS[label].sequences)
    best, skips = best_of(train.best_metric, task, folder), NonFiniteGuard(min(cfg.engine.max_skips, steps))
    known, spikes = ResumableDict(last={}, loss=float("nan")), LossSpikeMonitor(("loss",))
    state = {"best": best, "skips": skips, "known": known, "metrics": metrics}
    with (
        Checkpoints(
            cfg, label, folder, {"model": model}, state, {"model": task.write_export_metadata}
        ) as checkpoints,
        console.track(steps, label, cfg.log.progress) as bar,
    ):
        start = checkpoints.resume()
        bar.begin_at(start)
        order = islice(_endless(len(examples), size, cfg.seed), start, None)
        for step in range(start + 1, steps + 1):
            batch = [examples[i] for i in next(order)]
            values, bad = train_step(model, task, batch, budget)
            skips.note(step, bad, lambda: save_batch(batch, folder, step))  # noqa: B023 (called at once)
            known["loss"] = values["loss"]
            if step % cfg.log.interval == 0 or step == steps or bad:
                epoch = step * size / len(examples)
                metrics.log(step, {**{f"train/{k}": v for k, v in values.items()}, "train/epoch": epoch})
            spikes.look(step, values)
            score = None
            if held_out and (step == steps or (train.eval_interval and step % train.eval_interval == 0)):
                known["last"] = evaluate(model, task, held_out, budget)
                metrics.log(step, known["last"])
                best.offer(step, known["last"])
                score = score_of(known["last"], train.best_metric or "eval/loss")
            if train.save_interval and step % train.save_interval == 0 and step < steps:
                task.save(Path(folder) / f"step-{step}")
            bar.advance(tokens=sum(task.tokens(e) for e in batch), line=_line(values))
            checkpoints.after_step(step, score)
        checkpoints.finish()
    kept = settle(best, known["last"], task, folder)
    if skips.total:
        console.warn(f"{skips.total} of {steps} steps were left out: their numbers were not finite")
    return {"steps": steps, "train/loss": known["loss"], "skipped_steps": skips.total, **kept}


def train_step(model, task, batch, budget):
    """One optimiser step over a global batch -> ({"loss", "grad_norm", "lr", …}, [what was not finite]), the
    same on all ranks.

    A step in which something was not finite is left out on all of them. One read of the device before the
    step and one after it. budget: most tokens of a forward pass.
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
def evaluate(model, task, examples, budget):
    """Weighted means over examples, all ranks -> {"eval/loss": …, "eval/accuracy": …}."""
    model.train(False)
    sums = over_passes(model, task, examples, budget, sum(task.weigh(e) for e in examples), train=False)
    return {f"eval/{name}": value for name, value in _read(sums).items()}


def over_passes(model, task, batch, budget, weight, train):
    """Runs this rank's share of a batch, and its backward -> this rank's {"loss", …} divided by the global
    weight.

    A rank that has nothing in a pass repeats the shortest example at weight zero: collectives wait for
    everyone.
    """
    lengths = [task.tokens(e) for e in batch]
    shortest = batch[min(range(len(batch)), key=lengths.__getitem__)]
    sums = {}
    for mine in pack_into_microbatches(lengths, budget, engine.world_size())[engine.rank()]:
        loss, stats = task.loss(model, [batch[i] for i in mine] or [shortest])
        scale = (1.0 if mine else 0.0) / weight
        if train:
            model.backward(loss * scale)
        for name, value in {"loss": loss, **stats}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().float() * scale
    return sums


def _read(sums, grad_norm=None):
    """Adds up over ranks -> floats, with deviations; grad_norm: the same on all ranks."""
    names = list(sums)
    packed = engine.all_reduce(torch.stack([sums[name] for name in names]))
    if grad_norm is None:
        return with_deviation(dict(zip(names, packed.tolist())))
    norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=packed.device).reshape(1)
    *values, norm = torch.cat([packed, norm]).tolist()
    return {**with_deviation(dict(zip(names, values))), "grad_norm": norm}


def with_deviation(values):
    """Turns each pair of means x_mean, x_square into x_mean, x_std."""
    out = dict(values)
    for name in [n for n in values if n.endswith("_square")]:
        stem = name.removesuffix("_square")
        out[f"{stem}_std"] = max(0.0, out.pop(name) - out[f"{stem}_mean"] ** 2) ** 0.5
    return out


def best_of(metric, task, folder):
    """-> BestCheckpoint that keeps the weights of the best evaluation by a metric in folder/best; of none
    without a metric.
    """

    def keep():
        # on disk alone: a checkpoint of the run names the step, not the weights
        task.save(Path(folder) / "best")

    return BestCheckpoint(lambda values: score_of(values, metric), None if metric is None else keep)


def settle(best, last, task, folder):
    """Leaves the result in folder/model -> its evaluation. last: the run's last evaluation."""
    folder = Path(folder)
    if best.keep is None or best.step is None:
        task.save(folder / "model")
        return last
    there = engine.gather_objects([(folder / name).exists() for name in ("best", "model")])[0]
    if not any(there):
        console.warn(
            f"the best weights (step {best.step}) are gone from {folder / 'best'}; the last ones are kept"
        )
        task.save(folder / "model")
        return last
    if engine.rank() == 0 and there[0]:  # else a run that was killed here had moved it
        shutil.rmtree(folder / "model", ignore_errors=True)
        (folder / "best").rename(folder / "model")
    engine.barrier()
    return {**best.evaluation, "best_step": best.step}


def score_of(values, metric):
    """An evaluation's score by a metric, higher is better, as a BestCheckpoint and a run's checkpoints take
    it.
    """
    if metric not in values:
        raise UserError(f"train.best_metric: expected one of {', '.join(sorted(values))}, got {metric}")
    return [-values[metric] if "loss" in metric else values[metric]]


def save_batch(batch, folder, step):
    """Writes the examples of a global batch -> the file's path."""
    path = Path(folder) / f"nonfinite_batch_step{step}.jsonl"
    if engine.rank() == 0:
        with open(path, "w", encoding="utf-8") as file:
            for example in batch:
                file.write(json.dumps(dataclasses.asdict(example), default=str) + "\n")
    return path


def _endless(n, size, seed):
    epoch = 0
    while True:
        yield from global_batches(n, size, seed, epoch)
        epoch += 1


def _line(values):
    shown = ["loss", "accuracy", "accuracy_sign", "reward_accuracy"]
    return "  ".join(f"{name} {values[name]:.4f}" for name in shown if name in values)
