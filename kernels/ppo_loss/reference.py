"""The clipped policy loss and its gradient in plain torch, any float dtype: the definition."""

from typing import NamedTuple

import torch

from ..checks import result_dtype
from ..layout import layout, weights

LOG_RATIO_LIMIT = 20.0  # exp of more than this overflows sums in float32 long before it says anything
STATISTICS = ("clip_fraction", "approx_kl", "ratio", "advantage", "sequences", "tokens")


class Terms(NamedTuple):
    """Of each token: loss, d loss / d logp, ratio outside the clip (bool), k3 to the old policy, ratio, kl to the reference."""

    loss: torch.Tensor
    d_logp: torch.Tensor
    outside: torch.Tensor
    divergence: torch.Tensor
    ratio: torch.Tensor
    kl: torch.Tensor


def policy_terms(logp, old_logp, advantage, ref_logp, entropy, clip_ratio, kl_coeff, k1, entropy_coeff):
    """The objective of each token, unweighted, elementwise in the tensors' dtype; d loss / d entropy is -entropy_coeff.

    advantage: scaled and shifted already. ref_logp, entropy: None where there is no such term; kl is then 0. k1: bool.
    """
    difference = logp - old_logp
    log_ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantage, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantage
    loss = -torch.minimum(plain, clipped)
    # A NaN must stay visible in the gradient, so the comparison names the tokens without one.
    d_logp = torch.where((plain > clipped) | (difference.abs() > LOG_RATIO_LIMIT), 0, -plain)
    outside = (ratio < 1 - clip_ratio) | (ratio > 1 + clip_ratio)
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
    return Terms(loss, d_logp, outside, divergence, ratio, kl)


def ppo_loss(logp, old_logp, advantages, cu_seqlens, mask, clip_ratio, token_mean, normalizer, scale, shift):
    """See the op. Returns loss [], d loss / d logp shaped as logp, statistics [6]."""
    dtype = result_dtype(logp)
    rows = layout("ppo_loss", logp.numel(), cu_seqlens, mask)
    weight_N = weights(rows, token_mean, normalizer, dtype)

    def read(tensor):
        return torch.where(rows.valid_N, tensor.reshape(-1).to(dtype), 0)

    advantage_N = read(advantages)
    if scale is not None:
        advantage_N = advantage_N * scale
    if shift is not None:
        advantage_N = torch.where(rows.valid_N, advantage_N + shift, 0)
    difference_N = read(logp) - read(old_logp)
    log_ratio_N = difference_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_N = log_ratio_N.exp()
    plain_N = ratio_N * advantage_N
    clipped_N = ratio_N.clamp(1 - clip_ratio, 1 + clip_ratio) * advantage_N
    loss = -(weight_N * torch.minimum(plain_N, clipped_N)).sum()
    # A NaN must stay visible in the gradient, so the comparison names the tokens without one.
    flat_N = (plain_N > clipped_N) | (difference_N.abs() > LOG_RATIO_LIMIT)
    gradient_N = torch.where(flat_N, 0, -weight_N * plain_N)
    tokens = rows.count_B.sum().to(dtype)
    share = 1 / tokens.clamp(min=1)
    outside_N = rows.valid_N & ((ratio_N < 1 - clip_ratio) | (ratio_N > 1 + clip_ratio))
    divergence_N = torch.where(rows.valid_N, torch.expm1(log_ratio_N) - log_ratio_N, 0)
    statistics = torch.stack([
        outside_N.sum() * share, divergence_N.sum() * share, torch.where(rows.valid_N, ratio_N, 0).sum() * share,
        advantage_N.sum() * share, (rows.count_B > 0).sum().to(dtype), tokens])
    return loss, gradient_N.reshape(logp.shape), statistics
