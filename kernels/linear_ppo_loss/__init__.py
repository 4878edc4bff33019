"""linear_ppo_loss: the clipped policy loss on hidden states, with its gradients made in the forward pass."""

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks, direct
from .. import policy as shared
from ..dispatch import choose
from ..first_order import Gradients, first_order_only, needs_gradient, refuse_tangents, track_inputs
from ..layout import flattened
from ..linear import HeadGradients, scaled, stored_dtype
from ..ppo_loss.reference import STATISTICS, named

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    "linear_ppo_loss(Tensor hidden, Tensor weight, Tensor? bias, bool[] wanted, int? chunk_tokens, "
    f"{shared.SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _run(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    *policy_arguments: Any,
) -> tuple[torch.Tensor, ...]:
    policy, op = shared.Policy(*policy_arguments), "linear_ppo_loss"
    dtype = checks.result_dtype(hidden_NH)
    ids_N = policy.ids.reshape(-1)
    tokens, valid_N = shared.weighted(op, policy, hidden_NH.dtype, dtype)
    checks.known_ids(op, ids_N, weight_VH.shape[0], valid_N)
    checks.known_temperatures(op, policy.temperature_N, valid_N)
    # Masked rows may hold anything, and 0 times NaN would reach d weight.
    hidden_NH = torch.where(valid_N[:, None], hidden_NH, 0)
    gradients: HeadGradients = (None, None, None)
    if any(wanted):
        function, _ = choose(op, (hidden_NH,), policy.impl)
        logp_N, entropy_N, gradients = function(
            hidden_NH, weight_VH, ids_N, bias_V, tokens[:4], shared.objective(policy), wanted, chunk_tokens
        )
    else:
        function, _ = choose("linear_logprob", (hidden_NH,), policy.impl)
        logp_N, entropy_N, _ = function(
            hidden_NH,
            weight_VH,
            torch.where(valid_N, ids_N, 0),
            bias_V,
            policy.temperature,
            policy.temperature_N,
            policy.softcap,
            True,
            chunk_tokens,
            False,
        )
    loss, statistics = shared.loss_of(policy, logp_N, entropy_N)
    unscale = torch.ones_like(loss) if tokens.unscale is None else tokens.unscale
    outputs = [
        hidden_NH.new_empty(0, dtype=stored) if gradient is None else gradient
        for gradient, stored in zip(gradients, (stored_dtype(hidden_NH.dtype), dtype, dtype))
    ]
    return loss, *outputs, unscale, statistics


