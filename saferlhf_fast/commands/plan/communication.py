"""What a step sends: for each model the collectives that DeepSpeed starts, in bytes, and how long the links
take at the least.

As counted in small runs of two processes with DeepSpeed 0.19.8 (tests/commands/test_plan_communication.py); P
ranks, T trained weights and S those of them and of the frozen ones that ZeRO-3 shards, in the weights' own
number format, whatever the optimiser's:

    ZeRO   per backward pass                                per step
    0                                                       all-reduce T
    1                                                       all-reduce T, all-gather T
    2      all-reduce T (not reduce-scatter)                all-gather T
    3      all-gather S twice (thrice with recomputation,   all-gather what is too small to be sharded
           less what stays gathered), reduce-scatter T

Sharded frozen models: all-gather S per pass. A rollout under ZeRO-3: all-gather S once, or for each token
(sampling.gather=false).
Left out: metrics, norms and the like, some kB a step; latency; offloading, which goes over PCIe.
"""

import functools
from typing import NamedTuple

from . import sizes
from .passes import passes_of_step
from .phases import NETWORK, NODE, NVLINK


class Collective(NamedTuple):
    """One kind of collective of a model in a step."""

    role: str
    when: str  # rollout, scoring, update, step
    collective: str  # all-reduce, all-gather, reduce-scatter
    times: int  # passes or steps in which it happens
    size: int  # bytes of the whole tensor, over all times

    def wire(self, gpus):
        """Bytes that each rank sends (and receives) when it is done in a ring."""
        return (2 if self.collective == "all-reduce" else 1) * self.size * (gpus - 1) / gpus


def seconds(sent, gpus, node=NODE, nvlink=NVLINK, network=NETWORK):
    """The least time that the links need: NVLink inside a node; across nodes each of the node's rings leaves
    through another GPU's network card, so that a rank's bytes pass at the speed of the whole node's cards, or
    NVLink's if that is less.
    """
    speed = nvlink if gpus <= node else min(nvlink, node * network)
    return sum(s.wire(gpus) for s in sent) / (speed * 1e9)


# ---------------------------------------------------------------- what ZeRO-3 shards and keeps


