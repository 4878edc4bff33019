"""token_logprob: log-prob (and entropy) of given tokens under given logits."""

from typing import Literal, overload

import torch

from .. import checks
from ..dispatch import choose
from ..first_order import first_order_only, refuse_tangents, track_inputs

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    "token_logprob(Tensor logits, Tensor ids, float temperature, Tensor? temperatures, float softcap, "
    "bool entropy, bool inplace, str impl) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "token_logprob_backward(Tensor logits, Tensor ids, Tensor logp, Tensor entropy, Tensor lse, Tensor? "
    "grad_logp, "
    "Tensor? grad_entropy, float temperature, Tensor? temperatures, float softcap, str impl) -> Tensor"
)


def _run(logits_NV, ids_N, temperature, temperature_N, softcap, entropy, inplace, impl):
    checks.known_ids("token_logprob", ids_N, logits_NV.shape[1])
    checks.known_temperatures("token_logprob", temperature_N)
    function, _ = choose("token_logprob", (logits_NV,), impl)
    return function(logits_NV, ids_N, temperature, temperature_N, softcap, entropy)


def _fake(logits_NV, ids_N, temperature, temperature_N, softcap, entropy, inplace, impl):
    dtype, count = checks.result_dtype(logits_NV), logits_NV.shape[0]
    return (
        logits_NV.new_empty(count, dtype=dtype),
        logits_NV.new_empty(count if entropy else 0, dtype=dtype),
        logits_NV.new_empty(count, dtype=dtype),
    )


def _write_gradient(logits_NV, *rest, out_NV):
    *arguments, impl = rest
    function, _ = choose("token_logprob_backward", (logits_NV,), impl)
    return function(logits_NV, *arguments, out_NV)


def _run_backward(logits_NV, *rest):
    return _write_gradient(
        logits_NV, *rest, out_NV=torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    )


def _fake_backward(logits_NV, *rest):
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    logits_NV, ids_N, ctx.temperature, temperature_N, ctx.softcap, ctx.entropy, ctx.inplace, ctx.impl = inputs
    logp_N, entropy_N, lse_N = output
    ctx.mark_non_differentiable(lse_N)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_NV, ids_N, temperature_N, logp_N, entropy_N, lse_N)


@first_order_only("token_logprob")
def _backward(ctx, grad_logp_N, grad_entropy_N, _):
    logits_NV, ids_N, temperature_N, logp_N, entropy_N, lse_N = ctx.saved_tensors
    if not ctx.entropy:
        grad_entropy_N = None
    if grad_logp_N is None and grad_entropy_N is None:
        return (None,) * 8
    rest = (
        ids_N,
        logp_N,
        entropy_N,
        lse_N,
        grad_logp_N,
        grad_entropy_N,
        ctx.temperature,
        temperature_N,
        ctx.softcap,
        ctx.impl,
    )
    if ctx.inplace:
        # Below autograd: the buffer is the caller's to destroy. The new version makes a second backward pass
        # an error.
        with torch.no_grad():
            gradient = _write_gradient(logits_NV.detach(), *rest, out_NV=logits_NV.detach())
        torch.autograd.graph.increment_version(logits_NV)
    else:
        gradient = torch.ops.saferlhf_fast.token_logprob_backward(logits_NV, *rest)
    return (gradient, *[None] * 7)


_lib.impl("token_logprob", _run, "CompositeExplicitAutograd")
_lib.impl("token_logprob_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("saferlhf_fast::token_logprob", _fake, lib=_lib)
torch.library.register_fake("saferlhf_fast::token_logprob_backward", _fake_backward, lib=_lib)
torch.library.register_autograd("saferlhf_fast::token_logprob", _backward, setup_context=_setup, lib=_lib)


@overload  # for type checkers: one tensor unless return_entropy says otherwise
def token_logprob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    impl: str = ...,
) -> torch.Tensor: ...


@overload
def token_logprob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    return_entropy: Literal[True],
    inplace_backward: bool = ...,
    impl: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def token_logprob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    return_entropy: bool,
    inplace_backward: bool = ...,
    impl: str = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def token_logprob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of `ids` under softmax(logits / temperature), and its entropy in nats.

    Means the same as::

        z = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
        log_p = torch.log_softmax(z / temperature, -1)
        logp = log_p.gather(-1, ids[..., None]).squeeze(-1);  entropy = torch.special.entr(log_p.exp()).sum(-1)

    logits: [..., V], any float dtype; -inf is allowed (probability 0), +inf gives NaN. ids: [...], integers
    in 0..V-1; give only the tokens that count: there is no ignored id. An id outside the vocabulary raises
    ValueError on the CPU and gives NaN on a device, where knowing would make the host wait; with
    SAFERLHF_CHECK=1 it raises there too. temperature: number > 0, or a tensor of them, 0-d or shaped as ids
    (no gradient flows to it; ValueError for others where ids are looked at, too). softcap: as Gemma caps its
    logits, or None. inplace_backward: the backward pass writes d logits into the memory of `logits`, which
    must not be needed again (ignored for leaves and views of leaves, expanded tensors, and under
    torch.compile and torch.func). impl: "auto", "reference", "triton" or "native".

    Returns logp [...], or (logp, entropy) with return_entropy; float64 for float64 logits, else float32. logp
    <= 0 always. Differentiable in logits, through both. No host sync on a device; same inputs, same bits; in
    every implementation a row depends on no other row.
    """
    checks.logits_and_ids("token_logprob", logits, ids)
    refuse_tangents("token_logprob", logits)
    temperature, temperature_N = checks.temperature("token_logprob", temperature, ids.shape, logits)
    flat = logits.reshape(ids.numel(), logits.shape[-1])
    inplace = inplace_backward and checks.disposable(logits, flat)
    logp, entropy, _ = torch.ops.saferlhf_fast.token_logprob(
        flat,
        checks.wide(ids).reshape(-1),
        temperature,
        temperature_N,
        checks.softcap("token_logprob", softcap),
        return_entropy,
        inplace,
        impl,
    )
    track_inputs(logp, logits)
    logp = logp.reshape(ids.shape)
    return (logp, entropy.reshape(ids.shape)) if return_entropy else logp
