"""Settings that do not go together: tables of (setting, condition, message). No torch.

`first` looks through them for a stage; docs/contradictions.md is printed from them. A row is refused when its
condition is true of the stage's config. Where the words of a message come from more than the config, the
condition returns them as a dict.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from typing import NamedTuple

from saferlhf_fast.config import deepspeed_keys
from saferlhf_fast.config.schema import show
from saferlhf_fast.config.sections import REWARD, Multiplier, Optimizer
from saferlhf_fast.config.stage_table import STAGE_SPECS, stages_of
from saferlhf_fast.config.stages import STAGES

BEST_METRICS = {stage: spec.best_by for stage, spec in STAGE_SPECS.items() if spec.best_by}
"""What train.best_metric can name, by stage."""
ELSEWHERE = {
    "zero_optimization.stage": "engine.zero_stage",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim.kind",
    "scheduler": "optim.schedule",
    "train_batch_size": "the stage's batch size",
    "train_micro_batch_size_per_gpu": "the stage's batch size",
    "gradient_accumulation_steps": "the stage's batch size",
}
"""DeepSpeed's settings that are not for engine.config, and what of ours sets them: our code goes by ours."""


class Row(NamedTuple):
    """One contradiction. key and message are templates: {cfg.…} is a setting's value, other names are the
    condition's words.
    """

    key: str
    condition: Callable  # config -> true when it is refused, or a dict of words for key and message
    message: str
    only: str = ""  # the one stage that is asked; "" for all of the table's


class Table(NamedTuple):
    """The rows of one group of settings, in the order in which they are asked, and the stages that have these
    settings.
    """

    title: str
    stages: tuple[str, ...]
    rows: tuple[Row, ...]


class ChosenOptimizer(NamedTuple):
    """What the rows on an optimiser are asked about; optimisers are built outside of stages too."""

    optim: Optimizer
    zero_stage: int


def first(stage, cfg):
    """-> the sentence on the first contradiction in a stage's settings; None when there is none."""
    return next(
        (
            sentence
            for table in TABLES
            if stage in table.stages
            if (sentence := first_of([row for row in table.rows if row.only in ("", stage)], cfg))
        ),
        None,
    )


def first_of(rows, cfg, **words):
    """-> the sentence of the first row that is refused, None when none is. words: more of them for keys and
    messages.
    """
    for row in rows:
        refused = row.condition(cfg)
        if refused:
            return f"{row.key}: {row.message}".format(
                cfg=cfg, **words, **(refused if isinstance(refused, dict) else {})
            )
    return None


# --- the engine, in every stage
# -------------------------------------------------------------------------------------


def _given_elsewhere(key, ours):
    """The row on a setting of DeepSpeed that one of ours sets: a model sharded behind our back would be saved
    in pieces.
    """

    def condition(cfg):
        value = cfg.engine.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return None if value is None else {"got": show(value)}

    return Row(f"engine.config.{key}", condition, f"expected none, since {ours} says it; got {{got}}")


def _unknown_to_deepspeed(cfg):
    wrong = deepspeed_keys.unknown(cfg.engine.config) if cfg.engine.config else None
    if not wrong:
        return None
    key, guess = wrong
    return {"key": key, "name": key.rsplit(".", 1)[-1], "hint": f"; did you mean {guess}?" if guess else ""}


ENGINE = (
    Row(
        "engine.offload_optimizer",
        lambda cfg: cfg.engine.offload_optimizer and cfg.engine.zero_stage == 0,
        "needs engine.zero_stage 1, 2 or 3, got 0",
    ),
    Row(
        "engine.offload_parameters",
        lambda cfg: cfg.engine.offload_parameters and cfg.engine.zero_stage != 3,
        "needs engine.zero_stage 3, got {cfg.engine.zero_stage}",
    ),
    *(_given_elsewhere(key, ours) for key, ours in ELSEWHERE.items()),
    Row(
        "engine.config.{key}", _unknown_to_deepspeed, "expected a key that DeepSpeed knows, got {name}{hint}"
    ),
)

# --- training on examples, and lengths
# ------------------------------------------------------------------------------


def _nothing_held_out(train):
    return train.eval_data is None and train.eval_fraction == 0


LORA = (
    Row(
        "lora.target_modules",
        lambda cfg: cfg.lora.rank and not cfg.lora.target_modules,
        "expected all-linear or at least one module, got none",
    ),
)
TRAIN = (
    Row(
        "train.best_metric",
        lambda cfg: cfg.train.best_metric and _nothing_held_out(cfg.train),
        "needs something to evaluate on: train.eval_fraction or train.eval_data",
    ),
    Row(
        "train.eval_interval",
        lambda cfg: cfg.train.eval_interval and _nothing_held_out(cfg.train),
        "needs something to evaluate on: train.eval_fraction or train.eval_data",
    ),
    *(
        Row(
            "train.best_metric",
            lambda cfg, names=names: cfg.train.best_metric and cfg.train.best_metric not in names,
            f"expected one of {', '.join(names)}, got {{cfg.train.best_metric}}",
            stage,
        )
        for stage, names in BEST_METRICS.items()
    ),
)
SAMPLING = tuple(
    Row(
        f"sampling.{name}",
        lambda cfg, name=name: (getattr(cfg.sampling, name) or 0) >= cfg.max_length,
        f"must be below max_length ({{cfg.max_length}}), got {{cfg.sampling.{name}}}",
    )
    for name in ("max_new_tokens", "max_prompt_length")
)

EVALUATE = (
    Row(
        "resume",
        lambda cfg: cfg.resume not in (None, "auto"),
        "expected auto or none, since an evaluation writes no checkpoints, got {cfg.resume}",
    ),
)

# --- ppo and ppo-lag
# ------------------------------------------------------------------------------------------------


