"""Who takes part in a stage, and how much memory it takes at each of its moments: the order of calls of
training/sft.py, preference.py, dpo.py, ppo/load_roles.py and ppo/update.py and of rollout/scoring.py, in
bytes. ppo_phases.py has ppo, ppo-lag and evaluate.
"""

import dataclasses
from importlib import import_module

from . import communication
from .pass_memory import lengths_of
from .passes import longest_pass, passes_of_step
from .phases import (
    ANY,
    StageModels,
    add,
    asking,
    backward,
    forward,
    loading,
    resident_gradients,
    saved_activations,
    stepping,
    worst,
)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What a stage needs."""

    name: str
    kind: str
    models: list  # Model
    # role -> {"activations": bytes, "logits": bytes, "cache": bytes}, at their worst
    use: dict
    phases: list  # Phase
    host: int  # bytes of host memory per process: what is offloaded
    sent: list = dataclasses.field(default_factory=list)  # communication.Collective of one step

    @property
    def worst(self):
        """The largest moment."""
        return max(self.phases, key=lambda moment: moment.total)


def plan_stage(name, kind, cfg, hardware, earlier):
    """-> StagePlan. earlier: {output folder: its config} of the stages before it in the same recipe."""
    roles = StageModels(name, kind, cfg, hardware, earlier)
    moments = phases_of(roles)
    return StagePlan(
        name,
        kind,
        roles.models,
        roles.use,
        moments,
        sum(model.states.host for model in roles.models),
        communication.of_stage(roles),
    )


def phases_of(roles):
    """Makes a stage's models -> its Moments."""
    module, name = roles.spec.planner.split(":")
    return getattr(import_module(f"{__package__}.{module}"), name)(roles)


# ---------------------------------------------------------------- supervised stages


def _supervised(roles, kind, asked, reference=False):
    cfg = roles.cfg
    if reference:
        frozen = roles.add("reference", "model", "policy")
    model = roles.add(
        "score model" if kind == "score" else "policy",
        "model",
        kind,
        cfg.optim,
        cfg.lora,
        cfg.train.gradient_checkpointing,
    )
    lengths, several = lengths_of(longest_pass(roles), cfg.train.max_length), passes_of_step(roles).several
    made = roles.footprint(model, lengths, asked, keep_gradients=not several and model.states.whole)
    before = add(roles.resident(), resident_gradients([model], not several))
    turns = [add(before, forward(model, made)), *(add(before, turn) for turn in backward(model, made))]
    if reference:
        turns.append(add(before, saved_activations(model, made), asking(roles, frozen, lengths, asked)))
    return [loading(roles), worst("passes", turns), stepping(roles)]


def sft(roles):
    return _supervised(roles, "policy", ANY)


def preference(roles):
    return _supervised(roles, "score", "all" if roles.cfg.loss == "token" else "end")


def dpo(roles):
    return _supervised(roles, "policy", ANY, reference=True)
