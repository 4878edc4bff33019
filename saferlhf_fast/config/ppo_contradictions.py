"""Settings of ppo and ppo-lag that do not go together. No torch."""

import dataclasses
import re
from collections.abc import Callable, Collection

from saferlhf_fast.config.contradiction_rows import Row
from saferlhf_fast.config.schema import show
from saferlhf_fast.config.sections import REWARD, Multiplier
from saferlhf_fast.config.stages import PPOConfig

Words = dict[str, str]
"""Words for the key and the message of a row."""


def _changed_multiplier_setting(cfg: PPOConfig) -> Words | None:
    """Returns the first of the multiplier's settings that is not the default."""
    for name, value in dataclasses.asdict(cfg.multiplier).items():
        if value != getattr(Multiplier(), name):
            return {"name": name, "got": show(value)}
    return None


def _given_twice(cfg: PPOConfig) -> Words | None:
    """Returns the first setting of the short form that is given beside the long one."""
    if cfg.constraints is None:
        return None
    given = [name for name in ("cost", "cost_critic") if getattr(cfg, name) is not None]
    given += [f"multiplier.{words['name']}"] if (words := _changed_multiplier_setting(cfg)) else []
    inside = {"cost": "constraints.0.cost", "cost_critic": "constraints.0.critic"}
    return {"name": given[0], "inside": inside.get(given[0], f"constraints.0.{given[0]}")} if given else None


def _constraint_names(cfg: PPOConfig) -> list[str]:
    return [constraint.name for constraint in cfg.constraints or []]


def _several_constraints(cfg: PPOConfig) -> Words | None:
    names = _constraint_names(cfg)
    return {"got": ", ".join(names)} if len(names) > 1 else None


def _odd_constraint_name(cfg: PPOConfig) -> Words | None:
    odd = [
        name
        for name in _constraint_names(cfg)
        if name == REWARD or not re.fullmatch(r"[\w-]+", name, re.ASCII)
    ]
    return {"got": show(odd[0])} if odd else None


def _multiplier_where(condition: Callable[[Multiplier], bool]) -> Callable[[PPOConfig], Words | None]:
    """Returns a condition on a config: the first multiplier of which `condition` is true.

    The words are its key, its λ at the start and its bound.
    """

    def first(cfg: PPOConfig) -> Words | None:
        for i, multiplier in enumerate(constraint.multiplier for constraint in cfg.long_form()):
            if condition(multiplier):
                return {
                    "multiplier": "multiplier" if cfg.constraints is None else f"constraints.{i}.multiplier",
                    "got": f"{multiplier.init:g}",
                    "bound": f"{multiplier.max:g}",
                }
        return None

    return first


def _named_critic(cfg: PPOConfig, excluded: Collection[str] = ()) -> Words | None:
    """Returns the first setting that names a critic to start from."""
    settings = [
        setting
        for name, (setting, path) in cfg.critic_settings().items()
        if path is not None and name not in excluded
    ]
    return {"critic": settings[0]} if settings else None


def _nothing_to_evaluate_on(cfg: PPOConfig) -> bool:
    return cfg.evaluation.data is None and cfg.evaluation.fraction == 0


