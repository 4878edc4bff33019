"""TRL's chunked head by our ops: log-probs, and what TRL's trainers log, from hidden states and a weight.

Our head makes float32 logits for as many tokens as fit a workspace (64 MiB on a CPU); TRL's makes tiles of
4096 tokens and 32768 columns. Shapes: N tokens, H hidden, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..kernels import checks, linear
from ..kernels.dispatch import choose
from ..kernels.first_order import first_order_only, track_inputs
from ..kernels.linear_logprob import linear_logprob
from . import shared
from .sites import counting

UTILS = "trl.trainer.utils"
TARGET = f"{UTILS}:_ChunkedLogProbFunction"
EXTRAS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def chunked_head(original: Any) -> type:
    """A class that replaces TRL's autograd function: `apply` takes the same arguments.

    TRL's own runs for ZeRO-3 shards, and for scales and softcaps that are tensors or not positive. Plain
    torch runs under transforms of torch.func and for tensors without values, which TRL's own does not take.
    """
    count_call = counting(TARGET)

    class ChunkedHead:
        __doc__ = _Head.__doc__
        forward = staticmethod(original.forward)  # a second `patch` reads its parameters

        @staticmethod
        def apply(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy", *EXTRAS),
        ) -> tuple[torch.Tensor | None, ...]:
            sharded = any(hasattr(tensor, "ds_id") for tensor in (weight, bias))
            unsupported = (
                not _supported_numbers(temperature, logit_scale, final_logit_softcapping)
                or hidden.dtype == torch.float64
            )
            if not (sharded or unsupported) and shared.without_values(hidden, weight, bias, targets):
                logits = shared.logits_of_head(
                    hidden, weight, bias, scale=logit_scale, softcap=final_logit_softcapping
                )
                return _by_torch(logits / temperature, targets, outputs)
            if sharded or unsupported or not shared.plain(hidden, weight, bias, targets):
                return original.apply(
                    hidden,
                    weight,
                    bias,
                    targets,
                    temperature,
                    chunk_size,
                    final_logit_softcapping,
                    logit_scale,
                    outputs,
                )
            count_call()
            targets = _checked(hidden, weight, targets, temperature)
            # Logits scale · z under softcap s and temperature T are z under softcap s / scale and temperature
            # T / scale.
            softcap, temperature = (final_logit_softcapping or 0.0) / logit_scale, temperature / logit_scale
            # torch.compile cannot trace the head with the extras; it compiles the registered op, which has
            # none, without a graph break.
            needs_gradient = (
                shared.any_needs_gradient(hidden, weight, bias) and not torch.compiler.is_compiling()
            )
            if needs_gradient or set(outputs) & set(EXTRAS):
                values = _Head.apply(hidden, weight, bias, targets, temperature, softcap, tuple(outputs))
                track_inputs(values[0], hidden, weight, bias)
                return values
            return _without_extras(hidden, weight, bias, targets, temperature, softcap, "entropy" in outputs)

    # By these names pickle finds the class, and in a process that is not patched TRL's own.
    ChunkedHead.__module__, ChunkedHead.__name__ = original.__module__, original.__name__
    ChunkedHead.__qualname__ = original.__qualname__
    ChunkedHead.apply.__module__ = original.__module__
    ChunkedHead.apply.__qualname__ = f"{original.__qualname__}.apply"
    return ChunkedHead


def _by_torch(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, outputs: tuple[str, ...]
) -> tuple[torch.Tensor | None, ...]:
    """TRL's five outputs from logits that are divided by the temperature already, by plain torch."""
    logp_N, entropy_N = shared.logp_and_entropy_by_torch(logits_NV, targets_N)
    scaled_NV = logits_NV.detach()
    extras = (
        torch.logsumexp(2 * torch.log_softmax(scaled_NV, -1), -1),
        scaled_NV.mean(-1),
        scaled_NV.argmax(-1) == targets_N,
    )
    values = dict(zip(("entropy", *EXTRAS), (entropy_N, *extras)))
    return logp_N, *(value if name in outputs else None for name, value in values.items())


