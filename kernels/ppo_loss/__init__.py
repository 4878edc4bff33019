"""ppo_loss: the clipped policy loss.

The gradients are made in the forward pass; backward only scales them.
"""

from typing import Any

import torch

from .. import checks, direct
from ..dispatch import choose
from ..first_order import Gradients, first_order_only, refuse_tangents, track_inputs
from ..losses import KL_ESTIMATORS, REDUCTIONS, scaled
from .reference import STATISTICS, named

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    "ppo_loss(Tensor logp, Tensor old_logp, Tensor advantages, Tensor? ref_logp, Tensor? entropy, "
    "Tensor? cu_seqlens, Tensor? mask, float clip_ratio, float clip_high, float dual_clip, "
    "float kl_coeff, bool k1, float entropy_coeff, bool token_mean, Tensor? normalizer, Tensor? scale, "
    "Tensor? shift, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _run(logp: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    *arguments, impl = inputs
    function, _ = choose("ppo_loss", (logp,), impl)
    return function(logp, *arguments)


def _fake(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    ref_logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    *inputs: Any,
) -> tuple[torch.Tensor, ...]:
    shapes = ((), logp.shape, (0,) if entropy is None else logp.shape, (), (len(STATISTICS),))
    return tuple(logp.new_empty(shape, dtype=checks.result_dtype(logp)) for shape in shapes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logp, entropy = inputs[0], inputs[4]
    ctx.dtypes = (logp.dtype, None if entropy is None else entropy.dtype)
    ctx.save_for_backward(*output[1:4])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else every output's would be filled with zeros


@first_order_only("ppo_loss")
def _backward(ctx: Any, upstream: torch.Tensor | None, *_: None) -> Gradients:
    if upstream is None:
        return (None,) * 18
    gradient, entropy_gradient, inverse = ctx.saved_tensors
    to_logp, to_entropy = (
        scaled(values, inverse, upstream, dtype) if ctx.needs_input_grad[index] else None
        for index, values, dtype in zip((0, 4), (gradient, entropy_gradient), ctx.dtypes)
    )
    return (to_logp, None, None, None, to_entropy, *[None] * 13)


_lib.impl("ppo_loss", _run, "CompositeExplicitAutograd")
torch.library.register_fake("saferlhf_fast::ppo_loss", _fake, lib=_lib)
torch.library.register_autograd("saferlhf_fast::ppo_loss", _backward, setup_context=_setup, lib=_lib)
_call = direct.op("ppo_loss", _run, _setup, _backward)


def ppo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_ratio: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    kl_coeff: float = 0.0,
    kl_estimator: str = "k3",
    entropy: torch.Tensor | None = None,
    entropy_coeff: float = 0.0,
    reduction: str = "sequence-mean",
    normalizer: float | torch.Tensor | None = None,
    advantage_scale: float | torch.Tensor | None = None,
    advantage_shift: float | torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate of PPO with a KL term and an entropy bonus, to be minimised.

    Means the same as, with A = advantages * advantage_scale + advantage_shift and clamp(x) = x.clamp(-20,
    20)::

        ratio = clamp(logp - old_logp).exp()
        kl = logp - ref_logp                                                # k1, or
        kl = clamp(ref_logp - logp).exp() - 1 - clamp(ref_logp - logp)      # k3
        term = -torch.minimum(ratio * A, ratio.clamp(1 - clip_ratio, 1 + clip_high) * A)
        term = torch.where(A < 0, torch.minimum(term, -dual_clip * A), term)    # with dual_clip only
        loss = mean(term + kl_coeff * kl - entropy_coeff * entropy)

    Masked entries are never read.

    Args:
        logp: Log-probs, nats; packed [N] with `cu_seqlens` or padded [B, T] with `mask`; float32, bfloat16,
            float16 or float64.
        old_logp: Shaped as logp; log-probs of the policy that sampled.
        advantages: Shaped as logp.
        clip_ratio: How far below 1 (and, without clip_high, above) the ratio counts; >= 0.
        clip_high: How far above 1 the ratio counts; None for clip_ratio. DAPO's clip-higher has it larger.
        dual_clip: None, or a number > 1: the largest ratio that counts where A < 0.
        cu_seqlens: Offsets of packed rows, int32 [B+1], or None.
        mask: Valid tokens of padded rows, bool [B, T], or None.
        ref_logp: Shaped as logp, or None: log-probs of a reference policy, for a KL penalty in the loss.
            (safe-rlhf has it in the reward instead: `ppo_lag_advantage`.) With kl_coeff=0 it is only
            reported.
        kl_coeff: Coefficient of the KL term, per nat.
        kl_estimator: "k3" or "k1".
        entropy: Shaped as logp, or None: of each token's distribution, nats (`token_logprob`).
        entropy_coeff: Coefficient of the entropy bonus, per nat.
        reduction: "sequence-mean", the mean over sequences of each one's token mean (safe-rlhf; a sequence
            without a token counts for nothing), or "token-mean", the mean over valid tokens.
        normalizer: Number >= 0 or 0-d tensor that takes the place of the local count of sequences (or
            tokens), so that micro-batches and ranks add up to the global mean. 0 says that there is no token
            anywhere: loss and gradients are 0. A negative number or NaN in a tensor makes them NaN.
        advantage_scale: Number or 0-d tensor, or None for 1 (`ppo_lag_advantage`'s whitening).
        advantage_shift: Number or 0-d tensor, or None for 0.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        (loss [], stats), float64 for float64 logp, else float32. The gradient goes to logp and entropy only
        and is exactly 0 where masked; the policy term's is 0 also where clamp() cuts, the clip acts or
        dual_clip bounds the loss. stats are 0-d, over this call's valid tokens: clip_fraction (share of
        ratios outside 1 - clip_ratio .. 1 + clip_high), clipped (share where the clipped term is the larger
        loss: where the clip acts), approx_kl (mean of ratio - 1 - log ratio: k3), ratio, log_ratio (means, of
        the clamped one), advantage (mean, as used), sequences (with a token), tokens; with dual_clip also
        dual_clipped (share where it bounds the loss), with ref_logp ref_kl, with entropy entropy (means).

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, a number outside its range, a coefficient
            without its tensor.
        NotImplementedError: `impl` cannot run here.

    Source:
        Schulman et al. 2017, arXiv 1707.06347, eq. 7 and, with an entropy bonus, 9. clip_high: DAPO, arXiv
        2503.14476. dual_clip: Ye et al. 2020, arXiv 1912.09729, eq. 5. k1, k3:
        http://joschu.net/blog/kl-approx.html.
    """
    given = {"logp": logp, "old_logp": old_logp, "advantages": advantages}
    given |= {
        name: tensor for name, tensor in (("ref_logp", ref_logp), ("entropy", entropy)) if tensor is not None
    }
    checks.same_tokens("ppo_loss", list(given), list(given.values()))
    refuse_tangents("ppo_loss", logp, entropy)
    checks.one_of("ppo_loss", "reduction", reduction, REDUCTIONS)
    checks.one_of("ppo_loss", "kl_estimator", kl_estimator, KL_ESTIMATORS)
    clip = checks.clip("ppo_loss", clip_ratio, clip_high, dual_clip)
    kl_coeff = checks.coefficient("ppo_loss", "ref_logp", kl_coeff, ref_logp)
    entropy_coeff = checks.coefficient("ppo_loss", "entropy", entropy_coeff, entropy)
    checks.implementation("ppo_loss", impl)
    cu_seqlens, mask, _ = checks.rows("ppo_loss", "logp", logp.shape, logp.device, cu_seqlens, mask)
    loss, _, _, _, statistics = _call(
        logp,
        *map(checks.detached, (old_logp, advantages, ref_logp)),
        entropy,
        cu_seqlens,
        mask,
        *clip,
        kl_coeff,
        kl_estimator == "k1",
        entropy_coeff,
        reduction == "token-mean",
        checks.normalizer("ppo_loss", normalizer, logp),
        checks.scalar(advantage_scale, logp, "advantage_scale"),
        checks.scalar(advantage_shift, logp, "advantage_shift"),
        impl,
    )
    track_inputs(loss, logp, entropy)
    return loss, named(statistics, ref_kl=ref_logp, entropy=entropy, dual_clipped=dual_clip)
