"""OpenRLHF 0.11: log-probs, entropies, GAE, the policy and value losses, the log-exp pair loss.

For a temperature other than 1 its log-prob divides the logits in place; our op leaves them unchanged.
"""

from typing import Any

import torch

from ..kernels.token_logprob import token_logprob
from . import shared
from .registry import Library, LibraryFunction, Replace

UTILS = "openrlhf.models.utils"
LOSS = "openrlhf.models.loss"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"


def log_probs_from_logits(original: LibraryFunction) -> LibraryFunction:
    """(logits, labels) -> log-probs in float32."""

    def replacement(
        logits: torch.Tensor, labels: torch.Tensor, temperature: float | torch.Tensor = 1.0
    ) -> torch.Tensor:
        if not shared.one_id_each(logits, labels) or not shared.one_temperature(temperature):
            return original(logits, labels, temperature)
        shared.known_ids("log_probs_from_logits: labels: expected", labels, logits.shape[-1])
        return token_logprob(logits, labels, temperature=temperature)

    return replacement


def policy_loss_forward(original: LibraryFunction) -> LibraryFunction:
    """PolicyLoss.forward of the plain PPO kind; GSPO and corrections for rollout mismatch stay OpenRLHF's."""

    def replacement(
        self: Any,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        advantages: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        rollout_log_probs: torch.Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Any, ...]:
        counts = dp_size, batch_num_tokens, global_batch_size
        result = None
        if (
            self.policy_loss_type == "ppo"
            and self.is_correction_level == "off"
            and _counts_fit(self, action_mask, *counts)
        ):
            reduction, normalizer = _aggregation(self, *counts)
            result = shared.policy_loss(
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
        if result is None:
            return original(
                self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, *counts
            )
        loss, stats = result
        # OpenRLHF's KL metric takes the log-ratio as it is; our op clamps it to ±20, as the ratio.
        mask = None if action_mask is None else shared.flags(action_mask)
        assert mask is not None, "our policy loss takes no weights as a mask"
        with torch.no_grad():
            difference = torch.where(mask, old_log_probs - log_probs, 0.0)
            return loss, stats["clipped"], difference.sum() / stats["tokens"].clamp(min=1), None, None

    return replacement


def value_loss_forward(original: LibraryFunction) -> LibraryFunction:
    """ValueLoss.forward."""

    def replacement(
        self: Any,
        values: torch.Tensor,
        old_values: torch.Tensor,
        returns: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> torch.Tensor:
        counts = dp_size, batch_num_tokens, global_batch_size
        result = None
        if _counts_fit(self, action_mask, *counts):
            reduction, normalizer = _aggregation(self, *counts)
            result = shared.critic_loss(
                values,
                old_values,
                returns,
                action_mask,
                clip_value=float("inf") if self.clip_eps is None else self.clip_eps,
                reduction=reduction,
                normalizer=normalizer,
            )
        if result is None:
            return original(self, values, old_values, returns, action_mask, *counts)
        return result[0]

    return replacement


def _counts_fit(
    module: Any,
    mask: torch.Tensor | None,
    dp_size: int,
    batch_num_tokens: float | None,
    global_batch_size: float | None,
) -> bool:
    count = batch_num_tokens if module.token_level_loss else global_batch_size
    if mask is None or not shared.given(mask):
        return False
    return count is None or (shared.numbers(dp_size) and dp_size > 0 and shared.counts_fit(mask, count))


def _aggregation(
    module: Any, dp_size: int, batch_num_tokens: float | None, global_batch_size: float | None
) -> tuple[str, float | None]:
    """Its token or sequence means as our (reduction, normalizer); dp_size divides a global count alone."""
    count = batch_num_tokens if module.token_level_loss else global_batch_size
    return (
        "token-mean" if module.token_level_loss else "sequence-mean",
        None if count is None else count / dp_size,
    )


def get_advantages_and_returns(original: LibraryFunction) -> LibraryFunction:
    """GAE of an experience; without a mask every token counts."""

    def replacement(
        self: Any,
        values: torch.Tensor,
        rewards: torch.Tensor,
        action_mask: torch.Tensor | None,
        gamma: float,
        lambd: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones_like(values, dtype=torch.bool) if action_mask is None else action_mask
        result = shared.advantages(rewards, values, mask, gamma, lambd, "zero")
        return original(self, values, rewards, action_mask, gamma, lambd) if result is None else result

    return replacement


def log_exp_loss_forward(original: LibraryFunction) -> LibraryFunction:
    """-log sigmoid of the gap: the same value as log(1 + exp(-gap)), without its overflow."""

    def replacement(
        self: Any, chosen_reward: torch.Tensor, reject_reward: torch.Tensor, margin: Any = None
    ) -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(chosen_reward - reject_reward).mean()

    return replacement


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
            dtype_of=("logits", "temperature"),
        ),
        Replace(
            f"{UTILS}:compute_entropy",
            shared.entropy_from_logits,
            "(logits)",
            "keeps no softmax for backward, compiles nothing; -inf logits give a finite entropy (its own: "
            "NaN)",
            dtype_of=("logits",),
        ),
        Replace(
            f"{LOSS}:PolicyLoss.forward",
            policy_loss_forward,
            f"(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, "
            f"{COUNTS}",
            "loss, gradient and metrics in one pass; a batch without tokens gives 0 (its own: NaN)",
            dtype_of=("log_probs", "old_log_probs", "advantages", "action_mask"),
            metrics=(1,),
        ),
        Replace(
            f"{LOSS}:ValueLoss.forward",
            value_loss_forward,
            f"(self, values, old_values, returns, action_mask=None, {COUNTS}",
            "loss and gradient in one pass; a batch without tokens gives 0 (its own: NaN)",
            dtype_of=("values", "old_values", "returns", "action_mask"),
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
            dtype_of=("values", "rewards", "action_mask"),
        ),
    ),
    leave=(
        (f"{UTILS}:compute_approx_kl", "elementwise, with its own clamps and straight-through forms"),
        (f"{UTILS}:compute_reward", "elementwise"),
        (f"{UTILS}:masked_mean", "a mean; that of nothing stays NaN"),
        (
            f"{UTILS}:masked_normalize",
            "whitens per row and without Bessel's correction, which our whitening does not",
        ),
        (f"{LOSS}:PairWiseLoss", "log sigmoid of a gap; nothing to gain"),
    ),
)
