"""What a step sends: each model's collectives in bytes, and the least time that the links need for them.

The counts agree with small runs of two processes under DeepSpeed 0.19.8
(tests/commands/test_plan_communication.py). T is the size of all trained weights; S is the size of all
weights, trained and frozen, that ZeRO-3 shards. Both are in the weights' own number format, whatever the
optimiser's:

    ZeRO   per backward pass                                per step
    0                                                       all-reduce T
    1                                                       all-reduce T, all-gather T
    2      all-reduce T (not reduce-scatter)                all-gather T
    3      all-gather S twice (thrice with recomputation,   all-gather what is too small to be sharded
           less what stays gathered), reduce-scatter T

Frozen models that are sharded: all-gather S per pass. A rollout under ZeRO-3: all-gather S once, or for each
token (sampling.gather=false).
Left out: metrics, norms and the like, some kB a step; latency; offloading, which uses PCIe.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import sizes
from .passes import Passes, passes_of_step
from .phases import NETWORK, NODE, NVLINK

if TYPE_CHECKING:
    from .phases import Model, StageModels

_Weights = tuple[tuple[int, int], ...]
"""(elements, trained elements) of each weight of a module."""


class Collective(NamedTuple):
    """One kind of collective of a model in a step."""

    role: str
    when: str  # rollout, scoring, update, step
    collective: str  # all-reduce, all-gather, reduce-scatter
    times: int  # passes or steps in which it happens
    size: int  # bytes of the whole tensor, over all times

    def wire(self, gpus: int) -> float:
        """Returns the bytes that each rank sends, and receives, when the collective runs in a ring."""
        return (2 if self.collective == "all-reduce" else 1) * self.size * (gpus - 1) / gpus


def seconds(
    sent: Iterable[Collective],
    gpus: int,
    node: int = NODE,
    nvlink: float = NVLINK,
    network: float = NETWORK,
) -> float:
    """Returns the least time that the links need.

    Inside a node that is the time of NVLink. Across nodes each of the node's rings leaves through another
    GPU's network card, so that a rank's bytes pass at the speed of all the node's cards together, or at that
    of NVLink if it is slower.

    Args:
        sent: The collectives.
        gpus: How many ranks there are.
        node: GPUs of a node.
        nvlink: What a GPU sends to others of its node (GB/s).
        network: What a GPU sends to other nodes (GB/s).
    """
    speed = nvlink if gpus <= node else min(nvlink, node * network)
    return sum(s.wire(gpus) for s in sent) / (speed * 1e9)


# ---------------------------------------------------------------- what ZeRO-3 shards and keeps


@functools.lru_cache(maxsize=64)
def runs(blueprint: sizes.Blueprint) -> tuple[tuple[bool, tuple[_Weights, ...]], ...]:
    """Lists a model's modules in order; modules that are recomputed together form one run.

    Returns:
        (recomputed, modules) of each run; a module is (elements, trained elements) of each of its weights.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    seen: set[int] = set()
    in_order: list[tuple[bool, list[_Weights]]] = []
    inside: str | None = None
    for name, module in sizes.build(blueprint).named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            inside = name + "."
            in_order.append((True, []))
        elif inside is None or not name.startswith(inside):
            inside = None
            in_order.append((False, []))
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        if own:
            in_order[-1][1].append(tuple((p.numel(), p.numel() if p.requires_grad else 0) for p in own))
    return tuple((recomputed, tuple(modules)) for recomputed, modules in in_order if modules)


def sharded(blueprint: sizes.Blueprint, persistent: int) -> tuple[list[tuple[bool, list[int]]], int, int]:
    """Splits a model's weights into those that ZeRO-3 shards and those that it does not.

    Args:
        blueprint: The model.
        persistent: Most elements of a weight that is not sharded.

    Returns:
        (recomputed, sharded elements of each module) of each run, the number of elements that are not
        sharded, and how many of those are trained.
    """
    large_runs: list[tuple[bool, list[int]]] = []
    small, small_trained = 0, 0
    for recomputed, modules in runs(blueprint):
        elements = []
        for weights in modules:
            elements.append(sum(n for n, _ in weights if n > persistent))
            small += sum(n for n, _ in weights if n <= persistent)
            small_trained += sum(t for n, t in weights if n <= persistent)
        large_runs.append((recomputed and blueprint.checkpointing, [n for n in elements if n]))
    return [run for run in large_runs if run[1]], small, small_trained


