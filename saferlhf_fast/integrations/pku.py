"""What safe-rlhf and align-anything share: the same functions, written once in each.

gather_log_probabilities is bound by name in every trainer module; GAE and the losses are methods of the
trainers. All of them take 0-or-1 masks, average over the tokens of a row first, then over rows, and give NaN
when one row has no token.
"""

from ..kernels.token_logprob import token_logprob
from . import shared


def gather_log_probabilities(theirs):
    """(logits [B, L, V], labels [B, L]) -> log-probs in float32, also of bfloat16 logits."""

    def ours(logits, labels):
        if not shared.one_id_each(logits, labels):
            return theirs(logits, labels)
        shared.known_ids("gather_log_probabilities: labels: expected", labels, logits.shape[-1])
        return token_logprob(logits, labels)

    return ours


def get_advantages_and_returns(theirs):
    """GAE over [start, L); 0 where masked."""

    def ours(self, values, rewards, sequence_mask, start):
        made = shared.advantages(
            rewards[:, start:],
            values[:, start:],
            sequence_mask[:, start:],
            self.gamma,
            self.gae_lambda,
            "zero",
        )
        return theirs(self, values, rewards, sequence_mask, start) if made is None else made

    return ours


def critic_loss_fn(theirs):
    """Half the clipped square, mean over rows of the token means; rows without a token count for nothing."""

    def ours(self, values, old_values, returns, mask):
        made = shared.critic_loss(
            values,
            old_values,
            returns,
            mask,
            clip_value=self.clip_range_value,
            reduction="sequence-mean",
            normalizer=None,
        )
        return theirs(self, values, old_values, returns, mask) if made is None else made[0]

    return ours


def actor_loss_fn(theirs):
    """The clipped loss; log-ratios are clamped to ±20 before exp (theirs are not)."""

    def ours(self, log_probs, old_log_probs, advantages, mask):
        made = _clipped(self, log_probs, old_log_probs, advantages, mask)
        return theirs(self, log_probs, old_log_probs, advantages, mask) if made is None else made[0]

    return ours


def lagrangian_actor_loss_fn(theirs):
    """The clipped loss of (A_r - λ·A_c) / (1 + λ). λ stays on its device: the host does not wait for it."""

    def ours(self, log_probs, old_log_probs, reward_advantages, cost_advantages, mask):
        multiplier = self.log_lambda.detach().exp().to(reward_advantages.device)
        combined = (reward_advantages - multiplier * cost_advantages) / (1.0 + multiplier)
        made = _clipped(self, log_probs, old_log_probs, combined, mask)
        return (
            theirs(self, log_probs, old_log_probs, reward_advantages, cost_advantages, mask)
            if made is None
            else made[0]
        )

    return ours


def _clipped(trainer, log_probs, old_log_probs, advantages, mask):
    return shared.policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        reduction="sequence-mean",
        normalizer=None,
        clip_ratio=trainer.clip_range_ratio,
    )