CONSTRAINT = (
    Row(
        "constraints",
        lambda cfg: cfg.constraints is not None,
        "only in the stage ppo-lag; ppo has no constraint. cost=… alone reports costs",
        "ppo",
    ),
    Row(
        "constraints",
        _given_twice,
        "expected either constraints or their short form (cost, cost_critic, multiplier), got {name} too; "
        "inside of constraints it is {inside}",
        "ppo-lag",
    ),
    Row(
        "cost",
        lambda cfg: not cfg.long_form(),
        "missing; ppo-lag needs a cost model (without one, use the stage ppo)",
        "ppo-lag",
    ),
    Row(
        "constraints",
        _several_constraints,
        "expected one constraint, since the stage supports only one so far; got {got}",
        "ppo-lag",
    ),
    Row(
        "constraints.0.name",
        _odd_constraint_name,
        "expected letters, digits, _ and -, and not reward, which is the reward model's; got {got}",
        "ppo-lag",
    ),
    Row(
        "ppo.shaping",
        lambda cfg: cfg.ppo.shaping is not None,
        "only in the stage ppo; ppo-lag has the multiplier instead",
        "ppo-lag",
    ),
    # Otherwise a user who types ppo for ppo-lag would train without the constraint that they gave.
    Row(
        "multiplier.{name}",
        _changed_multiplier_setting,
        "only in the stage ppo-lag; ppo has no constraint. Expected none, got {got}",
        "ppo",
    ),
    Row(
        "evaluation.margin",
        lambda cfg: {"got": show(cfg.evaluation.margin)} if cfg.evaluation.margin else None,
        "only in the stage ppo-lag; ppo has no constraint. Expected none, got {got}",
        "ppo",
    ),
    Row(
        "ppo.shaping",
        lambda cfg: cfg.ppo.shaping is not None and cfg.cost is None,
        "needs a cost model: cost=…",
    ),
    Row(
        "cost_critic",
        lambda cfg: cfg.cost_critic is not None and cfg.cost is None,
        "needs a cost model: cost=…",
    ),
    Row(
        "{multiplier}.init",
        _multiplier_where(lambda multiplier: multiplier.rule == "exponential" and multiplier.init == 0),
        "expected above 0 for the exponential rule, which cannot leave 0; got {got}",
        "ppo-lag",
    ),
    Row(
        "{multiplier}.init",
        _multiplier_where(lambda multiplier: multiplier.init > multiplier.max),
        "expected at most {multiplier}.max ({bound}), got {got}",
        "ppo-lag",
    ),
)
PPO = (
    Row(
        "ppo.shared_critic",
        lambda cfg: cfg.ppo.shared_critic,
        "only in the stage ppo-lag; without a constraint there is only one critic",
        "ppo",
    ),
    Row(
        "{critic}",
        lambda cfg: cfg.ppo.shared_critic and _named_critic(cfg, excluded=(REWARD,)),
        "expected none with ppo.shared_critic, which starts from reward_critic or the reward model",
    ),
    Row(
        "ppo.importance_cap",
        lambda cfg: cfg.ppo.importance_cap is not None and cfg.ppo.old_logp == "engine",
        "only with ppo.old_logp=trainer; from the engine's log-probs the ratio itself corrects",
    ),
    Row(
        "ppo.minibatches",
        lambda cfg: cfg.ppo.minibatches > cfg.ppo.batch_size,
        "expected at most ppo.batch_size ({cfg.ppo.batch_size}), got {cfg.ppo.minibatches}",
    ),
)
OVERLAP = (
    Row(
        "ppo.overlap",
        lambda cfg: cfg.ppo.overlap and cfg.ppo.importance_cap is None and cfg.ppo.old_logp == "trainer",
        "needs ppo.importance_cap (2.0 is common) or ppo.old_logp=engine, since its batches are one step "
        "stale",
    ),
    Row(
        "ppo.overlap",
        lambda cfg: cfg.ppo.overlap and cfg.engine.frozen == "sharded",
        "expected engine.frozen auto or replicated, got sharded: two threads would start collectives",
    ),
    Row(
        "ppo.overlap",
        lambda cfg: cfg.ppo.overlap and cfg.engine.zero_stage == 3,
        "expected engine.zero_stage 0, 1 or 2 and separate models, got 3",
    ),
    Row(
        "ppo.overlap",
        lambda cfg: cfg.ppo.overlap and cfg.lora.rank,
        "expected engine.zero_stage 0, 1 or 2 and separate models, got one shared base (lora.rank)",
    ),
    Row(
        "ppo.overlap",
        lambda cfg: cfg.ppo.overlap and cfg.sampling.engine == "vllm",
        "expected another sampling.engine than vllm, which would be on the device twice; use vllm-server",
    ),
    Row(
        "evaluation.interval",
        lambda cfg: cfg.ppo.overlap and cfg.sampling.engine == "vllm-server" and cfg.evaluation.interval,
        "expected none with ppo.overlap and sampling.engine=vllm-server, which is sampling at that time",
    ),
)
SHARED_BASE = (
    Row(
        "engine.zero_stage",
        lambda cfg: cfg.lora.rank and cfg.engine.zero_stage == 3,
        "expected 0, 1 or 2 with lora.rank, got 3; each device has the complete frozen base",
    ),
    Row(
        "engine.frozen",
        lambda cfg: cfg.lora.rank and cfg.engine.frozen == "sharded",
        "expected auto or replicated with lora.rank, whose roles share one base; got sharded",
    ),
    Row(
        "{critic}",
        lambda cfg: cfg.lora.rank and _named_critic(cfg),
        "expected none with lora.rank, whose critics are adapters on {cfg.model}",
    ),
)
EVALUATION = (
    Row(
        "evaluation.select",
        lambda cfg: cfg.evaluation.select and _nothing_to_evaluate_on(cfg),
        "needs something to evaluate on: evaluation.fraction or evaluation.data",
    ),
    Row(
        "evaluation.interval",
        lambda cfg: cfg.evaluation.interval and _nothing_to_evaluate_on(cfg),
        "needs something to evaluate on: evaluation.fraction or evaluation.data",
    ),
)