def gathered_in_training(large_runs: Sequence[tuple[bool, Sequence[int]]], reuse: int) -> int:
    """Returns the elements that one forward and backward pass gathers.

    Args:
        large_runs: The first result of `sharded`.
        reuse: A module stays gathered when it is used again before so many elements of other modules were
            used (stage3_max_reuse_distance); 0: nothing stays.
    """
    order: list[tuple[int, int, bool]] = []  # (module, its elements, released afterwards)
    numbered: list[tuple[bool, list[tuple[int, int]]]] = []
    first = 0
    for recomputed, modules in large_runs:
        numbered.append((recomputed, list(enumerate(modules, first))))
        first += len(modules)
    for _, entries in numbered:
        order += [(i, n, True) for i, n in entries]
    for recomputed, entries in reversed(numbered):
        if recomputed:  # it ends inside the last module, which is then still gathered
            order += [(i, n, k < len(entries) - 1) for k, (i, n) in enumerate(entries)]
        order += [(i, n, True) for i, n in reversed(entries)]
    total, gathered = 0, set()
    for place, (i, n, released) in enumerate(order):
        if i not in gathered:
            total += n
            gathered.add(i)
        if released and not _used_again(order, place, reuse):
            gathered.discard(i)
    return total


def _used_again(order: Sequence[tuple[int, int, bool]], place: int, reuse: int) -> bool:
    """Whether the module at a place is used again within the reuse distance."""
    passed = 0
    for i, n, _ in order[place + 1 :]:
        if passed >= reuse:
            return False
        if i == order[place][0]:
            return True
        passed += n
    return False


# ---------------------------------------------------------------- one model


def collectives_of_trained(
    model: "Model",
    zero: Mapping[str, int],
    width: int,
    passes: int,
    steps: int,
    scoring: int = 0,
    rollout: int = 0,
    traced: bool = True,
) -> list[Collective]:
    """Lists the collectives of a model that an optimiser trains.

    Args:
        model: The model.
        zero: What `zero_memory.zero_settings` returns.
        width: Bytes of a weight.
        passes: Backward passes of a step.
        steps: Optimiser steps.
        scoring: Passes without gradient.
        rollout: How many times its weights are gathered to generate.
        traced: False where DeepSpeed cannot follow the order of modules and keeps nothing gathered.
    """
    stage, all_gradients = zero["stage"], width * model.count.trained
    if stage < 3:
        when, times = ("step", steps) if stage < 2 else ("update", passes)
        sent = [Collective(model.role, when, "all-reduce", times, all_gradients * times)]
        if stage:
            sent.append(Collective(model.role, "step", "all-gather", steps, all_gradients * steps))
        return sent
    large_runs, small, small_trained = sharded(model.blueprint, zero["persistent"])
    large = sum(n for _, modules in large_runs for n in modules)
    training = gathered_in_training(large_runs, zero["reuse"] if traced else 0)
    sent = [
        Collective(model.role, "rollout", "all-gather", rollout, width * large * rollout),
        Collective(model.role, "scoring", "all-gather", scoring, width * large * scoring),
        Collective(model.role, "update", "all-gather", passes, width * training * passes),
        Collective(model.role, "update", "reduce-scatter", passes, all_gradients * passes),
        Collective(
            model.role, "step", "all-gather", steps, width * (small_trained * steps + small * bool(rollout))
        ),
    ]
    return [collective for collective in sent if collective.size]


def collectives_of_frozen(
    model: "Model", zero: Mapping[str, int], width: int, passes: int, rollout: int = 0
) -> list[Collective]:
    """Lists the collectives of a model that is not trained.

    Args:
        model: The model.
        zero: What `zero_memory.zero_settings` returns.
        width: Bytes of a weight.
        passes: Passes of a step.
        rollout: How many times its weights are gathered to generate.
    """
    if zero["stage"] < 3:
        return []
    large = sum(n for _, modules in sharded(model.blueprint, zero["persistent"])[0] for n in modules)
    sent = [
        Collective(model.role, "rollout", "all-gather", rollout, width * large * rollout),
        Collective(model.role, "scoring", "all-gather", passes, width * large * passes),
    ]
    return [collective for collective in sent if collective.size]


# ---------------------------------------------------------------- stages


def collectives_of_stage(stage: "StageModels[Any]", passes: Passes | None = None) -> list[Collective]:
    """Lists the collectives of one step of a stage; of PPO: of one batch of rollouts.

    Args:
        stage: The stage, whose models have been added.
        passes: How often each model runs; None counts it.
    """
    if stage.hardware.gpus == 1:
        return []
    passes = passes or passes_of_step(stage)
    sent: list[Collective] = []
    policy = stage.spec.family == "ppo"
    for model in stage.models:
        generates = model.role == "actor" or (stage.spec.family == "evaluation" and model.role == "policy")
        rollout = passes.rollout if generates else 0
        if not model.trained:
            scoring = passes.scoring if model.role != "copy of the actor" else 0
            sent += collectives_of_frozen(model, stage.zero(model), stage.width, scoring, rollout)
            continue
        from_engine = policy and generates and stage.cfg.ppo.old_logp == "engine"
        scores = policy and passes.old_logprobs_and_values and not from_engine
        sent += collectives_of_trained(
            model,
            stage.zero(model),
            stage.width,
            passes.update + (passes.extra if generates else 0),
            passes.steps,
            passes.scoring if scores else 0,
            rollout,
            traced=not (generates and policy or scores),
        )
    return sent
