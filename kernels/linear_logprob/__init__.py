"""linear_logprob: log-prob and entropy of tokens from hidden states and the head's weight.

Logits exist only in chunks.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from .. import checks, direct
from ..dispatch import choose
from ..first_order import Gradients, first_order_only, needs_gradient, refuse_tangents, track_inputs
from ..layout import flattened
from . import shards

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, float temperature, "
    "Tensor? temperatures, float softcap, bool entropy, int? chunk_tokens, bool gradient, str group, "
    "str impl) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "linear_logprob_backward(Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, Tensor logp, "
    "Tensor entropy, Tensor lse, Tensor? grad_logp, Tensor? grad_entropy, float temperature, "
    "Tensor? temperatures, float softcap, bool[] wanted, int? chunk_tokens, str group, str impl) "
    "-> (Tensor, Tensor, Tensor)"
)


def _run(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
    chunk_tokens: int | None,
    gradient: bool,
    group: str,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    checks.known_temperatures("linear_logprob", temperature_N)
    function, _ = choose("linear_logprob", (hidden_NH,), impl)

    def local(ids_N: torch.Tensor, entropy: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return function(
            hidden_NH,
            weight_VH,
            ids_N,
            bias_V,
            temperature,
            temperature_N,
            softcap,
            entropy,
            chunk_tokens,
            gradient,
        )

    if group:
        return shards.merged(local, ids_N, weight_VH.shape[0], entropy, group)
    checks.known_ids("linear_logprob", ids_N, weight_VH.shape[0])
    return local(ids_N, entropy)


def _fake(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, count = checks.result_dtype(hidden_NH), hidden_NH.shape[0]
    return (
        hidden_NH.new_empty(count, dtype=dtype),
        hidden_NH.new_empty(count if entropy else 0, dtype=dtype),
        hidden_NH.new_empty(count, dtype=dtype),
    )


def _run_backward(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, ids_N: torch.Tensor, *inputs: Any
) -> tuple[torch.Tensor, ...]:
    *arguments, group, impl = inputs
    function, _ = choose("linear_logprob_backward", (hidden_NH,), impl)
    if group:
        ids_N = shards.local_ids(ids_N, weight_VH.shape[0], group)[0]
    sources = (hidden_NH, weight_VH, arguments[0])
    gradients = [
        hidden_NH.new_empty(0) if gradient is None else gradient.to(source.dtype)
        for gradient, source in zip(function(hidden_NH, weight_VH, ids_N, *arguments), sources)
    ]
    if group and gradients[0].numel():
        shards.add_up(gradients[0], group)
    return tuple(gradients)


def _fake_backward(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    *inputs: Any,
) -> tuple[torch.Tensor, ...]:
    wanted: Sequence[bool] = inputs[8]
    return tuple(
        hidden_NH.new_empty(0)
        if source is None or not want
        else torch.empty_like(source, memory_format=torch.contiguous_format)
        for want, source in zip(wanted, (hidden_NH, weight_VH, bias_V))
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (
        hidden_NH,
        weight_VH,
        ids_N,
        bias_V,
        ctx.temperature,
        temperature_N,
        ctx.softcap,
        ctx.entropy,
        ctx.chunk_tokens,
        _,
        ctx.group,
        ctx.impl,
    ) = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_NH, weight_VH, ids_N, bias_V, temperature_N, *output)


@first_order_only("linear_logprob")
def _backward(
    ctx: Any, grad_logp_N: torch.Tensor | None, grad_entropy_N: torch.Tensor | None, _: None
) -> Gradients:
    hidden_NH, weight_VH, ids_N, bias_V, temperature_N, logp_N, entropy_N, lse_N = ctx.saved_tensors
    if not ctx.entropy:
        grad_entropy_N = None
    if grad_logp_N is None and grad_entropy_N is None:
        return (None,) * 12
    wanted = [
        ctx.needs_input_grad[0],
        ctx.needs_input_grad[1],
        bias_V is not None and ctx.needs_input_grad[3],
    ]
    gradients = _call_backward(
        hidden_NH,
        weight_VH,
        ids_N,
        bias_V,
        logp_N,
        entropy_N,
        lse_N,
        grad_logp_N,
        grad_entropy_N,
        ctx.temperature,
        temperature_N,
        ctx.softcap,
        wanted,
        ctx.chunk_tokens,
        ctx.group,
        ctx.impl,
    )
    d_hidden, d_weight, d_bias = (gradient if want else None for gradient, want in zip(gradients, wanted))
    return d_hidden, d_weight, None, d_bias, *[None] * 8


_lib.impl("linear_logprob", _run, "CompositeExplicitAutograd")
_lib.impl("linear_logprob_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("saferlhf_fast::linear_logprob", _fake, lib=_lib)
torch.library.register_fake("saferlhf_fast::linear_logprob_backward", _fake_backward, lib=_lib)
torch.library.register_autograd("saferlhf_fast::linear_logprob", _backward, setup_context=_setup, lib=_lib)
_call = direct.op("linear_logprob", _run, _setup, _backward)
_call_backward = direct.op("linear_logprob_backward", _run_backward)


@overload  # for type checkers, as in token_logprob
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
    chunk_tokens: int | None = ...,
    group: "torch.distributed.ProcessGroup | None" = ...,
    impl: str = ...,
) -> torch.Tensor: ...


@overload
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    return_entropy: Literal[True],
    chunk_tokens: int | None = ...,
    group: "torch.distributed.ProcessGroup | None" = ...,
    impl: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    return_entropy: bool,
    chunk_tokens: int | None = ...,
    group: "torch.distributed.ProcessGroup | None" = ...,
    impl: str = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of `ids` under softmax(hidden @ weight.T + bias), and its entropy, in nats.

    Means the same as::

        logits = hidden.float() @ weight.float().T + bias
        token_logprob(logits, ids, temperature=temperature, softcap=softcap, ...)

    without logits of all tokens. Backward makes the logits again: four matrix products in all
    (`linear_ppo_loss` needs three). d weight is accumulated in float32. Under ZeRO-3 call it inside the head
    module's own forward, so that DeepSpeed gathers the weight again for backward. Activation checkpointing is
    not needed around it: it keeps no logits.

    Args:
        hidden: [..., H]; float32, bfloat16 or float16 (float64: the reference). Logits are float32 whatever
            the inputs are.
        weight: [V, H], of the same dtype.
        ids: [...], integers; as in `token_logprob`.
        bias: [V], of the same dtype, or None.
        temperature: As in `token_logprob`.
        softcap: As in `token_logprob`.
        return_entropy: Also return the entropy of each token's distribution.
        chunk_tokens: Tokens whose logits exist at once; None for what fits 64 MiB on a CPU, 1 GiB on a GPU.
            Another number may change the last bits, since those of a matrix product may depend on its number
            of rows.
        group: A process group over which the vocabulary is split in shards of one size, in rank order.
            `weight` and `bias` are this rank's shard; `hidden` and `ids` are the same on all ranks.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        logp [...], or (logp, entropy) with return_entropy; float64 for float64 inputs, else float32. Both are
        differentiable in hidden, weight and bias, for any upstream gradient.

    Raises:
        ValueError: Arguments that do not fit, and ids outside the vocabulary on the CPU (on a device: NaN).
        NotImplementedError: `impl` cannot run here.
    """
    op = "linear_logprob"
    checks.head(op, hidden, weight, ids, bias)
    refuse_tangents(op, hidden, weight, bias)
    checks.chunk_tokens(op, chunk_tokens)
    return_entropy = checks.flag(op, "return_entropy", return_entropy)
    checks.implementation(op, impl)
    if group is not None and not hasattr(group, "group_name"):
        raise ValueError(f"{op}: group: expected a torch.distributed.ProcessGroup, got {checks.shown(group)}")
    one_temperature, temperature_N = checks.temperature(op, temperature, ids.shape, hidden)
    gradient = any(map(needs_gradient, (hidden, weight, bias)))
    logp, entropy, _ = _call(
        flattened(hidden, ids.numel(), hidden.shape[-1]),
        weight,
        flattened(checks.as_int32_or_int64(ids), ids.numel()),
        bias,
        one_temperature,
        temperature_N,
        checks.softcap(op, softcap),
        return_entropy,
        chunk_tokens,
        gradient,
        "" if group is None else group.group_name,
        impl,
    )
    track_inputs(logp, hidden, weight, bias)
    logp = flattened(logp, *ids.shape)
    return (logp, flattened(entropy, *ids.shape)) if return_entropy else logp
