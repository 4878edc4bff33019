"""The policy loss (clipped surrogate, KL, entropy) and its gradients in plain torch, any float dtype: the
definition.
"""

from typing import NamedTuple

import torch

from ..checks import result_dtype
from ..layout import layout, shares
from ..losses import statistics, total

LOG_RATIO_LIMIT = 20.0  # exp of more than this overflows sums in float32 long before it says anything
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


def named(statistics, **optional):
    """The public stats dict of statistics [11]; `optional` names those that are reported only where their
    value is not None.
    """
    return {
        name: value
        for name, value in zip(STATISTICS, statistics.unbind())
        if optional.get(name, 0) is not None
    }


class Terms(NamedTuple):
    """Of each token: loss, d loss / d logp, ratio outside the clip (bool), k3 to the old policy, ratio, kl to
    the reference, whether the clipped term is the larger loss, whether the dual clip bounds the loss, log
    ratio as clamped.
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
    logp,
    old_logp,
    advantage,
    ref_logp,
    entropy,
    clip_ratio,
    clip_high,
    dual_clip,
    kl_coeff,
    k1,
    entropy_coeff,
):
    """The objective of each token, unweighted, elementwise in the tensors' dtype; d loss / d entropy is
    -entropy_coeff.

    advantage: scaled and shifted already. ref_logp, entropy: None where there is no such term; kl is then 0.
    k1: bool. dual_clip: infinity where there is none.
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
    logp,
    old_logp,
    advantages,
    ref_logp,
    entropy,
    cu_seqlens,
    mask,
    clip_ratio,
    clip_high,
    dual_clip,
    kl_coeff,
    k1,
    entropy_coeff,
    token_mean,
    normalizer,
    scale,
    shift,
):
    """See the op.

    Returns loss [], d loss / d logp shaped as logp, d loss / d entropy likewise (or [0]), both without the
    factor `inverse` [], which follows, and statistics [11].
    """
    dtype = result_dtype(logp)
    rows = layout("ppo_loss", logp.numel(), cu_seqlens, mask)
    share_N, inverse = shares(rows, token_mean, normalizer, dtype)

    def real(token_N):
        return torch.where(rows.valid_N, token_N, 0)

    def read(tensor):
        return None if tensor is None else real(tensor.reshape(-1).to(dtype))

    advantage_N, entropy_N = read(advantages), read(entropy)
    if scale is not None:
        advantage_N = advantage_N * scale
    if shift is not None:
        advantage_N = advantage_N + shift
    advantage_N = real(advantage_N)
    terms = policy_terms(
        read(logp),
        read(old_logp),
        advantage_N,
        read(ref_logp),
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
        real(terms.ratio),
        advantage_N,
        terms.kl,
        torch.zeros_like(advantage_N) if entropy is None else entropy_N,
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