class _Head(torch.autograd.Function):
    """hidden, weight, bias, targets -> TRL's five outputs.

    Logits exist in chunks; gradients are accumulated in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        ids_N: torch.Tensor,
        temperature: float,
        softcap: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.narrow, ctx.dtype = hidden_NH.is_cuda, _product_dtype(hidden_NH)
        sources = hidden_NH, weight_VH, bias_V
        hidden_NH, weight_VH, bias_V = _cast(ctx.dtype, *sources)
        ctx.temperature, ctx.softcap, ctx.entropy = temperature, softcap, "entropy" in outputs
        row_function, _ = choose("token_logprob", (hidden_NH,))
        extras = _Extras(outputs, ids_N.numel(), weight_VH, temperature, softcap)
        logp_N, entropy_N, lse_N = linear.logprob(
            extras.around(row_function),
            hidden_NH,
            weight_VH,
            ids_N,
            bias_V,
            temperature,
            None,
            softcap,
            ctx.entropy,
            None,
            narrow=ctx.narrow,
        )
        # The tensors as they came: copies in another dtype would stay in memory until backward.
        ctx.save_for_backward(*sources, ids_N, logp_N, entropy_N, lse_N)
        values = extras.values(hidden_NH, weight_VH, bias_V)
        ctx.mark_non_differentiable(*(value for value in values if value is not None))
        return logp_N, entropy_N if ctx.entropy else None, *values

    @staticmethod
    @first_order_only("the chunked head")
    def backward(
        ctx: Any, grad_logp_N: torch.Tensor | None, grad_entropy_N: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        if grad_logp_N is None and grad_entropy_N is None:
            return (None,) * 7
        *sources, ids_N, logp_N, entropy_N, lse_N = ctx.saved_tensors
        hidden_NH, weight_VH, bias_V = _cast(ctx.dtype, *sources)
        backward, _backend = choose("token_logprob_backward", (hidden_NH,))
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
        gradients = linear.logprob_backward(
            backward,
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
            None,
            ctx.softcap,
            wanted,
            None,
            narrow=ctx.narrow,
        )
        in_own_dtypes = (
            None if gradient is None else gradient.to(source.dtype)
            for gradient, source in zip(gradients, sources)
        )
        return *in_own_dtypes, *[None] * 4


def _product_dtype(hidden_NH: torch.Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's on a device; a CPU multiplies slower in half precision."""
    device = hidden_NH.device.type
    return (
        torch.get_autocast_dtype(device)
        if device != "cpu" and torch.is_autocast_enabled(device)
        else hidden_NH.dtype
    )


def _cast(dtype: torch.dtype, *tensors: torch.Tensor | None) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class _Extras:
    """What TRL's trainers log beside log-probs, computed from each chunk of logits while it exists."""

    def __init__(
        self,
        outputs: tuple[str, ...],
        count: int,
        weight_VH: torch.Tensor,
        temperature: float,
        softcap: float,
    ) -> None:
        self.outputs, self.temperature, self.softcap = outputs, temperature, softcap
        self.done = 0  # tokens of the chunks so far

        def buffer(name: str, dtype: torch.dtype) -> torch.Tensor | None:
            return weight_VH.new_empty(count, dtype=dtype) if name in outputs else None

        self.sum_sq_N = buffer(EXTRAS[0], torch.float32)
        # Without a softcap it needs no logits: see `values`.
        self.mean_N = buffer(EXTRAS[1], torch.float32) if softcap else None
        self.top_N = buffer(EXTRAS[2], torch.bool)

    def around(self, row_function: Callable[..., Any]) -> Callable[..., Any]:
        """`token_logprob` of an implementation, extended: each call also computes the extras of its chunk."""

        def forward(logits_CV: torch.Tensor, ids_C: torch.Tensor, *more: Any) -> Any:
            result = row_function(logits_CV, ids_C, *more)
            self._add(slice(self.done, self.done + len(ids_C)), logits_CV, ids_C, result[2])
            self.done += len(ids_C)
            return result

        return forward

    def _add(self, at: slice, logits_CV: torch.Tensor, ids_C: torch.Tensor, lse_C: torch.Tensor) -> None:
        if self.top_N is not None:
            self.top_N[at] = logits_CV.argmax(-1) == ids_C  # the first of equal maxima, as TRL counts it
        if self.sum_sq_N is None and self.mean_N is None:
            return
        if self.softcap:
            logits_CV = torch.tanh(logits_CV / self.softcap).mul_(self.softcap)
        if self.mean_N is not None:
            self.mean_N[at] = logits_CV.mean(-1) / self.temperature
        if self.sum_sq_N is not None:
            self.sum_sq_N[at] = torch.logsumexp(logits_CV * (2 / self.temperature), -1) - 2 * lse_C

    def values(
        self, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """(log sum p², mean logit, whether the token is the most likely one), None where not requested."""
        if EXTRAS[1] in self.outputs and self.mean_N is None:
            # The mean logit of a linear layer is its mean row times the hidden state: no logits needed.
            with torch.autocast(hidden_NH.device.type, enabled=False):
                mean_N = hidden_NH.float() @ weight_VH.float().mean(0)
            self.mean_N = (mean_N if bias_V is None else mean_N + bias_V.float().mean()) / self.temperature
        return self.sum_sq_N, self.mean_N, self.top_N


def _supported_numbers(temperature: float, logit_scale: float, softcap: float | None) -> bool:
    """Whether our head takes them: no tensors, a positive scale, a positive softcap or none.

    What a softcap of 0 or below means is left to TRL (-3 caps as 3 does).
    """
    return (
        shared.numbers(temperature, logit_scale, softcap)
        and logit_scale > 0
        and (softcap is None or softcap > 0)
    )


def _without_extras(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float,
    entropy: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Old and reference log-probs, and everything under torch.compile.

    On a device that is one kernel whose logits are never written to memory.
    """
    hidden, weight, bias = _cast(_product_dtype(hidden), hidden, weight, bias)
    result = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap or None,
        return_entropy=entropy,
    )
    return *(result if entropy else (result, None)), None, None, None


def _checked(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The targets as integers that our ops take; ValueError for values, shapes and dtypes that do not fit."""
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise ValueError(
            f"expected hidden [N, H], weight [V, H] and targets [N], got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    if not checks.is_integer(targets):
        raise ValueError(f"targets: expected integers, got {targets.dtype}")
    shared.known_ids("targets: expected", targets, weight.shape[0])
    return checks.as_int32_or_int64(targets)
