"""What ppo_loss_from_logits and linear_ppo_loss share.

That is their arguments, each token's weight and advantage, the loss and its statistics. The work on a token
is `ppo_loss`'s own. Here it is prepared for kernels that need every token's weight before they know the loss,
since they write the gradient of the logits in the forward pass.
"""

from typing import NamedTuple

import torch

from . import checks
from .dispatch import choose
from .layout import flattened, weights
from .losses import KL_ESTIMATORS, REDUCTIONS

# float16: the largest weighted advantage is brought to 2^5 .. 2^6, far from both ends of the range
HALF_HEADROOM = 6
SCHEMA = (
    "Tensor ids, Tensor old_logp, Tensor advantages, Tensor? ref_logp, Tensor? cu_seqlens, Tensor? mask, "
    "float clip_ratio, float clip_high, float dual_clip, float kl_coeff, bool k1, float entropy_coeff, "
    "float temperature, Tensor? temperatures, float softcap, bool token_mean, Tensor? normalizer, "
    "Tensor? scale, Tensor? shift, str impl"
)
# What a kernel on rows takes of a policy: see `objective`.
Objective = tuple[float, float, float, float, bool, float, float, torch.Tensor | None, float]


class Policy(NamedTuple):
    """The arguments of SCHEMA, in its order; token tensors are packed [N] or padded [B, T].

    Their meaning is that of the public arguments (`ppo_loss`). k1: the KL estimator is k1, not k3.
    temperature_N: one for each token, [N]; then `temperature` is 1. scale, shift: of the advantages, 0-d.
    """

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
    """What the kernels on rows take, flat.

    Attributes:
        old_logp_N: Log-probs of the policy that sampled.
        advantage_N: Scaled and shifted.
        ref_logp_N: Log-probs of the reference policy, or None.
        weight_N: The token's weight in the loss; 0 where masked.
        unscale: 0-d factor of the gradient, in float32; None for 1. It is other than 1 only in float16.
    """

    old_logp_N: torch.Tensor
    advantage_N: torch.Tensor
    ref_logp_N: torch.Tensor | None
    weight_N: torch.Tensor
    unscale: torch.Tensor | None


def arguments(
    op: str,
    like: torch.Tensor,
    ids: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_ratio: float,
    clip_high: float | None,
    dual_clip: float | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    kl_coeff: float,
    kl_estimator: str,
    entropy_coeff: float,
    temperature: float | torch.Tensor,
    softcap: float | None,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    advantage_scale: float | torch.Tensor | None,
    advantage_shift: float | torch.Tensor | None,
    impl: str,
) -> Policy:
    """Checks a public call's arguments, which are those of `ppo_loss` and `token_logprob`.

    Args:
        op: Name of the op, for messages.
        like: A tensor on the op's device; the op computes in its `result_dtype`.
        ids: The tokens, integers, packed [N] or padded [B, T].
        old_logp: Log-probs of the policy that sampled, nats, shaped as ids.
        advantages: Shaped as ids, before scale and shift.
        clip_ratio: A ratio below 1 - clip_ratio is clipped to that.
        clip_high: A ratio above 1 + clip_high is clipped to that; None for clip_ratio.
        dual_clip: The largest ratio that counts where the advantage is negative; None for no bound.
        cu_seqlens: Offsets of packed rows, integers [B+1], or None.
        mask: Valid tokens of padded rows, bool [B, T], or None.
        ref_logp: Log-probs of the reference policy, nats, shaped as ids; None for no KL term.
        kl_coeff: Coefficient of the KL to the reference policy, per nat.
        kl_estimator: One of KL_ESTIMATORS.
        entropy_coeff: Coefficient of the entropy, per nat.
        temperature: > 0, a number, or a tensor, 0-d or shaped as ids.
        softcap: Cap of the logits, > 0; None for none.
        reduction: One of REDUCTIONS.
        normalizer: Count that the loss is divided by, a number or 0-d; None for that of this call.
        advantage_scale: Factor of the advantages, a number or 0-d; None for 1.
        advantage_shift: Summand of the advantages after the factor; None for 0.
        impl: "auto" or the name of an implementation.

    Returns:
        The arguments as the op takes them: tensors without history, 0-d tensors and numbers instead of None.

    Raises:
        ValueError: An argument that does not fit.
    """
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
    kl_coeff = checks.coefficient(op, "ref_logp", kl_coeff, like)
    entropy_coeff = checks.coefficient(op, "entropy", entropy_coeff, like)
    if ref_logp is None and kl_coeff:
        raise ValueError(
            f"{op}: ref_logp: expected the reference's log-probs with kl_coeff {kl_coeff}, got None"
        )
    checks.implementation(op, impl)
    cu_seqlens, mask, _ = checks.rows(op, "old_logp", old_logp.shape, like.device, cu_seqlens, mask)
    one_temperature, temperature_N = checks.temperature(op, temperature, ids.shape, like)
    return Policy(
        checks.as_int32_or_int64(ids),
        old_logp.detach(),
        advantages.detach(),
        checks.detached(ref_logp),
        cu_seqlens,
        mask,
        *clip,
        kl_coeff,
        kl_estimator == "k1",
        entropy_coeff,
        one_temperature,
        temperature_N,
        checks.softcap(op, softcap),
        reduction == "token-mean",
        checks.normalizer(op, normalizer, like),
        checks.scalar(advantage_scale, like, "advantage_scale"),
        checks.scalar(advantage_shift, like, "advantage_shift"),
        impl,
    )


