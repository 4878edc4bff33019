"""TRL 1.16: per-token log-probs and entropies, and the head under every core trainer (`add_fused_lm_head`).

The core trainers reach their chunked head through one global of trl.trainer.utils, looked up at each call.
Ours makes float32 logits for as many tokens as fit a workspace (64 MiB on a CPU), theirs tiles of 4096 tokens
and 32768 columns.
"""

import torch

from ..kernels import checks, linear
from ..kernels.dispatch import choose
from ..kernels.first_order import first_order_only, track_inputs
from ..kernels.linear_logprob import linear_logprob
from ..kernels.token_logprob import token_logprob
from . import shared
from .registry import Library, Replace
from .sites import counting

UTILS = "trl.trainer.utils"
EXTRAS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def selective_log_softmax(theirs):
    """(logits, index) -> log-probs. With K indices a position, on other accelerators, or for DTensors:

    theirs.
    """

    def ours(logits, index, temperature=1.0, row_mask=None):
        if not _fits(logits, index, temperature, row_mask):
            return theirs(logits, index, temperature=temperature, row_mask=row_mask)
        return _scored(logits, index, temperature, row_mask, False)

    return ours


def selective_log_softmax_and_entropy(theirs):
    """(logits, index) -> (log-probs, entropies) in one pass over the logits."""

    def ours(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
        if not _fits(logits, index, temperature, row_mask):
            return theirs(
                logits,
                index,
                entropy_requires_grad=entropy_requires_grad,
                temperature=temperature,
                row_mask=row_mask,
            )
        logp, entropy = _scored(logits, index, temperature, row_mask, True)
        return logp, entropy if entropy_requires_grad else entropy.detach()

    return ours


def _fits(logits, index, temperature, row_mask):
    return (
        shared.one_id_each(logits, index)
        and shared.one_temperature(temperature)
        and shared.plain(row_mask)
        and (row_mask is None or row_mask.shape == index.shape)
    )


class _Skipped(torch.autograd.Function):
    """logits -> logits, whose gradient is 0 in rows that do not count: there a NaN logit would make it NaN."""

    @staticmethod
    def forward(ctx, logits, hidden):
        ctx.save_for_backward(hidden)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, gradient):
        (hidden,) = ctx.saved_tensors
        # In place: nobody else holds what our op has just made, and a second one would be as large as the
        # logits.
        if gradient.device.type == "cpu":
            # touches those rows alone; on a device the host would wait for their number
            gradient[hidden] = 0.0
        else:
            gradient.masked_fill_(hidden[..., None], 0.0)
        return gradient, None


def _scored(logits, index, temperature, row_mask, entropy):
    """Our op; rows whose mask is 0 give 0 and may hold any id and any logits."""
    hidden = None if row_mask is None else row_mask == 0
    index = index if hidden is None else index.masked_fill(hidden, 0)
    shared.known_ids("index: expected", index, logits.shape[-1])
    if hidden is None:
        return token_logprob(logits, index, temperature=temperature, return_entropy=entropy)
    if shared.learns(logits):
        logits = _Skipped.apply(logits, hidden)
    made = token_logprob(logits, index, temperature=temperature, return_entropy=entropy)
    return tuple(part.masked_fill(hidden, 0.0) for part in made) if entropy else made.masked_fill(hidden, 0.0)


