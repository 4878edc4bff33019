"""TRL's chunked head by our ops: log-probs, and what TRL's trainers log, from hidden states and a weight.

Our head makes float32 logits for as many tokens as fit a workspace (64 MiB on a CPU); TRL's makes tiles of
4096 tokens and 32768 columns. Shapes: N tokens, H hidden, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
# Logits whose extras are computed at once: on a CPU 1 MiB of float32, which stays in its cache.
ROWS_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


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
            softcap = (final_logit_softcapping or 0.0) / logit_scale
            transform = _Transform(logit_scale, final_logit_softcapping or 0.0, 1 / temperature)
            temperature = temperature / logit_scale
            # torch.compile cannot trace the head with the extras; it compiles the registered op, which has
            # none, without a graph break.
            needs_gradient = (
                shared.any_needs_gradient(hidden, weight, bias) and not torch.compiler.is_compiling()
            )
            if needs_gradient or set(outputs) & set(EXTRAS):
                arguments = (temperature, softcap, transform, tuple(outputs))
                values = _Head.apply(hidden, weight, bias, targets, *arguments)
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
        transform: "_Transform",
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.narrow, ctx.dtype = hidden_NH.is_cuda, _product_dtype(hidden_NH)
        sources = hidden_NH, weight_VH, bias_V
        hidden_NH, weight_VH, bias_V = _cast(ctx.dtype, *sources)
        ctx.temperature, ctx.softcap, ctx.entropy = temperature, softcap, "entropy" in outputs
        row_function, _ = choose("token_logprob", (hidden_NH,))
        extras = _Extras(outputs, ids_N.numel(), weight_VH, transform)
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
            return (None,) * 8
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
        return *in_own_dtypes, *[None] * 5


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
    """What TRL's trainers log beside log-probs, computed from each chunk of logits while it exists.

    It overwrites the logits, which nobody reads after it.
    """

    def __init__(
        self, outputs: tuple[str, ...], count: int, weight_VH: torch.Tensor, transform: "_Transform"
    ) -> None:
        self.outputs, self.transform = outputs, transform
        self.done = 0  # tokens of the chunks so far

        def buffer(name: str, dtype: torch.dtype) -> torch.Tensor | None:
            return weight_VH.new_empty(count, dtype=dtype) if name in outputs else None

        self.sum_sq_N = buffer(EXTRAS[0], torch.float32)
        # Without a softcap it needs no logits: see `values`.
        self.mean_N = buffer(EXTRAS[1], torch.float32) if transform.softcap else None
        self.top_N = buffer(EXTRAS[2], torch.bool)

    def around(self, row_function: Callable[..., Any]) -> Callable[..., Any]:
        """`token_logprob` of an implementation, extended: each call also computes the extras of its chunk."""

        def forward(logits_CV: torch.Tensor, ids_C: torch.Tensor, *more: Any) -> Any:
            result = row_function(logits_CV, ids_C, *more)
            rows = max(1, ROWS_ELEMENTS.get(logits_CV.device.type, 1 << 26) // max(1, logits_CV.shape[1]))
            for logits_RV, ids_R in zip(logits_CV.split(rows), ids_C.split(rows)):
                self._add(slice(self.done, self.done + len(ids_R)), logits_RV, ids_R)
                self.done += len(ids_R)
            return result

        return forward

    def _add(self, at: slice, logits_RV: torch.Tensor, ids_R: torch.Tensor) -> None:
        if self.top_N is None and self.sum_sq_N is None and self.mean_N is None:
            return
        z_RV = self.transform.capped_(logits_RV)
        if self.mean_N is not None:
            self.mean_N[at] = z_RV.mean(-1) * self.transform.factor
        if self.top_N is not None:
            self.top_N[at] = is_top1(self.transform.logits(z_RV), ids_R)
        if self.sum_sq_N is not None:
            self.sum_sq_N[at] = log_sum_sq_probs_(z_RV, self.transform.factor)

    def values(
        self, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """(log sum p², mean logit, whether the token is the most likely one), None where not requested."""
        if EXTRAS[1] in self.outputs and self.mean_N is None:
            # The mean logit of a linear layer is its mean row times the hidden state: no logits needed.
            with torch.autocast(hidden_NH.device.type, enabled=False):
                mean_N = hidden_NH.float() @ weight_VH.float().mean(0)
            mean_N = mean_N if bias_V is None else mean_N + bias_V.float().mean()
            self.mean_N = mean_N * self.transform.factor
        return self.sum_sq_N, self.mean_N, self.top_N


class _Transform(NamedTuple):
    """From the head's product to logits: scale, then softcap, then temperature, each step as TRL takes it.

    Logits are equal then where TRL's are: at a cap that many reach, and where a step rounds two numbers to
    one.

    Attributes:
        logit_scale: > 0.
        softcap: > 0, or 0 for none.
        inverse: 1 / temperature.
    """

    logit_scale: float
    softcap: float
    inverse: float

    @property
    def factor(self) -> float:
        """What the logits are times the result of `capped_`."""
        return self.inverse if self.softcap else self.logit_scale * self.inverse

    def capped_(self, z_RV: torch.Tensor) -> torch.Tensor:
        """The capped logits before the temperature, in the memory of the products.

        Without a cap they stay the products: rounded once more, large ones would lose digits of their
        differences.
        """
        return (
            z_RV.mul_(self.logit_scale).div_(self.softcap).tanh_().mul_(self.softcap)
            if self.softcap
            else z_RV
        )

    def logits(self, z_RV: torch.Tensor) -> torch.Tensor:
        """The logits, from the result of `capped_`, which is not written."""
        factors = (self.inverse,) if self.softcap else (self.logit_scale, self.inverse)
        for factor in factors:
            z_RV = z_RV if factor == 1 else z_RV * factor
        return z_RV


def is_top1(z_RV: torch.Tensor, ids_R: torch.Tensor) -> torch.Tensor:
    """Whether each token is the first of the highest logits of its row: bool [R].

    False in a row with a NaN, and in one without a logit above -inf, which have no most likely token.

    Args:
        z_RV: Logits, float32.
        ids_R: The tokens.
    """
    highest_R, first_R = z_RV.max(-1)
    return (first_R == ids_R) & (highest_R > -torch.inf)


def log_sum_sq_probs_(z_RV: torch.Tensor, factor: float) -> torch.Tensor:
    """Log sum p² of softmax(z * factor): float32 [R], nats; NaN where a row has no distribution.

    It equals log1p(sum of the others' e²) - 2 log1p(sum of the others' e), where e is
    e^(factor * (z - highest)) and the others are all but one of the highest: nothing large is subtracted, and
    what all logits of a row have in common costs no digit.

    Args:
        z_RV: Logits, float32; they are overwritten.
        factor: > 0, such as 1 / temperature.
    """
    highest_R, at_R = z_RV.max(-1)
    e_RV = z_RV.sub_(highest_R[:, None]).mul_(factor).exp_().scatter_(1, at_R[:, None], 0)
    sum_R = e_RV.sum(-1).double()
    sum_sq_R = e_RV.square_().sum(-1).double()
    value_R = (torch.log1p(sum_sq_R) - 2 * torch.log1p(sum_R)).float()
    return torch.where(highest_R.isfinite(), value_R, torch.nan)


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
