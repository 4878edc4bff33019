"""The policy loss (clipped surrogate, KL, entropy) and its gradients in plain torch: the definition.

Any float dtype.
"""

from typing import NamedTuple

import torch

from ..checks import result_dtype
from ..layout import layout, shares
from ..losses import statistics, total

# The log ratio is bounded to this: its exp would overflow sums in float32, and a ratio that large means
# nothing.
LOG_RATIO_LIMIT = 20.0
STATISTICS = (
    "clip_fraction",
    "approx_kl",
    "ratio",
    "advantage",
    "ref_kl",
    "entropy",
    "clipped",
    "dual_clipped",
    "log_ratio",
    "sequences",
    "tokens",
)


def named(statistics: torch.Tensor, **optional: object) -> dict[str, torch.Tensor]:
    """The public stats dict of a statistics vector.

    Args:
        statistics: [11], in the order of STATISTICS.
        optional: Names of statistics that are reported only if the value here is not None.
    """
    return {
        name: value
        for name, value in zip(STATISTICS, statistics.unbind())
        if optional.get(name, 0) is not None
    }


class Terms(NamedTuple):
    """The objective of each token, and what is reported of it; all of one shape.

    Attributes:
        loss: Unweighted.
        d_logp: d loss / d logp.
        outside: The ratio is outside the clip; bool.
        divergence: k3 to the old policy, nats.
        ratio: Of the probabilities, new to old.
        kl: To the reference policy, nats.
        clipped: The clipped term is the larger loss; bool.
        dual_clipped: The dual clip bounds the loss; bool.
        log_ratio: Bounded to LOG_RATIO_LIMIT.
    """

    loss: torch.Tensor
    d_logp: torch.Tensor
    outside: torch.Tensor
    divergence: torch.Tensor
    ratio: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    dual_clipped: torch.Tensor
    log_ratio: torch.Tensor


def policy_terms(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    ref_logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    clip_ratio: float,
    clip_high: float,
    dual_clip: float,
    kl_coeff: float,
    k1: bool,
    entropy_coeff: float,
) -> Terms:
    """The objective of each token, elementwise in the tensors' dtype; d loss / d entropy is -entropy_coeff.

    Args:
        logp: Log-probs of the tokens, nats, of any shape, which all tensors have.
        old_logp: Log-probs of the policy that sampled, nats.
        advantage: Advantages, scaled and shifted already.
        ref_logp: Log-probs of the reference policy, nats; None for no KL term, kl is then 0.
        entropy: Entropy of each token's distribution, nats; None for no entropy term.
        clip_ratio: A ratio below 1 - clip_ratio is clipped to that.
        clip_high: A ratio above 1 + clip_high is clipped to that.
        dual_clip: The largest ratio that counts where the advantage is negative; infinity for no bound.
        kl_coeff: Coefficient of kl, per nat.
        k1: The KL estimator is k1, not k3.
        entropy_coeff: Coefficient of the entropy, per nat.

    Returns:
        The Terms, each shaped as logp and in its dtype, or bool.
    """
    difference = logp - old_logp
    log_ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantage, ratio.clamp(1 - clip_ratio, 1 + clip_high) * advantage
    worse = plain > clipped
    # min(-dual_clip * A, loss) where A < 0: the first one is the smaller where the ratio is above dual_clip,
    # which is above 1.
    bounded = (advantage < 0) & (ratio > dual_clip)
    loss = torch.where(bounded, -dual_clip * advantage, -torch.minimum(plain, clipped))
    # A NaN must stay visible in the gradient, so the comparison names the tokens without one.
    d_logp = torch.where(worse | bounded | (difference.abs() > LOG_RATIO_LIMIT), 0, -plain)
    outside = (ratio < 1 - clip_ratio) | (ratio > 1 + clip_high)
    divergence = torch.expm1(log_ratio) - log_ratio
    if ref_logp is None:
        kl = torch.zeros_like(loss)
    else:
        gap = ref_logp - logp
        near = gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        kl = -gap if k1 else torch.expm1(near) - near
        d_kl = torch.ones_like(gap) if k1 else torch.where(gap.abs() > LOG_RATIO_LIMIT, 0, -torch.expm1(near))
        loss, d_logp = loss + kl_coeff * kl, d_logp + kl_coeff * d_kl
    if entropy is not None:
        loss = loss - entropy_coeff * entropy
    return Terms(loss, d_logp, outside, divergence, ratio, kl, worse, bounded, log_ratio)