@functools.lru_cache(maxsize=64)
def runs(blueprint):
    """-> ((recomputed, ((elements, trained elements) of each weight of a module, …) of each module), …):

    modules in order, those that are recomputed together in one run.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    module, seen, made, inside = sizes.build(blueprint), set(), [], None
    for name, part in module.named_modules():
        if isinstance(part, GradientCheckpointingLayer):
            inside = name + "."
            made.append((True, []))
        elif inside is None or not name.startswith(inside):
            inside = None
            made.append((False, []))
        own = [p for p in part.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        if own:
            made[-1][1].append(tuple((p.numel(), p.numel() if p.requires_grad else 0) for p in own))
    return tuple((recomputed, tuple(modules)) for recomputed, modules in made if modules)


def sharded(blueprint, persistent):
    """-> ((recomputed, [sharded elements of each module]), …), elements that are not sharded, those of them
    that are trained.
    """
    made, small, small_trained = [], 0, 0
    for recomputed, modules in runs(blueprint):
        mine = []
        for weights in modules:
            mine.append(sum(n for n, _ in weights if n > persistent))
            small += sum(n for n, _ in weights if n <= persistent)
            small_trained += sum(t for n, t in weights if n <= persistent)
        made.append((recomputed and blueprint.checkpointing, [n for n in mine if n]))
    return [run for run in made if run[1]], small, small_trained


def gathered_in_training(made, reuse):
    """Elements that one forward and backward pass gathers. reuse: a module stays gathered when it comes again
    before so many elements of other modules have passed (stage3_max_reuse_distance); 0: nothing stays.
    """
    order, at = [], 0  # (module, its elements, let go of afterwards)
    numbered = []
    for recomputed, modules in made:
        numbered.append((recomputed, list(enumerate(modules, at))))
        at += len(modules)
    for _, modules in numbered:
        order += [(i, n, True) for i, n in modules]
    for recomputed, modules in reversed(numbered):
        if recomputed:  # it ends inside the last module, which is then still there
            order += [(i, n, k < len(modules) - 1) for k, (i, n) in enumerate(modules)]
        order += [(i, n, True) for i, n in reversed(modules)]
    total, there = 0, set()
    for place, (i, n, released) in enumerate(order):
        if i not in there:
            total += n
            there.add(i)
        if released and not _comes_again(order, place, reuse):
            there.discard(i)
    return total


def _comes_again(order, place, reuse):
    passed = 0
    for i, n, _ in order[place + 1 :]:
        if passed >= reuse:
            return False
        if i == order[place][0]:
            return True
        passed += n
    return False


# ---------------------------------------------------------------- one model


def of_trained(model, zero, width, passes, steps, asked=0, rollout=0, traced=True):
    """-> [Collective] of a model under an optimiser. passes: backward passes · asked: passes without gradient
    · rollout: times that its weights are gathered to generate · traced: False where DeepSpeed cannot follow
    the order of modules and keeps nothing.
    """
    stage, all_gradients = zero["stage"], width * model.count.trained
    if stage < 2:
        sent = [Collective(model.role, "step", "all-reduce", steps, all_gradients * steps)]
    elif stage == 2:
        sent = [Collective(model.role, "update", "all-reduce", passes, all_gradients * passes)]
    if stage < 3:
        return sent + (
            [Collective(model.role, "step", "all-gather", steps, all_gradients * steps)] if stage else []
        )
    made, small, small_trained = sharded(model.blueprint, zero["persistent"])
    whole = sum(n for _, modules in made for n in modules)
    training = gathered_in_training(made, zero["reuse"] if traced else 0)
    sent = [
        Collective(model.role, "rollout", "all-gather", rollout, width * whole * rollout),
        Collective(model.role, "scoring", "all-gather", asked, width * whole * asked),
        Collective(model.role, "update", "all-gather", passes, width * training * passes),
        Collective(model.role, "update", "reduce-scatter", passes, all_gradients * passes),
        Collective(
            model.role, "step", "all-gather", steps, width * (small_trained * steps + small * bool(rollout))
        ),
    ]
    return [part for part in sent if part.size]


def of_frozen(model, zero, width, passes, rollout=0):
    """-> [Collective] of a model that is only asked."""
    if zero["stage"] < 3:
        return []
    whole = sum(n for _, modules in sharded(model.blueprint, zero["persistent"])[0] for n in modules)
    sent = [
        Collective(model.role, "rollout", "all-gather", rollout, width * whole * rollout),
        Collective(model.role, "scoring", "all-gather", passes, width * whole * passes),
    ]
    return [part for part in sent if part.size]


# ---------------------------------------------------------------- stages


def of_stage(roles, passes=None):
    """-> [Collective] of one step of a stage (of PPO: one batch of rollouts). roles: a phases.StageModels whose
    models are there.
    """
    if roles.hardware.gpus == 1:
        return []
    passes, sent = passes or passes_of_step(roles), []
    policy = roles.spec.family == "ppo"
    for model in roles.models:
        leads = model.role == "actor" or (roles.spec.family == "evaluation" and model.role == "policy")
        rollout = passes.rollout if leads else 0
        if not model.trained:
            scoring = passes.scoring if model.role != "copy of the actor" else 0
            sent += of_frozen(model, roles.zero(model), roles.width, scoring, rollout)
            continue
        asks = policy and passes.asked and not (leads and roles.cfg.ppo.old_logp == "engine")
        sent += of_trained(
            model,
            roles.zero(model),
            roles.width,
            passes.update + (passes.extra if leads else 0),
            passes.steps,
            passes.scoring if asks else 0,
            rollout,
            traced=not (leads and policy or asks),
        )
    return sent