def _fake(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    wanted: Sequence[bool],
    *settings: Any,
) -> tuple[torch.Tensor, ...]:
    dtype = checks.result_dtype(hidden_NH)
    gradients = [
        hidden_NH.new_empty((0,) if source is None or not want else source.shape, dtype=stored)
        for want, source, stored in zip(
            wanted, (hidden_NH, weight_VH, bias_V), (stored_dtype(hidden_NH.dtype), dtype, dtype)
        )
    ]
    return (
        hidden_NH.new_empty((), dtype=dtype),
        *gradients,
        hidden_NH.new_empty((), dtype=dtype),
        hidden_NH.new_empty(len(STATISTICS), dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, weight_VH, _, ctx.wanted = inputs[:4]
    ctx.dtypes = (inputs[0].dtype, weight_VH.dtype, weight_VH.dtype)
    ctx.save_for_backward(*output[1:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else every output's would be filled with zeros: a second d weight


@first_order_only("linear_ppo_loss")
def _backward(ctx: Any, upstream: torch.Tensor | None, *_: None) -> Gradients:
    if upstream is None:
        return (None,) * (5 + len(shared.Policy._fields))
    *gradients, unscale = ctx.saved_tensors
    factor = upstream * unscale
    d_hidden, d_weight, d_bias = (
        scaled(gradient, factor, dtype) if want else None
        for gradient, dtype, want in zip(gradients, ctx.dtypes, ctx.wanted)
    )
    return d_hidden, d_weight, d_bias, *[None] * (2 + len(shared.Policy._fields))


_lib.impl("linear_ppo_loss", _run, "CompositeExplicitAutograd")
torch.library.register_fake("saferlhf_fast::linear_ppo_loss", _fake, lib=_lib)
torch.library.register_autograd("saferlhf_fast::linear_ppo_loss", _backward, setup_context=_setup, lib=_lib)
_call = direct.op("linear_ppo_loss", _run, _setup, _backward)


def linear_ppo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_ratio: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    kl_coeff: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coeff: float = 0.0,
    temperature: float | torch.Tensor = 1.0,
    reduction: str = "sequence-mean",
    normalizer: float | torch.Tensor | None = None,
    advantage_scale: float | torch.Tensor | None = None,
    advantage_shift: float | torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped policy loss, a KL term and an entropy bonus from hidden states and the head's weight.

    Means the same as::

        logp, entropy = linear_logprob(hidden, weight, ids, bias=bias, temperature=temperature,
                                       softcap=softcap, return_entropy=True)
        loss, stats = ppo_loss(logp, old_logp, advantages, entropy=entropy, ...)   # the others as given

    with three matrix products for loss and gradients instead of four, and no logits but those of one chunk:
    what the gradient needs of a token (its log-prob, old log-prob, advantage, mask) is known when its logits
    are. Under ZeRO-3 call it inside the head module's own forward. Inside an activation-checkpointed region
    the gradients would be made twice: call it outside.

    Args:
        hidden: [N, H] with cu_seqlens or [B, T, H] with mask, row t predicting ids[t]; float32, bfloat16 or
            float16 (float64: the reference). Masked rows change nothing, whatever they hold, but cost as much
            as others: leave them out.
        weight: [V, H], of the same dtype.
        ids: Packed [N] or padded [B, T], integers; as in `token_logprob`.
        old_logp: Shaped as ids; log-probs of the policy that sampled, which must be known beforehand.
        advantages: Shaped as ids.
        clip_ratio: As in `ppo_loss`.
        clip_high: As in `ppo_loss`.
        dual_clip: As in `ppo_loss`.
        bias: [V], of the same dtype, or None.
        softcap: As in `token_logprob`.
        cu_seqlens: As in `ppo_loss`.
        mask: As in `ppo_loss`.
        ref_logp: Shaped as ids, or None; as in `ppo_loss`.
        kl_coeff: As in `ppo_loss`.
        kl_estimator: As in `ppo_loss`.
        entropy_coeff: As in `ppo_loss`.
        temperature: As in `token_logprob`.
        reduction: As in `ppo_loss`.
        normalizer: As in `ppo_loss`; it counts all micro-batches and ranks.
        advantage_scale: As in `ppo_loss`.
        advantage_shift: As in `ppo_loss`.
        chunk_tokens: As in `linear_logprob`.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        (loss [], stats): stats as in `ppo_loss`, with `entropy` (mean over valid tokens) and, with ref_logp,
        `ref_kl`. The gradient goes to hidden, weight and bias, those of them that require it. d weight is
        kept in float32 from forward to backward, which multiplies it by the upstream scalar and rounds once;
        in float16 the gradients are kept times a power of two.

    Raises:
        ValueError: Arguments that do not fit, and ids outside the vocabulary on the CPU (on a device: NaN).
        NotImplementedError: `impl` cannot run here.
    """
    op = "linear_ppo_loss"
    checks.head(op, hidden, weight, ids, bias)
    refuse_tangents(op, hidden, weight, bias)
    checks.chunk_tokens(op, chunk_tokens)
    policy = shared.arguments(
        op,
        hidden,
        ids,
        old_logp,
        advantages,
        clip_ratio=clip_ratio,
        clip_high=clip_high,
        dual_clip=dual_clip,
        cu_seqlens=cu_seqlens,
        mask=mask,
        ref_logp=ref_logp,
        kl_coeff=kl_coeff,
        kl_estimator=kl_estimator,
        entropy_coeff=entropy_coeff,
        temperature=temperature,
        softcap=softcap,
        reduction=reduction,
        normalizer=normalizer,
        advantage_scale=advantage_scale,
        advantage_shift=advantage_shift,
        impl=impl,
    )
    wanted = [needs_gradient(tensor) for tensor in (hidden, weight, bias)]
    flat = flattened(hidden, ids.numel(), hidden.shape[-1])
    loss, *_, statistics = _call(flat, weight, bias, wanted, chunk_tokens, *policy)
    track_inputs(loss, hidden, weight, bias)
    return loss, named(statistics, ref_kl=ref_logp, dual_clipped=dual_clip)