class _Head(torch.autograd.Function):
    """hidden, weight, bias, targets -> TRL's five outputs; logits exist in chunks, gradients are accumulated
    in float32.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, ids_N, temperature, softcap, outputs):
        ctx.set_materialize_grads(False)
        ctx.narrow, ctx.kind, sources = hidden_NH.is_cuda, _kind(hidden_NH), (hidden_NH, weight_VH, bias_V)
        hidden_NH, weight_VH, bias_V = _cast(ctx.kind, *sources)
        ctx.temperature, ctx.softcap, ctx.entropy = temperature, softcap, "entropy" in outputs
        row, _ = choose("token_logprob", (hidden_NH,))
        extras = _Extras(outputs, ids_N.numel(), weight_VH, temperature, softcap)
        logp_N, entropy_N, lse_N = linear.logprob(
            extras.around(row),
            hidden_NH,
            weight_VH,
            ids_N,
            bias_V,
            temperature,
            None,
            softcap,
            ctx.entropy,
            None,
            ctx.narrow,
        )
        # not what they were cast to: that would stay
        ctx.save_for_backward(*sources, ids_N, logp_N, entropy_N, lse_N)
        made = extras.made(hidden_NH, weight_VH, bias_V)
        ctx.mark_non_differentiable(*(value for value in made if value is not None))
        return logp_N, entropy_N if ctx.entropy else None, *made

    @staticmethod
    @first_order_only("the chunked head")
    def backward(ctx, grad_logp_N, grad_entropy_N, *_):
        if grad_logp_N is None and grad_entropy_N is None:
            return (None,) * 7
        *sources, ids_N, logp_N, entropy_N, lse_N = ctx.saved_tensors
        hidden_NH, weight_VH, bias_V = _cast(ctx.kind, *sources)
        backward, _ = choose("token_logprob_backward", (hidden_NH,))
        wanted = [bool(want) for want in ctx.needs_input_grad[:3]]
        made = linear.logprob_backward(
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
            ctx.narrow,
        )
        return *(None if made is None else made.to(source.dtype) for made, source in zip(made, sources)), *[
            None
        ] * 4


def _kind(hidden_NH):
    """What the products take: autocast's type on a device; a CPU's half-precision products are slower."""
    device = hidden_NH.device.type
    return (
        torch.get_autocast_dtype(device)
        if device != "cpu" and torch.is_autocast_enabled(device)
        else hidden_NH.dtype
    )


def _cast(kind, *tensors):
    return tuple(None if tensor is None else tensor.to(kind) for tensor in tensors)


class _Extras:
    """What TRL's trainers log beside log-probs, taken from each chunk of logits while it exists."""

    def __init__(self, outputs, count, weight_VH, temperature, softcap):
        self.wanted, self.temperature, self.softcap = outputs, temperature, softcap
        self.at = 0  # tokens of the chunks so far

        def new(name, dtype):
            return weight_VH.new_empty(count, dtype=dtype) if name in outputs else None

        self.sum_sq_N, self.mean_N, self.top_N = (
            new(EXTRAS[0], torch.float32),
            None,
            new(EXTRAS[2], torch.bool),
        )
        if softcap:
            self.mean_N = new(EXTRAS[1], torch.float32)

    def around(self, row):
        """A room's row function that fills this one's outputs on the way."""

        def forward(logits_CV, ids_C, *rest):
            made = row(logits_CV, ids_C, *rest)
            self._take(slice(self.at, self.at + len(ids_C)), logits_CV, ids_C, made[2])
            self.at += len(ids_C)
            return made

        return forward

    def _take(self, at, logits_CV, ids_C, lse_C):
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

    def made(self, hidden_NH, weight_VH, bias_V):
        """(log sum p², mean logit, is top 1), None where not asked for."""
        if EXTRAS[1] in self.wanted and self.mean_N is None:
            # A mean over the vocabulary of a linear layer is the layer's mean row: no logits needed.
            with torch.autocast(hidden_NH.device.type, enabled=False):
                mean_N = hidden_NH.float() @ weight_VH.float().mean(0)
            self.mean_N = (mean_N if bias_V is None else mean_N + bias_V.float().mean()) / self.temperature
        return self.sum_sq_N, self.mean_N, self.top_N


