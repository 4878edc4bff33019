"""token_logprob: log-prob (and entropy) of given tokens under given logits."""

from typing import Any, Literal, overload

import torch

from .. import checks, direct
from ..dispatch import choose
from ..first_order import Gradients, first_order_only, refuse_tangents, track_inputs
from ..layout import flattened

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    "token_logprob(Tensor logits, Tensor ids, float temperature, Tensor? temperatures, float softcap, "
    "bool entropy, bool inplace, str impl) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "token_logprob_backward(Tensor logits, Tensor ids, Tensor logp, Tensor entropy, Tensor lse, "
    "Tensor? grad_logp, Tensor? grad_entropy, float temperature, Tensor? temperatures, float softcap, "
    "str impl) -> Tensor"
)


def _run(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
    inplace: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    checks.known_ids("token_logprob", ids_N, logits_NV.shape[1])
    checks.known_temperatures("token_logprob", temperature_N)
    function, _ = choose("token_logprob", (logits_NV,), impl)
    return function(logits_NV, ids_N, temperature, temperature_N, softcap, entropy)


def _fake(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
    inplace: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, count = checks.result_dtype(logits_NV), logits_NV.shape[0]
    return (
        logits_NV.new_empty(count, dtype=dtype),
        logits_NV.new_empty(count if entropy else 0, dtype=dtype),
        logits_NV.new_empty(count, dtype=dtype),
    )


def _write_gradient(logits_NV: torch.Tensor, *inputs: Any, out_NV: torch.Tensor) -> torch.Tensor:
    """The backward op with its result in out_NV; inputs: the op's, after the logits."""
    *arguments, impl = inputs
    function, _ = choose("token_logprob_backward", (logits_NV,), impl)
    return function(logits_NV, *arguments, out_NV)


def _run_backward(logits_NV: torch.Tensor, *inputs: Any) -> torch.Tensor:
    return _write_gradient(
        logits_NV, *inputs, out_NV=torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    )


def _fake_backward(logits_NV: torch.Tensor, *inputs: Any) -> torch.Tensor:
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits_NV, ids_N, ctx.temperature, temperature_N, ctx.softcap, ctx.entropy, ctx.inplace, ctx.impl = inputs
    logp_N, entropy_N, lse_N = output
    ctx.mark_non_differentiable(lse_N)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_NV, ids_N, temperature_N, logp_N, entropy_N, lse_N)


@first_order_only("token_logprob")
def _backward(
    ctx: Any, grad_logp_N: torch.Tensor | None, grad_entropy_N: torch.Tensor | None, _: None
) -> Gradients:
    logits_NV, ids_N, temperature_N, logp_N, entropy_N, lse_N = ctx.saved_tensors
    if not ctx.entropy:
        grad_entropy_N = None
    if grad_logp_N is None and grad_entropy_N is None:
        return (None,) * 8
    inputs = (
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
            gradient = _write_gradient(logits_NV.detach(), *inputs, out_NV=logits_NV.detach())
        torch.autograd.graph.increment_version(logits_NV)
    else:
        gradient = _call_backward(logits_NV, *inputs)
    return (gradient, *[None] * 7)


_lib.impl("token_logprob", _run, "CompositeExplicitAutograd")
_lib.impl("token_logprob_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("saferlhf_fast::token_logprob", _fake, lib=_lib)
torch.library.register_fake("saferlhf_fast::token_logprob_backward", _fake_backward, lib=_lib)
torch.library.register_autograd("saferlhf_fast::token_logprob", _backward, setup_context=_setup, lib=_lib)
_call = direct.op("token_logprob", _run, _setup, _backward)
_call_backward = direct.op("token_logprob_backward", _run_backward)


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
        logp = log_p.gather(-1, ids[..., None]).squeeze(-1)
        entropy = torch.special.entr(log_p.exp()).sum(-1)

    A row depends on no other row in any implementation, and the same inputs give the same bits. On a device
    the host never waits.

    Args:
        logits: [..., V], any float dtype. -inf is allowed (probability 0); +inf gives NaN.
        ids: [...], integers in 0..V-1. Every id counts: leave out the tokens that do not. One outside the
            vocabulary raises on the CPU, and on a device with SAFERLHF_CHECK=1; otherwise it gives NaN there,
            since looking would make the host wait.
        temperature: A number > 0, or a tensor of numbers, 0-d or shaped as ids. No gradient goes to it.
        softcap: The cap of Gemma's logits, > 0, in units of the logits; None for none.
        return_entropy: Also return the entropy of each token's distribution.
        inplace_backward: The backward pass writes d logits into the memory of `logits`, which must not be
            needed again. Ignored for leaves and views of leaves, for expanded tensors, and under
            torch.compile and torch.func.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        logp [...] in nats, <= 0, or (logp, entropy) with return_entropy, both differentiable in logits;
        float64 for float64 logits, else float32.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit; a temperature or softcap that is not > 0; an id
            outside the vocabulary.
        NotImplementedError: `impl` cannot run here.
    """
    checks.logits_and_ids("token_logprob", logits, ids)
    refuse_tangents("token_logprob", logits)
    return_entropy = checks.flag("token_logprob", "return_entropy", return_entropy)
    inplace_backward = checks.flag("token_logprob", "inplace_backward", inplace_backward)
    checks.implementation("token_logprob", impl)
    one_temperature, temperature_N = checks.temperature("token_logprob", temperature, ids.shape, logits)
    flat = flattened(logits, ids.numel(), logits.shape[-1])
    inplace = inplace_backward and checks.disposable(logits, flat)
    logp, entropy, _ = _call(
        flat,
        flattened(checks.as_int32_or_int64(ids), ids.numel()),
        one_temperature,
        temperature_N,
        checks.softcap("token_logprob", softcap),
        return_entropy,
        inplace,
        impl,
    )
    track_inputs(logp, logits)
    logp = flattened(logp, *ids.shape)
    return (logp, flattened(entropy, *ids.shape)) if return_entropy else logp
