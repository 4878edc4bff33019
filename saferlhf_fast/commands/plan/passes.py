"""How often a step of a stage runs its models, with every sequence as long as max_length allows."""

from typing import NamedTuple


class Passes(NamedTuple):
    """Counts of one step: of one batch of rollouts in PPO, of one batch in an evaluation."""

    scoring: int                         # passes of each frozen model, and of trained ones that are asked beforehand
    update: int                          # forward and backward passes of each trained model
    steps: int = 1                       # optimiser steps
    asked: bool = False                  # old log-probs and values have passes of their own
    extra: int = 0                       # passes of the actor over supervised data
    rollout: int = 0                     # times that the actor's weights are gathered
    several: bool = False                # an optimiser step has more than one: gradients are there while a pass runs


def allowed(cast):
    """Most tokens of a pass, as the recipe has it."""
    return cast.cfg.train.pass_tokens(cast.spec.sequences) if cast.spec.family == "supervised" else cast.cfg.pass_tokens()


def longest_pass(cast):
    """Most tokens of a pass. An example is not cut: the pass of one that is longer than the recipe allows is as long as it is."""
    longest = cast.cfg.train.max_length if cast.spec.family == "supervised" else cast.cfg.max_length
    return max(allowed(cast), cast.spec.sequences * longest)


def passes_of_step(cast):
    """-> Passes. cast: a phases.Cast, whose models need not be there."""
    return {"supervised": _supervised, "ppo": _ppo, "evaluation": _evaluation}[cast.spec.family](cast.cfg, cast)


def _supervised(cfg, cast):
    tokens = cfg.train.batch_size * cfg.train.accumulation * cast.spec.sequences * cfg.train.max_length
    count = _passes(tokens, cast)
    return Passes(count, count, several=tokens > allowed(cast))


def _ppo(cfg, cast):
    ppo = cfg.ppo
    tokens = -(-ppo.batch_size * cfg.sampling.num_return_sequences * cfg.max_length // ppo.minibatches)
    scoring = ppo.minibatches * _passes(tokens, cast)
    extra = ppo.epochs * _passes(ppo.batch_size * cfg.max_length, cast) if cfg.trains_on_ptx() else 0
    return Passes(scoring, scoring * ppo.epochs, ppo.optimizer_steps(), not cfg.in_one_pass(), extra, _gatherings(cfg),
                  tokens > allowed(cast))


def _evaluation(cfg, cast):
    return Passes(_passes(cfg.batch_size * cfg.max_length, cast), 0, 0, rollout=_gatherings(cfg))


def _passes(tokens, cast):
    """Passes over some tokens, at least."""
    return -(-tokens // longest_pass(cast))


def _gatherings(cfg):
    """Times that ZeRO-3 gathers the actor's weights for a rollout: once, or for each token."""
    sampling = cfg.sampling
    return 1 if sampling.gather else sampling.response_limit(sampling.prompt_limit(cfg.max_length), cfg.max_length)
