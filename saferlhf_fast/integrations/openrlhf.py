"""OpenRLHF 0.11: log-probs, entropies, GAE, the policy and value losses, the log-exp pair loss.

Its log-prob divides the logits in place for a temperature other than 1; ours leaves them alone.
"""

import torch

from ..kernels.token_logprob import token_logprob
from . import shared
from .registry import Library, Replace

UTILS = "openrlhf.models.utils"
LOSS = "openrlhf.models.loss"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"


def log_probs_from_logits(theirs):
    """(logits, labels) -> log-probs in float32."""

    def ours(logits, labels, temperature=1.0):
        if not shared.one_id_each(logits, labels) or not shared.one_temperature(temperature):
            return theirs(logits, labels, temperature)
        shared.known_ids("log_probs_from_logits: labels: expected", labels, logits.shape[-1])
        return token_logprob(logits, labels, temperature=temperature)

    return ours


def policy_loss_forward(theirs):
    """PolicyLoss.forward of the plain PPO kind; GSPO and the corrections for rollout mismatch are theirs."""

    def ours(
        self,
        log_probs,
        old_log_probs,
        advantages,
        action_mask=None,
        rollout_log_probs=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        made = None
        if (
            self.policy_loss_type == "ppo"
            and self.is_correction_level == "off"
            and _counts_fit(self, action_mask, dp_size, batch_num_tokens, global_batch_size)
        ):
            reduction, normalizer = _aggregation(self, dp_size, batch_num_tokens, global_batch_size)
            made = shared.policy_loss(
                log_probs,
                old_log_probs,
                advantages,
                action_mask,
                reduction=reduction,
                normalizer=normalizer,
                clip_ratio=self.clip_eps_low,
                clip_high=self.clip_eps_high,
                dual_clip=self.dual_clip,
            )
        if made is None:
            return theirs(
                self,
                log_probs,
                old_log_probs,
                advantages,
                action_mask,
                rollout_log_probs,
                dp_size,
                batch_num_tokens,
                global_batch_size,
            )
        loss, stats = made
        # Its KL metric takes the log-ratio as it is; ours is clamped to ±20 as the ratio is.
        with torch.no_grad():
            apart = torch.where(shared.flags(action_mask), old_log_probs - log_probs, 0.0)
            return loss, stats["clipped"], apart.sum() / stats["tokens"].clamp(min=1), None, None

    return ours


def value_loss_forward(theirs):
    """ValueLoss.forward."""

    def ours(
        self,
        values,
        old_values,
        returns,
        action_mask=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        made = None
        if _counts_fit(self, action_mask, dp_size, batch_num_tokens, global_batch_size):
            reduction, normalizer = _aggregation(self, dp_size, batch_num_tokens, global_batch_size)
            made = shared.critic_loss(
                values,
                old_values,
                returns,
                action_mask,
                clip_value=float("inf") if self.clip_eps is None else self.clip_eps,
                reduction=reduction,
                normalizer=normalizer,
            )
        if made is None:
            return theirs(
                self, values, old_values, returns, action_mask, dp_size, batch_num_tokens, global_batch_size
            )
        return made[0]

    return ours


def _counts_fit(module, mask, dp_size, batch_num_tokens, global_batch_size):
    count = batch_num_tokens if module.token_level_loss else global_batch_size
    return shared.given(mask) and (
        count is None or (shared.numbers(dp_size) and dp_size > 0 and shared.counts_fit(mask, count))
    )


def _aggregation(module, dp_size, batch_num_tokens, global_batch_size):
    """Its token or sequence means as our (reduction, normalizer); dp_size counts only with a global count."""
    count = batch_num_tokens if module.token_level_loss else global_batch_size
    return (
        "token-mean" if module.token_level_loss else "sequence-mean",
        None if count is None else count / dp_size,
    )


def get_advantages_and_returns(theirs):
    """GAE of an experience; without a mask every token counts."""

    def ours(self, values, rewards, action_mask, gamma, lambd):
        mask = torch.ones_like(values, dtype=torch.bool) if action_mask is None else action_mask
        made = shared.advantages(rewards, values, mask, gamma, lambd, "zero")
        return theirs(self, values, rewards, action_mask, gamma, lambd) if made is None else made

    return ours


def log_exp_loss_forward(theirs):
    """-log sigmoid of the gap, which is the same and does not overflow."""

    def ours(self, chosen_reward, reject_reward, margin=None):
        return -torch.nn.functional.logsigmoid(chosen_reward - reject_reward).mean()

    return ours


COUNTS = "dp_size=1, batch_num_tokens=None, global_batch_size=None)"

LIBRARY = Library(
    name="openrlhf",
    distribution="openrlhf",
    versions=("0.11.2",),
    replace=(
        Replace(
            f"{UTILS}:log_probs_from_logits",
            log_probs_from_logits,
            "(logits, labels, temperature=1.0)",
            "one read of the logits, which stay as they are; float32 results, empty batches",
        ),
        Replace(
            f"{UTILS}:compute_entropy",
            shared.entropy_from_logits,
            "(logits)",
            "keeps no softmax for backward, compiles nothing; -inf logits give a finite entropy (theirs: "
            "NaN)",
        ),
        Replace(
            f"{LOSS}:PolicyLoss.forward",
            policy_loss_forward,
            f"(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, "
            f"{COUNTS}",
            "loss, gradient and metrics in one pass; a batch without tokens gives 0 (theirs: NaN)",
        ),
        Replace(
            f"{LOSS}:ValueLoss.forward",
            value_loss_forward,
            f"(self, values, old_values, returns, action_mask=None, {COUNTS}",
            "loss and gradient in one pass; a batch without tokens gives 0 (theirs: NaN)",
        ),
        Replace(
            f"{LOSS}:LogExpLoss.forward",
            log_exp_loss_forward,
            "(self, chosen_reward, reject_reward, margin=None)",
            "does not overflow to inf at a gap of 89 and more",
        ),
        Replace(
            f"{MAKER}:RemoteExperienceMaker.get_advantages_and_returns",
            get_advantages_and_returns,
            "(self, values, rewards, action_mask, gamma, lambd)",
            "one launch instead of a Python loop over tokens; masked entries are never read",
            optional=True,
        ),
    ),
    leave=(
        (f"{UTILS}:compute_approx_kl", "elementwise, with its own clamps and straight-through forms"),
        (f"{UTILS}:compute_reward", "elementwise"),
        (f"{UTILS}:masked_mean", "a mean; that of nothing stays NaN"),
        (f"{UTILS}:masked_normalize", "per row and without Bessel's correction: not our whitening"),
        (f"{LOSS}:PairWiseLoss", "log sigmoid of a gap; nothing to gain"),
    ),
)
