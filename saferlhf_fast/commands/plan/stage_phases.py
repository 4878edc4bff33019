"""Which models take part in a stage, and how much memory they take in each of its phases.

The phases follow the order of calls in training/sft.py, pair_loss.py, dpo.py, ppo/load_roles.py and
ppo/update.py, and in rollout/scoring.py. ppo_phases.py has ppo, ppo-lag and evaluate.
"""

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import communication
from .communication import Collective
from .pass_memory import lengths_of
from .passes import longest_pass, passes_of_step
from .phases import (
    ANY,
    Hardware,
    Model,
    Phase,
    StageModels,
    add,
    backward,
    forward,
    loading,
    resident_gradients,
    saved_activations,
    scoring_pass,
    stepping,
    worst,
)

if TYPE_CHECKING:
    from ...config.stages import DPOConfig, ModerationConfig, PreferenceConfig, SFTConfig, StageConfig


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What a stage needs.

    Attributes:
        name: What the recipe calls the stage.
        kind: The kind of stage.
        models: Its models.
        use: {role: {"activations": bytes, "logits": bytes, "cache": bytes}}: the maximum of each.
        phases: Its phases, in order.
        host: Bytes of host memory of each process, for what is offloaded.
        sent: The collectives of one step.
    """

    name: str
    kind: str
    models: list[Model]
    use: dict[str, dict[str, int]]
    phases: list[Phase]
    host: int
    sent: list[Collective] = dataclasses.field(default_factory=list)

    @property
    def worst(self) -> Phase:
        """The largest phase."""
        return max(self.phases, key=lambda phase: phase.total)


def plan_stage(
    name: str, kind: str, cfg: "StageConfig", hardware: Hardware, earlier: Mapping[str, Any]
) -> StagePlan:
    """Plans one stage.

    Args:
        name: What the recipe calls the stage.
        kind: The kind of stage.
        cfg: Its config.
        hardware: What it runs on.
        earlier: {output folder: its config} of the stages before it in the same recipe.

    Raises:
        UserError: A model's configuration cannot be read, or its code does not run on shapes alone.
    """
    stage = StageModels(name, kind, cfg, hardware, earlier)
    phases = phases_of(stage)
    return StagePlan(
        name,
        kind,
        stage.models,
        stage.use,
        phases,
        sum(model.states.host for model in stage.models),
        communication.collectives_of_stage(stage),
    )


def phases_of(stage: StageModels[Any]) -> list[Phase]:
    """Adds a stage's models and returns its phases."""
    module, name = stage.spec.planner.split(":")
    return getattr(import_module(f"{__package__}.{module}"), name)(stage)


# ---------------------------------------------------------------- supervised stages


def _supervised(
    stage: "StageModels[SFTConfig | PreferenceConfig | DPOConfig | ModerationConfig]",
    kind: str,
    predicted: int | str,
    reference: bool = False,
) -> list[Phase]:
    """Returns the phases of a supervised stage.

    kind: "policy" or "score". predicted: as in `pass_memory.predicted_rows`. reference: whether a frozen copy
    of the starting model takes part.
    """
    cfg = stage.cfg
    frozen = stage.add("reference", "model", "policy") if reference else None
    model = stage.add(
        "score model" if kind == "score" else "policy",
        "model",
        kind,
        cfg.optim,
        cfg.lora,
        cfg.train.gradient_checkpointing,
    )
    lengths, several = lengths_of(longest_pass(stage), cfg.train.max_length), passes_of_step(stage).several
    footprint = stage.footprint(
        model, lengths, predicted, keep_gradients=not several and model.states.unpartitioned_gradients
    )
    before = add(stage.resident(), resident_gradients([model], not several))
    turns = [
        add(before, forward(model, footprint)),
        *(add(before, turn) for turn in backward(model, footprint)),
    ]
    if frozen is not None:
        saved = saved_activations(model, footprint)
        turns.append(add(before, saved, scoring_pass(stage, frozen, lengths, predicted)))
    return [loading(stage), worst("passes", turns), stepping(stage)]


def sft(stage: "StageModels[SFTConfig]") -> list[Phase]:
    """Returns the phases of the stage sft."""
    return _supervised(stage, "policy", ANY)


def preference(stage: "StageModels[PreferenceConfig]") -> list[Phase]:
    """Returns the phases of the stages reward and cost."""
    return _supervised(stage, "score", "all" if stage.cfg.loss == "token" else "end")


def moderation(stage: "StageModels[ModerationConfig]") -> list[Phase]:
    """Returns the phases of the stage moderation, whose heads are about as small as a score model's."""
    return _supervised(stage, "score", "end")


def dpo(stage: "StageModels[DPOConfig]") -> list[Phase]:
    """Returns the phases of the stage dpo."""
    return _supervised(stage, "policy", ANY, reference=True)