def objective(policy: Policy) -> Objective:
    """What a kernel on rows takes.

    (clip_ratio, clip_high, dual_clip, kl_coeff, k1, entropy_coeff, temperature, temperature_N, softcap).
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


def weighted(
    op: str, policy: Policy, gradient_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[Weighted, torch.Tensor]:
    """The tokens with their weights, flat. No host sync. What is masked stays as it is: no kernel reads it.

    In float16 a gradient over 1/Z flushes to zero (93 % of d logits at V = 32000). There the weights are
    multiplied by a power of two that brings the largest weighted advantage near 2^6, and `unscale` undoes it,
    in float32, in backward.

    Args:
        op: Name of the op, for messages.
        policy: The arguments of the call.
        gradient_dtype: In which the gradient will be written.
        dtype: In which the op computes.

    Returns:
        The tokens, and valid_N (bool).
    """
    weight_N, valid_N = weights(
        op, policy.ids.numel(), policy.cu_seqlens, policy.mask, policy.token_mean, policy.normalizer, dtype
    )

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        return flattened(tensor, policy.ids.numel()).to(dtype)

    advantage_N = flat(policy.advantages)
    if policy.scale is not None:
        advantage_N = advantage_N * policy.scale
    if policy.shift is not None:
        advantage_N = advantage_N + policy.shift
    unscale = None
    if gradient_dtype == torch.float16 and weight_N.numel():
        sizes_N = advantage_N.abs() + abs(policy.kl_coeff) + abs(policy.entropy_coeff)
        size = torch.where(valid_N, weight_N * sizes_N, 0).amax()
        exponent = (HALF_HEADROOM - torch.frexp(size).exponent).clamp(-60, 60)
        one = torch.ones_like(size)
        weight_N, unscale = weight_N * torch.ldexp(one, exponent), torch.ldexp(one, -exponent)
    ref_logp_N = None if policy.ref_logp is None else flat(policy.ref_logp)
    return Weighted(flat(policy.old_logp), advantage_N, ref_logp_N, weight_N, unscale), valid_N


def loss_of(
    policy: Policy, logp_N: torch.Tensor, entropy_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and statistics of `ppo_loss`, from log-probs and entropies that are known.

    That is one more launch on N numbers.

    Args:
        policy: The arguments of the call.
        logp_N: Log-probs, nats.
        entropy_N: Entropies, nats.

    Returns:
        loss [] and statistics [11].
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
