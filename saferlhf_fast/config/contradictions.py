"""Settings that do not go together: tables of (setting, condition, message). No torch.

`first` checks them for a stage; docs/contradictions.md is printed from them. contradiction_rows.py explains a
row; the rows of ppo and ppo-lag are in ppo_contradictions.py.
"""

import importlib.util
from typing import NamedTuple

from saferlhf_fast.config import deepspeed_keys
from saferlhf_fast.config.contradiction_rows import Row, Table, first_of
from saferlhf_fast.config.ppo_contradictions import CONSTRAINT, EVALUATION, OVERLAP, PPO, SHARED_BASE
from saferlhf_fast.config.schema import show
from saferlhf_fast.config.sections import Optimizer, ScorerSpec, Training
from saferlhf_fast.config.stage_table import STAGE_SPECS, stages_of
from saferlhf_fast.config.stages import STAGES, EvaluateConfig, PPOConfig, StageConfig

BEST_METRICS = {stage: spec.best_by for stage, spec in STAGE_SPECS.items() if spec.best_by}
"""What train.best_metric can name, by stage."""
DEEPSPEED_SETTINGS = {
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
"""DeepSpeed's settings that engine.config may not have, and the settings of saferlhf-fast that set them."""


class ChosenOptimizer(NamedTuple):
    """The config of the rows on an optimiser; optimisers are built outside of stages too."""

    optim: Optimizer
    zero_stage: int


def first(stage: str, cfg: StageConfig) -> str | None:
    """Returns the sentence on the first contradiction in a stage's settings; None when there is none."""
    return next(
        (
            sentence
            for table in TABLES
            if stage in table.stages
            if (sentence := first_of([row for row in table.rows if row.only in ("", stage)], cfg))
        ),
        None,
    )


# --- the engine, in every stage ---


def _set_elsewhere(key: str, setting: str) -> Row:
    """Returns the row on a key of DeepSpeed's that a setting of saferlhf-fast sets.

    The code reads the setting: a model that engine.config alone shards would be saved in pieces.
    """

    def condition(cfg: StageConfig) -> dict[str, str] | None:
        value: object = cfg.engine.config
        for step in key.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        return None if value is None else {"got": show(value)}

    return Row(f"engine.config.{key}", condition, f"expected none, since {setting} sets it; got {{got}}")


def _unknown_to_deepspeed(cfg: StageConfig) -> dict[str, str] | None:
    unknown = deepspeed_keys.unknown(cfg.engine.config) if cfg.engine.config else None
    if not unknown:
        return None
    key, guess = unknown
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
    *(_set_elsewhere(key, setting) for key, setting in DEEPSPEED_SETTINGS.items()),
    Row(
        "engine.config.{key}", _unknown_to_deepspeed, "expected a key that DeepSpeed knows, got {name}{hint}"
    ),
)

# --- training on examples, and lengths ---


def _unknown_best_metric(stage: str, names: tuple[str, ...]) -> Row:
    return Row(
        "train.best_metric",
        lambda cfg: cfg.train.best_metric and cfg.train.best_metric not in names,
        f"expected one of {', '.join(names)}, got {{cfg.train.best_metric}}",
        stage,
    )


def _not_below_max_length(name: str) -> Row:
    return Row(
        f"sampling.{name}",
        lambda cfg: (getattr(cfg.sampling, name) or 0) >= cfg.max_length,
        f"must be below max_length ({{cfg.max_length}}), got {{cfg.sampling.{name}}}",
    )


def _nothing_held_out(train: Training) -> bool:
    return train.eval_data is None and train.eval_fraction == 0


