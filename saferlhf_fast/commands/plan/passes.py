"""How often a step of a stage runs its models, with every sequence as long as max_length allows."""

from typing import NamedTuple


class Passes(NamedTuple):
    """Counts of one step: of one batch of rollouts in PPO, of one batch in an evaluation."""

    # passes of each frozen model, and of trained ones that are asked beforehand
    scoring: int
    update: int  # forward and backward passes of each trained model
    steps: int = 1  # optimiser steps
    asked: bool = False  # old log-probs and values have passes of their own
    extra: int = 0  # passes of the actor over supervised data
    rollout: int = 0  # times that the actor's weights are gathered
    # an optimiser step has more than one: gradients are there while a pass runs
    several: bool = False


def allowed(roles):
    """Most tokens of a pass, as the recipe has it."""
    return (
        roles.cfg.train.pass_tokens(roles.spec.sequences)
        if roles.spec.family == "supervised"
        else roles.cfg.pass_tokens()
    )


def longest_pass(roles):
    """Most tokens of a pass.

    An example is not cut: the pass of one that is longer than the recipe allows is as long as it is.
    """
    longest = roles.cfg.train.max_length if roles.spec.family == "supervised" else roles.cfg.max_length
    return max(allowed(roles), roles.spec.sequences * longest)


def passes_of_step(roles):
    """-> Passes. roles: a phases.StageModels, whose models need not be there."""
    return {"supervised": _supervised, "ppo": _ppo, "evaluation": _evaluation}[roles.spec.family](
        roles.cfg, roles
    )


def _supervised(cfg, roles):
    tokens = cfg.train.batch_size * cfg.train.accumulation * roles.spec.sequences * cfg.train.max_length
    count = _passes(tokens, roles)
    return Passes(count, count, several=tokens > allowed(roles))


def _ppo(cfg, roles):
    ppo = cfg.ppo
    tokens = -(-ppo.batch_size * cfg.sampling.num_return_sequences * cfg.max_length // ppo.minibatches)
    scoring = ppo.minibatches * _passes(tokens, roles)
    extra = ppo.epochs * _passes(ppo.batch_size * cfg.max_length, roles) if cfg.trains_on_ptx() else 0
    return Passes(
        scoring,
        scoring * ppo.epochs,
        ppo.optimizer_steps(),
        not cfg.in_one_pass(),
        extra,
        _gatherings(cfg),
        tokens > allowed(roles),
    )


def _evaluation(cfg, roles):
    return Passes(_passes(cfg.batch_size * cfg.max_length, roles), 0, 0, rollout=_gatherings(cfg))


def _passes(tokens, roles):
    """Passes over some tokens, at least."""
    return -(-tokens // longest_pass(roles))


def _gatherings(cfg):
    """Times that ZeRO-3 gathers the actor's weights for a rollout: once, or for each token."""
    sampling = cfg.sampling
    return (
        1
        if sampling.gather
        else sampling.response_limit(sampling.prompt_limit(cfg.max_length), cfg.max_length)
    )
