"""ppo_loss_from_logits: the clipped policy loss of logits.

Their gradient is written in the forward pass, in place.
"""

import torch

from .. import checks
from .. import policy as shared
from ..dispatch import choose
from ..first_order import first_order_only, learns, refuse_tangents, track_inputs
from ..ppo_loss.reference import STATISTICS, named
from ..scaling import scale_in_place

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    f"ppo_loss_from_logits(Tensor logits, bool inplace, bool gradient, {shared.SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _run(logits_NV, inplace, gradient, *rest):
    policy, op = shared.Policy(*rest), "ppo_loss_from_logits"
    dtype = checks.result_dtype(logits_NV)
    one = torch.ones((), dtype=dtype, device=logits_NV.device)
    ids_N = policy.ids.reshape(-1)
    tokens, valid_N = shared.weighted(op, policy, logits_NV.dtype, dtype)
    checks.known_ids(op, ids_N, logits_NV.shape[1], valid_N)
    checks.known_temperatures(op, policy.temperature_N, valid_N)
    if gradient:
        made_NV = (
            logits_NV.detach()
            if inplace
            else torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        )
        function, _ = choose(op, (logits_NV,), policy.impl)
        logp_N, entropy_N = function(
            logits_NV.detach(), ids_N, *tokens[:4], *shared.objective(policy), made_NV
        )
        if inplace:
            torch.autograd.graph.increment_version(logits_NV)
    else:
        made_NV = None
        function, _ = choose("token_logprob", (logits_NV,), policy.impl)
        logp_N, entropy_N, _ = function(
            logits_NV, ids_N, policy.temperature, policy.temperature_N, policy.softcap, True
        )
    loss, statistics = shared.loss_of(policy, logp_N, entropy_N)
    # In place the gradient is the logits' own memory, which an op may not return: backward finds it in its
    # input.
    gradient_NV = logits_NV.new_empty(0) if inplace or made_NV is None else made_NV
    return loss, gradient_NV, one if tokens.unscale is None else tokens.unscale, statistics


def _fake(logits_NV, inplace, gradient, *rest):
    dtype = checks.result_dtype(logits_NV)
    shape = logits_NV.shape if gradient and not inplace else (0,)
    return (
        logits_NV.new_empty((), dtype=dtype),
        logits_NV.new_empty(shape),
        logits_NV.new_empty((), dtype=dtype),
        logits_NV.new_empty(len(STATISTICS), dtype=dtype),
    )


def _setup(ctx, inputs, output):
    logits_NV, ctx.inplace, ctx.gradient = inputs[:3]
    ctx.save_for_backward(logits_NV if ctx.inplace else output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else every output's would be filled with zeros: a second [N, V]


@first_order_only("ppo_loss_from_logits")
def _backward(ctx, upstream, *_):
    assert ctx.gradient, "a gradient is asked for that the forward pass was told nobody needs"
    if upstream is None:
        return (None,) * (3 + len(shared.Policy._fields))
    gradient_NV, unscale = ctx.saved_tensors
    factor = upstream * unscale
    if ctx.inplace:
        # Below autograd, as in token_logprob: the new version makes a second backward pass an error.
        with torch.no_grad():
            scaled_NV = scale_in_place(gradient_NV.detach(), factor)
        torch.autograd.graph.increment_version(gradient_NV)
    else:
        scaled_NV = gradient_NV * factor
    return scaled_NV.to(gradient_NV.dtype), *[None] * (2 + len(shared.Policy._fields))


_lib.impl("ppo_loss_from_logits", _run, "CompositeExplicitAutograd")
torch.library.register_fake("saferlhf_fast::ppo_loss_from_logits", _fake, lib=_lib)
torch.library.register_autograd(
    "saferlhf_fast::ppo_loss_from_logits", _backward, setup_context=_setup, lib=_lib
)


def ppo_loss_from_logits(
    logits: torch.Tensor,
    ids: torch.Tensor,
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
    entropy_coeff: float = 0.0,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    reduction: str = "sequence-mean",
    normalizer: float | torch.Tensor | None = None,
    advantage_scale: float | torch.Tensor | None = None,
    advantage_shift: float | torch.Tensor | None = None,
    inplace: bool = True,
    impl: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped policy loss, a KL term and an entropy bonus, straight from logits: two passes over them
    instead of three.

    Means the same as::

        logp, entropy = token_logprob(logits, ids, temperature=temperature, softcap=softcap, return_entropy=True)
        loss, stats = ppo_loss(logp, old_logp, advantages, entropy=entropy, ...)     # the other arguments as given

    logits: [N, V] with cu_seqlens or [B, T, V] with mask, row t predicting ids[t]; fp32, bf16 or fp16
    (float64: the reference). ids, old_logp, advantages, ref_logp: packed [N] or padded [B, T]; every other
    argument as in `ppo_loss`, temperature and softcap as in `token_logprob`. Nothing of a masked row is read,
    its id included; its gradient is 0. inplace: the forward pass overwrites `logits` with their gradient;
    they must not be needed again (ignored for leaves and views of leaves, expanded tensors, under
    torch.compile and torch.func, and where no gradient is asked for). A second backward pass then is an
    error. The gradient is exact for any scalar upstream; an upstream other than 1 costs one more pass, so
    count micro-batches and ranks in `normalizer` instead of dividing the loss.

    Returns (loss [], stats): stats as in `ppo_loss`, with `entropy` (mean over valid tokens) and, with
    ref_logp, `ref_kl`. Under activation checkpointing the forward pass runs twice: correct, but keep the call
    outside to save a pass. Raises ValueError for arguments that do not fit, and for ids outside the
    vocabulary on the CPU (on a device: NaN).
    """
    op = "ppo_loss_from_logits"
    checks.logits_and_ids(op, logits, ids)
    refuse_tangents(op, logits)
    policy = shared.arguments(
        op,
        logits,
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
    gradient = learns(logits)
    flat = logits.reshape(ids.numel(), logits.shape[-1])
    inplace = inplace and gradient and checks.disposable(logits, flat)
    loss, _, _, statistics = torch.ops.saferlhf_fast.ppo_loss_from_logits(flat, inplace, gradient, *policy)
    track_inputs(loss, logits)
    return loss, named(statistics, ref_kl=ref_logp, dual_clipped=dual_clip)
