"""The constraints of a PPO run: the multiplier and the threshold of each."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ...config.sections import COST
from ...rollout.types import per_constraint
from ...runtime import console, engine
from ..anomalies import MultiplierSaturation
from .multiplier import MultiplierRule, make_multiplier

if TYPE_CHECKING:
    from ...config.stages import PPOConfig
    from ...rollout.types import Rollout, Scored

Value = TypeVar("Value")


def make_multipliers(cfg: "PPOConfig") -> dict[str, MultiplierRule]:
    """The rule that moves λ, on the device, by name of the constraint.

    The thresholds are placeholders until `set_thresholds` runs or a checkpoint, which has them, is loaded.
    """
    return {c.name: make_multiplier(c.multiplier, 0.0, engine.device()) for c in cfg.long_form()}


def update_multipliers(
    multipliers: Mapping[str, MultiplierRule], scored: "Scored", rollout: "Rollout"
) -> None:
    """Moves each λ by the costs of the global batch, which every rank gathers.

    The constraint's rule (multiplier.py) is exponential, log λ += lr · λ · (J_C − d), or PID.

    Args:
        multipliers: The rule by name of the constraint; J_C is the mean of its last `window` costs.
        scored: cost_B of this rank's responses.
        rollout: The place of each response in the global batch, and the batch's size.
    """
    for name, multiplier in multipliers.items():
        multiplier.update(engine.all_gather(scored.costs[name], rollout.order, rollout.size))


def set_thresholds(
    cfg: "PPOConfig", multipliers: Mapping[str, MultiplierRule], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Sets the threshold d of each constraint, and prints which thresholds are within reach.

    d is the recipe's number or, with `threshold_quantile`, that quantile of the starting policy's costs.
    Costs that are reported but not constrained are printed too.

    Args:
        cfg: Settings of the stage.
        multipliers: The rule by name of the constraint; its `threshold` is set.
        rows: The starting policy's evaluation, as `sample_and_score` gives it.
    """
    costs = cfg.long_form()
    names = [c.name for c in costs]
    for i, constraint in enumerate(costs):
        place = "multiplier" if cfg.constraints is None else f"constraints.{i}.multiplier"
        column = [row[per_constraint(COST, constraint.name, names)] for row in rows]
        costs_B = torch.tensor([cost for cost in column if cost is not None])
        settings, threshold = constraint.multiplier, constraint.multiplier.threshold
        if len(costs_B):
            console.say(
                (f"{constraint.name}: " if len(names) > 1 else "")
                + suggestion(costs_B, f"{place}.threshold_quantile")
            )
            if settings.threshold_quantile is not None:
                threshold = torch.quantile(costs_B, settings.threshold_quantile).item()
        if constraint.name in multipliers:
            multipliers[constraint.name].threshold = threshold


def suggestion(costs_B: torch.Tensor, setting: str = "multiplier.threshold_quantile") -> str:
    """A line about the thresholds that a policy can reach, to print before PPO-Lag.

    Args:
        costs_B: [B] costs of the starting policy's responses, in cost model units.
        setting: Name of the setting that takes a quantile as the threshold.
    """
    quantiles = torch.quantile(
        costs_B.float(), torch.tensor([0.1, 0.25, 0.5], device=costs_B.device)
    ).tolist()
    unsafe = (costs_B > 0).float().mean().item()
    return (
        f"costs of the starting policy: mean {costs_B.float().mean().item():.3g}, {unsafe:.0%} above 0; "
        f"quantiles 10 % {quantiles[0]:.3g}, 25 % {quantiles[1]:.3g}, 50 % {quantiles[2]:.3g}. "
        f"A threshold is within reach near the lower quantiles: {setting}=0.25 takes {quantiles[1]:.3g}"
    )


def saturation_monitors(
    cfg: "PPOConfig", multipliers: Mapping[str, MultiplierRule]
) -> list[MultiplierSaturation]:
    """A monitor of each λ; call it when the thresholds are known.

    Args:
        cfg: Settings of the stage.
        multipliers: The rule that moves λ, by name of the constraint, with its final threshold.
    """
    return [
        MultiplierSaturation(
            c.multiplier.max,
            multipliers[c.name].threshold,
            value=per_constraint("lambda", c.name, multipliers),
            mean_cost=per_constraint("episode_cost", c.name, multipliers),
        )
        for c in cfg.long_form()
        if c.name in multipliers
    ]


def by_checkpoint_name(multipliers: Mapping[str, MultiplierRule]) -> dict[str, MultiplierRule]:
    """The rules by the names that a run's checkpoints give them: multiplier, or multiplier/<constraint>."""
    return {
        per_constraint("multiplier", name, multipliers): multiplier
        for name, multiplier in multipliers.items()
    }


def one_or_each(by_name: Mapping[str, Value]) -> dict[str, Value] | Value | None:
    """A number of the constraints as summaries write it.

    Returns:
        None without a constraint, the number of a single one, {name: number} of several.
    """
    return dict(by_name) if len(by_name) > 1 else next(iter(by_name.values()), None)
