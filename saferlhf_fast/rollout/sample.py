"""A step's prompts become its Rollout, by the policy as it is now; prefetch.py samples a step ahead."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from .batch import assemble, generate

if TYPE_CHECKING:
    from ..config.stages import EvaluateConfig, PPOConfig
    from ..data.examples import PromptExample
    from .roles import Roles
    from .types import Rollout


def sample(roles: "Roles", prompts: "Sequence[PromptExample]", cfg: "PPOConfig", step: int) -> "Rollout":
    """Samples this rank's prompts of a step at the current weights."""
    rows, responses = generate(
        roles.rollout_engine, prompts, cfg.sampling, cfg.max_length, step_seed(cfg, step)
    )
    return assemble(
        rows,
        responses,
        roles.tokenizer,
        cfg.pass_tokens(),
        minibatches=cfg.ppo.minibatches,
        n=cfg.sampling.num_return_sequences,
    )


def rollouts_now(
    roles: "Roles", batches: "Iterable[tuple[int, Sequence[PromptExample]]]", cfg: "PPOConfig"
) -> "Iterator[tuple[int, Rollout]]":
    """Samples each batch by the policy as it is when the batch is requested.

    Args:
        roles: The policy and its rollout engine.
        batches: (step, prompts of this rank).
        cfg: The stage's config.

    Yields:
        (step, Rollout).
    """
    for step, prompts in batches:
        yield step, sample(roles, prompts, cfg, step)


def step_seed(cfg: "PPOConfig | EvaluateConfig", step: int) -> int:
    """Seed of a step's rollout."""
    return cfg.seed * 100_003 + step


def require_engine_logprobs(rollout: "Rollout", cfg: "PPOConfig") -> None:
    """Raises a UserError when the recipe needs log-probs that the rollout engine does not report."""
    if rollout.engine_logp_N is None and (cfg.ppo.old_logp == "engine" or cfg.ppo.importance_cap is not None):
        key = "importance_cap" if cfg.ppo.old_logp == "trainer" else "old_logp"
        raise UserError(
            f"ppo.{key}: needs the log-probs of the rollout engine; sampling.engine={cfg.sampling.engine} "
            "gave none"
        )
