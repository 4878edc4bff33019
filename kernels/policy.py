"""What ppo_loss_from_logits and linear_ppo_loss share: their arguments, each token's weight and advantage,
loss and statistics.

The token-level work is `ppo_loss`'s own; here it is prepared for kernels that need every token's weight
before they know the loss, since they write the gradient of the logits in the forward pass.
"""

from typing import NamedTuple

import torch

from . import checks
from .dispatch import choose
from .layout import layout, weights
from .losses import KL_ESTIMATORS, REDUCTIONS

# float16: the largest weighted advantage is brought to 2^5 .. 2^6, far from both ends of the range
HALF_HEADROOM = 6
SCHEMA = (
    "Tensor ids, Tensor old_logp, Tensor advantages, Tensor? ref_logp, Tensor? cu_seqlens, Tensor? mask, "
    "float clip_ratio, float clip_high, float dual_clip, float kl_coeff, bool k1, float entropy_coeff, float "
    "temperature, "
    "Tensor? temperatures, float softcap, bool token_mean, Tensor? normalizer, Tensor? scale, Tensor? shift, "
    "str impl"
)


class Policy(NamedTuple):
    """The arguments of SCHEMA, in its order; token tensors are packed [N] or padded [B, T]."""

    ids: torch.Tensor
    old_logp: torch.Tensor
    advantages: torch.Tensor
    ref_logp: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    mask: torch.Tensor | None
    clip_ratio: float
    clip_high: float
    dual_clip: float
    kl_coeff: float
    k1: bool
    entropy_coeff: float
    temperature: float
    temperature_N: torch.Tensor | None
    softcap: float
    token_mean: bool
    normalizer: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    impl: str


class Weighted(NamedTuple):
    """What the row kernels take, flat: old_logp_N, advantage_N (scaled and shifted), ref_logp_N or None,
    weight_N (0 where masked), and unscale: 0-d, what the gradient has to be multiplied with in float32 (1 but
    in float16), or None for 1.
    """

    old_logp_N: torch.Tensor
    advantage_N: torch.Tensor
    ref_logp_N: torch.Tensor | None
    weight_N: torch.Tensor
    unscale: torch.Tensor | None


def arguments(
    op,
    like,
    ids,
    old_logp,
    advantages,
    *,
    clip_ratio,
    clip_high,
    dual_clip,
    cu_seqlens,
    mask,
    ref_logp,
    kl_coeff,
    kl_estimator,
    entropy_coeff,
    temperature,
    softcap,
    reduction,
    normalizer,
    advantage_scale,
    advantage_shift,
    impl,
):
    """Checks a public call's arguments -> Policy. like: a tensor of the computation's dtype and device."""
    tokens = (old_logp, advantages) if ref_logp is None else (old_logp, advantages, ref_logp)
    checks.same_tokens(op, ("old_logp", "advantages", "ref_logp"), tokens)
    if old_logp.shape != ids.shape or old_logp.device != like.device:
        raise ValueError(
            f"{op}: old_logp: expected shape {tuple(ids.shape)} as ids on {like.device}, "
            f"got {tuple(old_logp.shape)} on {old_logp.device}"
        )
    checks.one_of(op, "reduction", reduction, REDUCTIONS)
    checks.one_of(op, "kl_estimator", kl_estimator, KL_ESTIMATORS)
    clip = checks.clip(op, clip_ratio, clip_high, dual_clip)
    if ref_logp is None and kl_coeff:
        raise ValueError(
            f"{op}: ref_logp: expected the reference's log-probs with kl_coeff {kl_coeff}, got None"
        )
    cu_seqlens, mask, _ = checks.rows(op, "old_logp", old_logp.shape, like.device, cu_seqlens, mask)
    temperature, temperature_N = checks.temperature(op, temperature, ids.shape, like)
    old_logp, advantages = old_logp.detach(), advantages.detach()
    ref_logp = None if ref_logp is None else ref_logp.detach()
    return Policy(
        checks.wide(ids),
        old_logp,
        advantages,
        ref_logp,
        cu_seqlens,
        mask,
        *clip,
        kl_coeff,
        kl_estimator == "k1",
        entropy_coeff,
        temperature,
        temperature_N,
        checks.softcap(op, softcap),
        reduction == "token-mean",
        checks.normalizer(op, normalizer, like),
        checks.scalar(advantage_scale, like, "advantage_scale"),
        checks.scalar(advantage_shift, like, "advantage_shift"),
        impl,
    )


def objective(policy):
    """What a row kernel takes: clip_ratio, clip_high, dual_clip, kl_coeff, k1, entropy_coeff, temperature,
    temperature_N, softcap.
    """
    return (
        policy.clip_ratio,
        policy.clip_high,
        policy.dual_clip,
        policy.kl_coeff,
        policy.k1,
        policy.entropy_coeff,
        policy.temperature,
        policy.temperature_N,
        policy.softcap,
    )


def weighted(op, policy, gradient_dtype, dtype):
    """Flat tokens with their weights -> (Weighted, valid_N). No host sync.

    In float16 a gradient over 1/Z flushes to zero (93 % of d logits at V = 32000): there the weights are
    multiplied by a power of two that brings the largest weighted advantage near 2^6, and `unscale` undoes it,
    in float32, in backward.
    """
    rows = layout(op, policy.ids.numel(), policy.cu_seqlens, policy.mask)
    weight_N = weights(rows, policy.token_mean, policy.normalizer, dtype)

    def flat(tensor):
        return None if tensor is None else torch.where(rows.valid_N, tensor.reshape(-1).to(dtype), 0)

    advantage_N = flat(policy.advantages)
    if policy.scale is not None:
        advantage_N = advantage_N * policy.scale
    if policy.shift is not None:
        advantage_N = torch.where(rows.valid_N, advantage_N + policy.shift, 0)
    unscale = None
    if gradient_dtype == torch.float16 and weight_N.numel():
        size = (weight_N * (advantage_N.abs() + abs(policy.kl_coeff) + abs(policy.entropy_coeff))).amax()
        exponent = (HALF_HEADROOM - torch.frexp(size).exponent).clamp(-60, 60)
        one = torch.ones_like(size)
        weight_N, unscale = weight_N * torch.ldexp(one, exponent), torch.ldexp(one, -exponent)
    return Weighted(
        flat(policy.old_logp), advantage_N, flat(policy.ref_logp), weight_N, unscale
    ), rows.valid_N


def loss_of(policy, logp_N, entropy_N):
    """(loss [], statistics [11]) of `ppo_loss` on log-probs and entropies that are known: one more launch on
    N numbers.
    """
    shape = policy.ids.shape
    function, _ = choose("ppo_loss", (logp_N,), policy.impl)
    loss, _, _, _, statistics = function(
        logp_N.reshape(shape),
        policy.old_logp,
        policy.advantages,
        policy.ref_logp,
        entropy_N.reshape(shape),
        policy.cu_seqlens,
        policy.mask,
        policy.clip_ratio,
        policy.clip_high,
        policy.dual_clip,
        policy.kl_coeff,
        policy.k1,
        policy.entropy_coeff,
        policy.token_mean,
        policy.normalizer,
        policy.scale,
        policy.shift,
    )
    return loss, statistics
