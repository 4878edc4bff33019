"""linear_ppo_loss: the clipped policy loss on hidden states. Its gradients are made in the forward pass:

three products.
"""

import torch

from .. import checks
from .. import policy as shared
from ..dispatch import choose
from ..first_order import first_order_only, learns, refuse_tangents, track_inputs
from ..linear import held, scaled
from ..ppo_loss.reference import STATISTICS, named

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    f"linear_ppo_loss(Tensor hidden, Tensor weight, Tensor? bias, bool[] wanted, int? chunk_tokens, "
    f"{shared.SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _run(hidden_NH, weight_VH, bias_V, wanted, chunk_tokens, *rest):
    policy, op = shared.Policy(*rest), "linear_ppo_loss"
    dtype = checks.result_dtype(hidden_NH)
    ids_N = policy.ids.reshape(-1)
    tokens, valid_N = shared.weighted(op, policy, hidden_NH.dtype, dtype)
    checks.known_ids(op, ids_N, weight_VH.shape[0], valid_N)
    checks.known_temperatures(op, policy.temperature_N, valid_N)
    # Masked rows may hold anything, and 0 times NaN would reach d weight.
    hidden_NH = torch.where(valid_N[:, None], hidden_NH, 0)
    made = (None, None, None)
    if any(wanted):
        function, _ = choose(op, (hidden_NH,), policy.impl)
        logp_N, entropy_N, made = function(
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
    made = [
        hidden_NH.new_empty(0, dtype=kind) if gradient is None else gradient
        for gradient, kind in zip(made, (held(hidden_NH.dtype), dtype, dtype))
    ]
    return loss, *made, unscale, statistics


def _fake(hidden_NH, weight_VH, bias_V, wanted, *rest):
    dtype = checks.result_dtype(hidden_NH)
    made = [
        hidden_NH.new_empty(source.shape if want else (0,), dtype=kind)
        for want, source, kind in zip(
            wanted, (hidden_NH, weight_VH, bias_V), (held(hidden_NH.dtype), dtype, dtype)
        )
    ]
    return (
        hidden_NH.new_empty((), dtype=dtype),
        *made,
        hidden_NH.new_empty((), dtype=dtype),
        hidden_NH.new_empty(len(STATISTICS), dtype=dtype),
    )


def _setup(ctx, inputs, output):
    _, weight_VH, _, ctx.wanted = inputs[:4]
    ctx.kinds = (inputs[0].dtype, weight_VH.dtype, weight_VH.dtype)
    ctx.save_for_backward(*output[1:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else every output's would be filled with zeros: a second d weight


@first_order_only("linear_ppo_loss")
def _backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * (5 + len(shared.Policy._fields))
    *made, unscale = ctx.saved_tensors
    factor = upstream * unscale
    d_hidden, d_weight, d_bias = (
        scaled(gradient, factor, kind) if want else None
        for gradient, kind, want in zip(made, ctx.kinds, ctx.wanted)
    )
    return d_hidden, d_weight, d_bias, *[None] * (2 + len(shared.Policy._fields))


_lib.impl("linear_ppo_loss", _run, "CompositeExplicitAutograd")
torch.library.register_fake("saferlhf_fast::linear_ppo_loss", _fake, lib=_lib)
torch.library.register_autograd("saferlhf_fast::linear_ppo_loss", _backward, setup_context=_setup, lib=_lib)


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

        logp, entropy = linear_logprob(hidden, weight, ids, bias=bias, temperature=temperature, softcap=softcap,
                                       return_entropy=True)
        loss, stats = ppo_loss(logp, old_logp, advantages, entropy=entropy, ...)     # the other arguments as given

    with three matrix products for loss and gradients instead of four, and no logits but those of one chunk:
    what the gradient needs of a token (its log-prob, old log-prob, advantage, mask) is known when its logits
    are.

    hidden: [N, H] with cu_seqlens or [B, T, H] with mask, row t predicting ids[t]; weight [V, H]; bias [V] or
    None; fp32, bf16 or fp16 (float64: the reference). ids, old_logp, advantages, ref_logp: packed [N] or
    padded [B, T]; the other arguments as in `ppo_loss`; temperature, softcap, chunk_tokens as in
    `linear_logprob`. Masked rows change nothing, whatever they hold, but cost as much as others: pack them
    away. The old log-probs and the normaliser must be known beforehand: `normalizer` counts all micro-batches
    and ranks.

    Returns (loss [], stats): stats as in `ppo_loss`, with `entropy` (mean over valid tokens) and, with
    ref_logp, `ref_kl`. The gradient goes to hidden, weight and bias, those of them that require it; d weight
    is held in float32 from forward to backward, which multiplies by the upstream scalar and rounds once. In
    float16 they are held times a power of two. Under ZeRO-3 call it inside the head module's own forward.
    Inside an activation-checkpointed region the gradients would be made twice: call it outside. Raises
    ValueError as `linear_logprob`.
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
    wanted = [learns(tensor) for tensor in (hidden, weight, bias)]
    loss, *_, statistics = torch.ops.saferlhf_fast.linear_ppo_loss(
        hidden.reshape(ids.numel(), hidden.shape[-1]), weight, bias, wanted, chunk_tokens, *policy
    )
    track_inputs(loss, hidden, weight, bias)
    return loss, named(statistics, ref_kl=ref_logp, dual_clipped=dual_clip)
