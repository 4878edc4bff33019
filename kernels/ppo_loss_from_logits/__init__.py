"""ppo_loss_from_logits: the clipped policy loss of logits.

Their gradient is written in the forward pass, in place.
"""

from typing import Any

import torch

from .. import checks, direct
from .. import policy as shared
from ..dispatch import choose
from ..first_order import Gradients, first_order_only, needs_gradient, refuse_tangents, track_inputs
from ..layout import flattened
from ..ppo_loss.reference import STATISTICS, named
from ..scaling import scale_in_place

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    f"ppo_loss_from_logits(Tensor logits, bool inplace, bool gradient, {shared.SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _run(
    logits_NV: torch.Tensor, inplace: bool, gradient: bool, *policy_arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    policy, op = shared.Policy(*policy_arguments), "ppo_loss_from_logits"
    dtype = checks.result_dtype(logits_NV)
    one = torch.ones((), dtype=dtype, device=logits_NV.device)
    ids_N = policy.ids.reshape(-1)
    tokens, valid_N = shared.weighted(op, policy, logits_NV.dtype, dtype)
    checks.known_ids(op, ids_N, logits_NV.shape[1], valid_N)
    checks.known_temperatures(op, policy.temperature_N, valid_N)
    # In place the gradient is the logits' own memory, which an op may not return: backward finds it in its
    # input.
    gradient_NV = logits_NV.new_empty(0)
    if gradient:
        if inplace:
            out_NV = logits_NV.detach()
        else:
            out_NV = gradient_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        function, _ = choose(op, (logits_NV,), policy.impl)
        logp_N, entropy_N = function(
            logits_NV.detach(), ids_N, *tokens[:4], *shared.objective(policy), out_NV
        )
        if inplace:
            torch.autograd.graph.increment_version(logits_NV)
    else:
        function, _ = choose("token_logprob", (logits_NV,), policy.impl)
        logp_N, entropy_N, _ = function(
            logits_NV, ids_N, policy.temperature, policy.temperature_N, policy.softcap, True
        )
    loss, statistics = shared.loss_of(policy, logp_N, entropy_N)
    return loss, gradient_NV, one if tokens.unscale is None else tokens.unscale, statistics


def _fake(
    logits_NV: torch.Tensor, inplace: bool, gradient: bool, *settings: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = checks.result_dtype(logits_NV)
    shape = logits_NV.shape if gradient and not inplace else (0,)
    return (
        logits_NV.new_empty((), dtype=dtype),
        logits_NV.new_empty(shape),
        logits_NV.new_empty((), dtype=dtype),
        logits_NV.new_empty(len(STATISTICS), dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits_NV, ctx.inplace, ctx.gradient = inputs[:3]
    ctx.save_for_backward(logits_NV if ctx.inplace else output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else every output's would be filled with zeros: a second [N, V]


@first_order_only("ppo_loss_from_logits")
def _backward(ctx: Any, upstream: torch.Tensor | None, *_: None) -> Gradients:
    assert ctx.gradient, "backward was called, but the forward pass made no gradient: none was wanted then"
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
_call = direct.op("ppo_loss_from_logits", _run, _setup, _backward)


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
    """The clipped policy loss, a KL term and an entropy bonus from logits, in two passes instead of three.

    Means the same as::

        logp, entropy = token_logprob(logits, ids, temperature=temperature, softcap=softcap,
                                      return_entropy=True)
        loss, stats = ppo_loss(logp, old_logp, advantages, entropy=entropy, ...)   # the others as given

    The gradient is exact for any scalar upstream. An upstream other than 1 costs one more pass, so count
    micro-batches and ranks in `normalizer` instead of dividing the loss. Under activation checkpointing the
    forward pass runs twice: correct, but keep the call outside to save a pass.

    Args:
        logits: [N, V] with cu_seqlens or [B, T, V] with mask, row t predicting ids[t]; float32, bfloat16 or
            float16 (float64: the reference). Nothing of a masked row is read; its gradient is 0.
        ids: Packed [N] or padded [B, T], integers; as in `token_logprob`. Those of masked rows are not read.
        old_logp: Shaped as ids; log-probs of the policy that sampled.
        advantages: Shaped as ids.
        clip_ratio: As in `ppo_loss`.
        clip_high: As in `ppo_loss`.
        dual_clip: As in `ppo_loss`.
        cu_seqlens: As in `ppo_loss`.
        mask: As in `ppo_loss`.
        ref_logp: Shaped as ids, or None; as in `ppo_loss`.
        kl_coeff: As in `ppo_loss`.
        kl_estimator: As in `ppo_loss`.
        entropy_coeff: As in `ppo_loss`.
        temperature: As in `token_logprob`.
        softcap: As in `token_logprob`.
        reduction: As in `ppo_loss`.
        normalizer: As in `ppo_loss`.
        advantage_scale: As in `ppo_loss`.
        advantage_shift: As in `ppo_loss`.
        inplace: The forward pass overwrites `logits` with their gradient; they must not be needed again, and
            a second backward pass is an error. Ignored for leaves and views of leaves, for expanded tensors,
            under torch.compile and torch.func, and where no gradient is wanted.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        (loss [], stats): stats as in `ppo_loss`, with `entropy` (mean over valid tokens) and, with ref_logp,
        `ref_kl`.

    Raises:
        ValueError: Arguments that do not fit, and ids outside the vocabulary on the CPU (on a device: NaN).
        NotImplementedError: `impl` cannot run here.
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
    inplace = checks.flag(op, "inplace", inplace)
    gradient = needs_gradient(logits)
    flat = flattened(logits, ids.numel(), logits.shape[-1])
    inplace = inplace and gradient and checks.disposable(logits, flat)
    loss, _, _, statistics = _call(flat, inplace, gradient, *policy)
    track_inputs(loss, logits)
    return loss, named(statistics, ref_kl=ref_logp, dual_clipped=dual_clip)