def chunked_head(theirs):
    """A stand-in for TRL's autograd function: `.apply` with its arguments.

    ZeRO-3 shards and odd scales or caps go to theirs.
    """
    count = counting(f"{UTILS}:_ChunkedLogProbFunction")

    class ChunkedHead:
        __doc__ = _Head.__doc__
        forward = staticmethod(theirs.forward)  # what a second look at its parameters finds

        @staticmethod
        def apply(
            hidden,
            weight,
            bias,
            targets,
            temperature,
            chunk_size,
            final_logit_softcapping=None,
            logit_scale=1.0,
            outputs=("entropy", *EXTRAS),
        ):
            sharded = any(hasattr(tensor, "ds_id") for tensor in (weight, bias))
            odd = (
                not _plain_numbers(temperature, logit_scale, final_logit_softcapping)
                or hidden.dtype == torch.float64
            )
            if sharded or odd or not shared.plain(hidden, weight, bias, targets):
                return theirs.apply(
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
            count()
            targets = _checked(hidden, weight, targets, temperature)
            # scale · z under softcap s and temperature T is z under softcap s / scale and temperature T /
            # scale.
            softcap, temperature = (final_logit_softcapping or 0.0) / logit_scale, temperature / logit_scale
            # Compiled code cannot look into ours with the extras; the registered op, which has none, compiles
            # whole.
            learns = shared.learns(hidden, weight, bias) and not torch.compiler.is_compiling()
            if learns or set(outputs) & set(EXTRAS):
                made = _Head.apply(hidden, weight, bias, targets, temperature, softcap, tuple(outputs))
                track_inputs(made[0], hidden, weight, bias)
                return made
            return _by_the_op(hidden, weight, bias, targets, temperature, softcap, "entropy" in outputs)

    return ChunkedHead


def _plain_numbers(temperature, logit_scale, softcap):
    """Whether ours takes them: a cap of 0 or below is theirs to make sense of (-3 caps as 3 does), so is any
    tensor.
    """
    return (
        shared.numbers(temperature, logit_scale, softcap)
        and logit_scale > 0
        and (softcap is None or softcap > 0)
    )


def _by_the_op(hidden, weight, bias, targets, temperature, softcap, entropy):
    """Old and reference log-probs: on a device in one kernel whose logits never reach memory.

    Under torch.compile all.
    """
    hidden, weight, bias = _cast(_kind(hidden), hidden, weight, bias)
    made = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap or None,
        return_entropy=entropy,
    )
    return *(made if entropy else (made, None)), None, None, None


def _checked(hidden, weight, targets, temperature):
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
    if not checks.whole(targets):
        raise ValueError(f"targets: expected integers, got {targets.dtype}")
    shared.known_ids("targets: expected", targets, weight.shape[0])
    return checks.wide(targets)


LIBRARY = Library(
    name="trl",
    distribution="trl",
    versions=("1.16",),
    replace=(
        Replace(
            f"{UTILS}:_ChunkedLogProbFunction",
            chunked_head,
            "(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, "
            "logit_scale=1.0, "
            "outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'))",
            "less memory, faster on a CPU; an id outside the vocabulary is refused; -inf logits keep a "
            "finite entropy",
            signature_of="forward",
        ),
        Replace(
            f"{UTILS}:selective_log_softmax",
            selective_log_softmax,
            "(logits, index, temperature=1.0, row_mask=None)",
            "one read of the logits, float32 results, empty batches",
        ),
        Replace(
            f"{UTILS}:entropy_from_logits",
            shared.entropy_from_logits,
            "(logits, chunk_size=128)",
            "keeps no softmax for backward; -inf logits give a finite entropy (theirs: NaN)",
        ),
        Replace(
            f"{UTILS}:selective_log_softmax_and_entropy",
            selective_log_softmax_and_entropy,
            "(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",
            "log-prob and entropy in one read; -inf logits give a finite entropy (theirs: NaN)",
        ),
    ),
    leave=(
        (
            "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss",
            "eight losses and their metrics on [B, T] numbers in one method; its log-probs come from the "
            "replaced head",
        ),
        ("trl.kernels:ChunkedDivergenceFunction", "distillation: we have no such op"),
    ),
)