LORA = (
    Row(
        "lora.target_modules",
        lambda cfg: cfg.lora.rank and not cfg.lora.target_modules,
        "expected all-linear or at least one module, got none",
    ),
    Row(
        "lora.bits",
        lambda cfg: cfg.lora.bits and not cfg.lora.rank,
        "needs lora.rank above 0, since weights of 4 bits are not trained, only adapters on them; got 0",
    ),
    Row(
        "lora.bits",
        lambda cfg: cfg.lora.bits and cfg.engine.zero_stage == 3,
        "needs engine.zero_stage 0, 1 or 2, got 3, which cannot divide weights of 4 bits",
    ),
    Row(
        "lora.bits",
        lambda cfg: cfg.lora.bits and cfg.engine.frozen == "sharded",
        "needs engine.frozen auto or replicated, got sharded, which cannot divide weights of 4 bits",
    ),
    Row(
        "lora.bits",
        lambda cfg: cfg.lora.bits and importlib.util.find_spec("bitsandbytes") is None,
        "needs bitsandbytes, which is not installed: pip install 'saferlhf-fast[qlora]'",
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
    *(_unknown_best_metric(stage, names) for stage, names in BEST_METRICS.items()),
)
SAMPLING = (_not_below_max_length("max_new_tokens"), _not_below_max_length("max_prompt_length"))

EVALUATE = (
    Row(
        "resume",
        lambda cfg: cfg.resume not in (None, "auto"),
        "expected auto or none, since an evaluation writes no checkpoints, got {cfg.resume}",
    ),
)


def _moderator_setting_of_another_kind(cfg: PPOConfig | EvaluateConfig) -> dict[str, str] | None:
    """Returns the first setting of a moderator that a scorer of another kind has."""
    settings, plain = cfg.scorer_settings(), ScorerSpec(path="")
    for name, spec in cfg.scorers().items():
        for key in ("signal", "categories", "refusal", "source"):
            if spec.kind != "moderator" and getattr(spec, key) != getattr(plain, key):
                return {"key": f"{settings[name]}.{key}", "got": spec.kind}
    return None


SCORERS = (
    Row(
        "{key}",
        _moderator_setting_of_another_kind,
        "expected kind moderator beside it, got {got}, which has no such setting",
    ),
)

MODERATION = (
    Row(
        "train.cache",
        lambda cfg: cfg.train.cache is not None,
        "expected none: a moderator's data are held in memory; got {cfg.train.cache}",
    ),
    Row(
        "train_backbone",
        lambda cfg: not cfg.train_backbone and cfg.lora.rank,
        "expected true with lora.rank {cfg.lora.rank}, whose adapters are trained in the backbone; got false",
    ),
    Row(
        "features",
        lambda cfg: cfg.features == "ngrams" and importlib.util.find_spec("sklearn") is None,
        "ngrams needs scikit-learn, which is not installed: pip install 'saferlhf-fast[eval]'",
    ),
    Row(
        "thresholds.permissive_fpr",
        lambda cfg: not cfg.thresholds.permissive_fpr < cfg.thresholds.strict_fpr,
        "must be below thresholds.strict_fpr ({cfg.thresholds.strict_fpr}), got "
        "{cfg.thresholds.permissive_fpr}",
    ),
)

# --- optimisers, wherever one is chosen ---

OPTIMIZER = (
    Row(
        "{at}.kind",
        lambda cfg: cfg.optim.kind == "adafactor" and cfg.zero_stage > 0,
        "adafactor needs engine.zero_stage 0, got {cfg.zero_stage}: ZeRO 1 to 3 give the optimiser flat "
        "pieces of weights, which have no rows and columns to factor; adamw-8bit works there",
    ),
    Row(
        "{at}.kind",
        lambda cfg: cfg.optim.kind == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None,
        "adamw-8bit needs bitsandbytes, which is not installed: pip install 'saferlhf-fast[8bit]'",
    ),
)
"""Rows on a ChosenOptimizer; {at} is its key in the config, optim or critic_optim."""

TABLES = (
    Table("Engine", tuple(STAGES), ENGINE),
    Table("Training on examples", stages_of("supervised"), TRAIN),
    Table("Adapters", stages_of("supervised", "ppo"), LORA),
    Table("Moderator", ("moderation",), MODERATION),
    Table("Lengths", stages_of("ppo", "evaluation"), SAMPLING),
    Table("Starting an evaluation again", stages_of("evaluation"), EVALUATE),
    Table("Scorers", stages_of("ppo", "evaluation"), SCORERS),
    Table("Constraint and costs", stages_of("ppo"), CONSTRAINT),
    Table("PPO step", stages_of("ppo"), PPO),
    Table("Overlap of sampling and learning", stages_of("ppo"), OVERLAP),
    Table("One base for all roles", stages_of("ppo"), SHARED_BASE),
    Table("Evaluation", stages_of("ppo"), EVALUATION),
)
"""All tables that `first` checks, in this order."""