def _of_the_multiplier(cfg):
    """The first of the multiplier's settings that is not the default."""
    for name, value in dataclasses.asdict(cfg.multiplier).items():
        if value != getattr(Multiplier(), name):
            return {"name": name, "got": show(value)}
    return None


def _given_twice(cfg):
    """The first setting of the short form that stands beside the long one."""
    if cfg.constraints is None:
        return None
    given = [name for name in ("cost", "cost_critic") if getattr(cfg, name) is not None]
    given += [f"multiplier.{words['name']}"] if (words := _of_the_multiplier(cfg)) else []
    inside = {"cost": "constraints.0.cost", "cost_critic": "constraints.0.critic"}
    return {"name": given[0], "inside": inside.get(given[0], f"constraints.0.{given[0]}")} if given else None


def _names_of_constraints(cfg):
    return [constraint.name for constraint in cfg.constraints or []]


def _odd_name_of_a_constraint(cfg):
    odd = [
        name
        for name in _names_of_constraints(cfg)
        if name == REWARD or not re.fullmatch(r"[\w-]+", name, re.ASCII)
    ]
    return {"got": show(odd[0])} if odd else None


def _multiplier_where(condition):
    """The first constraint of whose multiplier a condition is true: where it stands, its λ at the start and
    its bound.
    """

    def first(cfg):
        for i, multiplier in enumerate(constraint.multiplier for constraint in cfg.long_form()):
            if condition(multiplier):
                return {
                    "multiplier": "multiplier" if cfg.constraints is None else f"constraints.{i}.multiplier",
                    "got": f"{multiplier.init:g}",
                    "bound": f"{multiplier.max:g}",
                }
        return None

    return first


def _named_critic(cfg, but=()):
    """The first setting that names a critic to start from."""
    named = [
        setting
        for stream, (setting, path) in cfg.critic_settings().items()
        if path is not None and stream not in but
    ]
    return {"critic": named[0]} if named else None


def _nothing_to_evaluate_on(cfg):
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
        "inside of constraints "
        "it is {inside}",
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
        lambda cfg: len(_names_of_constraints(cfg)) > 1 and {"got": ", ".join(_names_of_constraints(cfg))},
        "expected one constraint, since the stage keeps no more than one so far; got {got}",
        "ppo-lag",
    ),
    Row(
        "constraints.0.name",
        _odd_name_of_a_constraint,
        "expected letters, digits, _ and -, and not reward, which is the reward model's; got {got}",
        "ppo-lag",
    ),
    Row(
        "ppo.shaping",
        lambda cfg: cfg.ppo.shaping is not None,
        "only in the stage ppo; ppo-lag has the multiplier instead",
        "ppo-lag",
    ),
    # Somebody who types ppo for ppo-lag would otherwise train without the constraint that he gave.
    Row(
        "multiplier.{name}",
        _of_the_multiplier,
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
        "only in the stage ppo-lag; without a constraint there is one critic anyway",
        "ppo",
    ),
    Row(
        "{critic}",
        lambda cfg: cfg.ppo.shared_critic and _named_critic(cfg, but=(REWARD,)),
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
        "needs ppo.importance_cap (2.0 is common) or ppo.old_logp=engine, since its batches are a step stale",
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
        "expected another sampling.engine than vllm, which would lie on the device twice; vllm-server does "
        "it",
    ),
    Row(
        "evaluation.interval",
        lambda cfg: cfg.ppo.overlap and cfg.sampling.engine == "vllm-server" and cfg.evaluation.interval,
        "expected none with ppo.overlap and sampling.engine=vllm-server, which is busy sampling then",
    ),
)
SHARED_BASE = (
    Row(
        "engine.zero_stage",
        lambda cfg: cfg.lora.rank and cfg.engine.zero_stage == 3,
        "expected 0, 1 or 2 with lora.rank, got 3; the frozen base lies on every device whole",
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
EVALUATION = tuple(
    Row(
        f"evaluation.{name}",
        lambda cfg, name=name: getattr(cfg.evaluation, name) and _nothing_to_evaluate_on(cfg),
        "needs something to evaluate on: evaluation.fraction or evaluation.data",
    )
    for name in ("select", "interval")
)

# --- optimisers, wherever one is chosen
# -----------------------------------------------------------------------------

OPTIMIZER = (
    Row(
        "{at}.kind",
        lambda cfg: cfg.optim.kind == "adafactor" and cfg.zero_stage > 0,
        "adafactor needs engine.zero_stage 0, got {cfg.zero_stage}: ZeRO 1 to 3 hand the optimiser flat "
        "pieces of weights, which "
        "have no rows and columns to factor; adamw-8bit works there",
    ),
    Row(
        "{at}.kind",
        lambda cfg: cfg.optim.kind == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None,
        "adamw-8bit needs bitsandbytes, which is not installed: pip install 'saferlhf-fast[8bit]'",
    ),
)
"""Of a ChosenOptimizer; {at} is its key in the config, optim or critic_optim."""

TABLES = (
    Table("Engine", tuple(STAGES), ENGINE),
    Table("Training on examples", stages_of("supervised"), TRAIN),
    Table("Adapters", stages_of("supervised", "ppo"), LORA),
    Table("Lengths", stages_of("ppo", "evaluation"), SAMPLING),
    Table("Starting an evaluation again", stages_of("evaluation"), EVALUATE),
    Table("Constraint and costs", stages_of("ppo"), CONSTRAINT),
    Table("PPO step", stages_of("ppo"), PPO),
    Table("Overlap of sampling and learning", stages_of("ppo"), OVERLAP),
    Table("One base for all roles", stages_of("ppo"), SHARED_BASE),
    Table("Evaluation", stages_of("ppo"), EVALUATION),
)
"""All that `first` asks, in this order."""