def ppo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    ref_logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    clip_ratio: float,
    clip_high: float,
    dual_clip: float,
    kl_coeff: float,
    k1: bool,
    entropy_coeff: float,
    token_mean: bool,
    normalizer: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and its gradients without the factor `inverse`.

    Args:
        logp: Log-probs of the tokens, nats, packed [N] or padded [B, T].
        old_logp: Log-probs of the policy that sampled, nats, shaped as logp.
        advantages: Shaped as logp, before scale and shift.
        ref_logp: Log-probs of the reference policy, nats, shaped as logp; None for no KL term.
        entropy: Entropy of each token's distribution, nats, shaped as logp; None for no entropy term.
        cu_seqlens: int32 [B+1], or None with a mask.
        mask: bool [B, T], or None with cu_seqlens.
        clip_ratio: A ratio below 1 - clip_ratio is clipped to that.
        clip_high: A ratio above 1 + clip_high is clipped to that.
        dual_clip: The largest ratio that counts where the advantage is negative; infinity for no bound.
        kl_coeff: Coefficient of the KL to the reference policy, per nat.
        k1: The KL estimator is k1, not k3.
        entropy_coeff: Coefficient of the entropy, per nat.
        token_mean: The mean over tokens; else the mean over sequences of each one's token mean.
        normalizer: 0-d count that the loss is divided by; None for that of this call.
        scale: 0-d factor of the advantages, or None.
        shift: 0-d summand of the advantages after the factor, or None.

    Returns:
        loss [], d loss / d logp shaped as logp, d loss / d entropy likewise ([0] without entropy), both
        without the factor inverse [], which follows, and statistics [11] in the order of STATISTICS. All are
        float64 for float64 logp, else float32.
    """
    dtype = result_dtype(logp)
    rows = layout("ppo_loss", logp.numel(), cu_seqlens, mask)
    share_N, inverse = shares(rows, token_mean, normalizer, dtype)

    def masked(token_N: torch.Tensor) -> torch.Tensor:
        return torch.where(rows.valid_N, token_N, 0)

    def read(tensor: torch.Tensor) -> torch.Tensor:
        return masked(tensor.reshape(-1).to(dtype))

    advantage_N, entropy_N = read(advantages), None if entropy is None else read(entropy)
    if scale is not None:
        advantage_N = advantage_N * scale
    if shift is not None:
        advantage_N = advantage_N + shift
    advantage_N = masked(advantage_N)
    terms = policy_terms(
        read(logp),
        read(old_logp),
        advantage_N,
        None if ref_logp is None else read(ref_logp),
        entropy_N,
        clip_ratio,
        clip_high,
        dual_clip,
        kl_coeff,
        k1,
        entropy_coeff,
    )
    loss = inverse * total(share_N * terms.loss)
    entropy_gradient = logp.new_empty(0, dtype=dtype)
    if entropy is not None:
        entropy_gradient = (-entropy_coeff * share_N).reshape(logp.shape)
    averaged = (
        terms.outside,
        terms.divergence,
        masked(terms.ratio),
        advantage_N,
        terms.kl,
        torch.zeros_like(advantage_N) if entropy_N is None else entropy_N,
        terms.clipped,
        terms.dual_clipped,
        terms.log_ratio,
    )
    return (
        loss,
        (share_N * terms.d_logp).reshape(logp.shape),
        entropy_gradient,
        inverse,
        statistics(rows, dtype, averaged),
    )
