"""Prompts of a step into its Rollout, by the policy as it is now; prefetch.py samples a step ahead."""

from ..errors import UserError
from .batch import assemble, generate


def sample(roles, prompts, cfg, step):
    """-> Rollout of this rank's prompts at the current weights."""
    rows, responses = generate(
        roles.generator, prompts, roles.tokenizer, cfg.sampling, cfg.max_length, step_seed(cfg, step)
    )
    return assemble(
        rows,
        responses,
        roles.tokenizer,
        cfg.pass_tokens(),
        minibatches=cfg.ppo.minibatches,
        n=cfg.sampling.num_return_sequences,
    )


def rollouts_now(roles, batches, cfg):
    """Yields (step, Rollout) of each (step, prompts), sampled by the policy as it is when it is asked for."""
    for step, prompts in batches:
        yield step, sample(roles, prompts, cfg, step)


def step_seed(cfg, step):
    """Seed of a step's rollout."""
    return cfg.seed * 100_003 + step


def require_engine_logprobs(rollout, cfg):
    """UserError when the recipe starts from log-probs that the rollout engine does not report."""
    if rollout.engine_logp_N is None and (cfg.ppo.old_logp == "engine" or cfg.ppo.importance_cap is not None):
        key = "importance_cap" if cfg.ppo.old_logp == "trainer" else "old_logp"
        raise UserError(
            f"ppo.{key}: needs the log-probs of the rollout engine; sampling.engine={cfg.sampling.engine} "
            f"gave none"
        )
