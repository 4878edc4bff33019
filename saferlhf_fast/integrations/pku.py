"""What safe-rlhf and align-anything share: both contain the same functions.

gather_log_probabilities is bound by name in every trainer module; GAE and the losses are methods of the
trainers. All of them take 0-or-1 masks, average over the tokens of a row first, then over rows, and give NaN
when one row has no token. Shapes: B rows, L tokens of prompt and response, T tokens that count, V vocabulary.
"""

from typing import Any

import torch

from ..kernels.token_logprob import token_logprob
from . import shared
from .registry import LibraryFunction


def gather_log_probabilities(original: LibraryFunction) -> LibraryFunction:
    """(logits [B, L, V], labels [B, L]) -> log-probs [B, L] in float32, also of bfloat16 logits."""

    def replacement(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not shared.one_id_each(logits, labels):
            return original(logits, labels)
        shared.known_ids("gather_log_probabilities: labels: expected", labels, logits.shape[-1])
        return token_logprob(logits, labels)

    return replacement


def get_advantages_and_returns(original: LibraryFunction) -> LibraryFunction:
    """GAE over the tokens from `start` on; 0 where masked."""

    def replacement(
        self: Any, values: torch.Tensor, rewards: torch.Tensor, sequence_mask: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = shared.advantages(
            rewards[:, start:],
            values[:, start:],
            sequence_mask[:, start:],
            self.gamma,
            self.gae_lambda,
            "zero",
        )
        return original(self, values, rewards, sequence_mask, start) if result is None else result

    return replacement


def critic_loss_fn(original: LibraryFunction) -> LibraryFunction:
    """Half the clipped square: mean over rows of the token means; rows without a token do not count."""

    def replacement(
        self: Any,
        values: torch.Tensor,
        old_values: torch.Tensor,
        returns: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        result = shared.critic_loss(
            values,
            old_values,
            returns,
            mask,
            clip_value=self.clip_range_value,
            reduction="sequence-mean",
            normalizer=None,
        )
        return original(self, values, old_values, returns, mask) if result is None else result[0]

    return replacement


def actor_loss_fn(original: LibraryFunction) -> LibraryFunction:
    """The clipped loss; log-ratios are clamped to ±20 before exp, which the libraries do not do."""

    def replacement(
        self: Any,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        loss = _clipped_loss(self, log_probs, old_log_probs, advantages, mask)
        return original(self, log_probs, old_log_probs, advantages, mask) if loss is None else loss

    return replacement


def lagrangian_actor_loss_fn(original: LibraryFunction) -> LibraryFunction:
    """The clipped loss of (A_r - λ·A_c) / (1 + λ). λ stays on its device: the host does not wait for it."""

    def replacement(
        self: Any,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        reward_advantages: torch.Tensor,
        cost_advantages: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        multiplier = self.log_lambda.detach().exp().to(reward_advantages.device)
        combined = (reward_advantages - multiplier * cost_advantages) / (1.0 + multiplier)
        loss = _clipped_loss(self, log_probs, old_log_probs, combined, mask)
        if loss is None:
            return original(self, log_probs, old_log_probs, reward_advantages, cost_advantages, mask)
        return loss

    return replacement


def _clipped_loss(
    trainer: Any,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor | None:
    result = shared.policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        reduction="sequence-mean",
        normalizer=None,
        clip_ratio=trainer.clip_range_ratio,
    )
    return None if result is None else result[0]
