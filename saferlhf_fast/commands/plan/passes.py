"""How often a step of a stage runs its models, when every sequence is as long as max_length allows."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ...config.stages import EvaluateConfig, PPOConfig
    from .phases import StageModels


class Passes(NamedTuple):
    """Counts of one step: of one batch of rollouts in PPO, of one batch in an evaluation.

    Attributes:
        scoring: Passes of each frozen model, and of trained ones whose old outputs are computed beforehand.
        update: Forward and backward passes of each trained model.
        steps: Optimiser steps.
        old_logprobs_and_values: Whether old log-probs and values have passes of their own.
        extra: Passes of the actor over supervised data.
        rollout: How many times the actor's weights are gathered to generate.
        several: Whether an optimiser step has more than one pass, so that gradients exist while one runs.
    """

    scoring: int
    update: int
    steps: int = 1
    old_logprobs_and_values: bool = False
    extra: int = 0
    rollout: int = 0
    several: bool = False


def allowed(stage: "StageModels[Any]") -> int:
    """Returns the most tokens of a pass that the recipe allows."""
    return (
        stage.cfg.train.pass_tokens(stage.spec.sequences)
        if stage.spec.family == "supervised"
        else stage.cfg.pass_tokens()
    )


def longest_pass(stage: "StageModels[Any]") -> int:
    """Returns the most tokens that a pass can have.

    An example is never cut: one that is longer than the recipe allows has a pass of its own length.
    """
    longest = stage.cfg.train.max_length if stage.spec.family == "supervised" else stage.cfg.max_length
    return max(allowed(stage), stage.spec.sequences * longest)


def passes_of_step(stage: "StageModels[Any]") -> Passes:
    """Counts the passes of one step of a stage, whose models need not have been added."""
    return {"supervised": _supervised, "ppo": _ppo, "evaluation": _evaluation}[stage.spec.family](
        stage.cfg, stage
    )


def _supervised(cfg: Any, stage: "StageModels[Any]") -> Passes:
    tokens = cfg.train.batch_size * cfg.train.accumulation * stage.spec.sequences * cfg.train.max_length
    count = _passes(tokens, stage)
    return Passes(count, count, several=tokens > allowed(stage))


def _ppo(cfg: "PPOConfig", stage: "StageModels[Any]") -> Passes:
    ppo = cfg.ppo
    tokens = -(-ppo.batch_size * cfg.sampling.num_return_sequences * cfg.max_length // ppo.minibatches)
    scoring = ppo.minibatches * _passes(tokens, stage)
    extra = ppo.epochs * _passes(ppo.batch_size * cfg.max_length, stage) if cfg.trains_on_ptx() else 0
    return Passes(
        scoring,
        scoring * ppo.epochs,
        ppo.optimizer_steps(),
        not cfg.in_one_pass(),
        extra,
        _gatherings(cfg),
        tokens > allowed(stage),
    )


def _evaluation(cfg: "EvaluateConfig", stage: "StageModels[Any]") -> Passes:
    return Passes(_passes(cfg.batch_size * cfg.max_length, stage), 0, 0, rollout=_gatherings(cfg))


def _passes(tokens: int, stage: "StageModels[Any]") -> int:
    """Returns the fewest passes that some tokens need."""
    return -(-tokens // longest_pass(stage))


def _gatherings(cfg: "PPOConfig | EvaluateConfig") -> int:
    """Returns how many times ZeRO-3 gathers the actor's weights for a rollout: once, or for each token."""
    sampling = cfg.sampling
    return (
        1
        if sampling.gather
        else sampling.response_limit(sampling.prompt_limit(cfg.max_length), cfg.max_length)
    )
