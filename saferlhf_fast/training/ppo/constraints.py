"""The constraints of a PPO run: a multiplier for each, and their thresholds, which the starting policy may
decide.
"""

import torch

from ...config.sections import COST
from ...rollout.types import per_constraint
from ...runtime import console, engine
from ..anomalies import MultiplierSaturation
from .multiplier import make_multiplier, suggestion


def make_multipliers(cfg):
    """{name of a constraint: its rule, on the device}.

    Their thresholds are placeholders until `set_thresholds`, or until a checkpoint is loaded, which has them.
    """
    return {c.name: make_multiplier(c.multiplier, 0.0, engine.device()) for c in cfg.long_form()}


def update_multipliers(multipliers, scored, rollout):
    """Each λ takes a step with the costs of the global batch."""
    for name, multiplier in multipliers.items():
        multiplier.update(engine.all_gather(scored.costs[name], rollout.order, rollout.size))


def set_thresholds(cfg, multipliers, rows):
    """D of each constraint: the recipe's number, or the quantile of the starting policy's costs; prints what
    is within reach.

    rows: of the starting policy's evaluation. Costs that are not constrained are printed too.
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


def saturation_monitors(cfg, multipliers):
    """[MultiplierSaturation of each λ]; once the thresholds are known."""
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


def by_checkpoint_name(multipliers):
    """{name in a run's checkpoints: rule}."""
    return {
        per_constraint("multiplier", name, multipliers): multiplier
        for name, multiplier in multipliers.items()
    }


def one_or_each(by_name):
    """Of no constraint None, of one its value, of several {name: value}: as summaries have it."""
    return dict(by_name) if len(by_name) > 1 else next(iter(by_name.values()), None)
