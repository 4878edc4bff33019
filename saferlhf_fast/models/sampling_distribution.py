"""The distribution that responses are sampled from: one definition for sampling and for scoring.

Rows of the head without a token (models/tokenizer.py: spare_rows) have no probability in it. Then come a
repetition penalty, temperature, top-k and top-p, on fp32 logits, in the order of transformers and vLLM. A
nucleus is defined by its smallest logit, so that of equally likely tokens all belong to it or none, whatever
the order of a sort. Where a temperature is all there is (`plain`), the fused ops of saferlhf_fast.kernels
score, from a head that `head_of_tokens` has changed where rows have no token.

Shapes: legend in rollout/types.py; N counts one row per token to sample or to score, L the tokens before it,
U the rows of the head without a token.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..kernels import linear

if TYPE_CHECKING:
    from ..config.sections import Sampling

BLOCK = 256
"""Tokens of a block in which `pick` looks for one: two short sums instead of one over the vocabulary."""


def plain(sampling: "Sampling") -> bool:
    """True when nothing but a temperature shapes the distribution."""
    return sampling.top_p == 1.0 and sampling.top_k == 0 and sampling.repetition_penalty == 1.0


def sampling_logits(
    logits_NV: torch.Tensor,
    sampling: "Sampling",
    seen_NL: torch.Tensor | None = None,
    targets_N: torch.Tensor | None = None,
    spare_U: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logits whose softmax is the sampling distribution. Differentiable.

    Args:
        logits_NV: A model's logits, fp32.
        sampling: Repetition penalty, temperature, top-k and top-p.
        seen_NL: Ids of the tokens before each row's, repeats allowed; read for a repetition penalty only.
        targets_N: Tokens that stay possible even outside the nucleus, so that their log-prob is finite: the
            trainer's logits differ from the sampler's in the last bits, and a token at the nucleus's edge may
            now be outside. A row without a token stays impossible.
        spare_U: Ids of the rows without a token; None where there are none.

    Returns:
        Logits [N, V], −inf at tokens that cannot be sampled.
    """
    if spare_U is not None:
        logits_NV = logits_NV.index_fill(1, spare_U, -torch.inf)
    if sampling.repetition_penalty != 1.0:
        assert seen_NL is not None, "a repetition penalty needs the tokens before each row"
        logits_NV = logits_NV * _penalties(logits_NV.detach(), seen_NL, sampling.repetition_penalty)
    if sampling.temperature != 1.0:
        logits_NV = logits_NV / sampling.temperature
    smallest_N1 = _smallest_kept(logits_NV.detach(), sampling)
    if smallest_N1 is None:
        return logits_NV
    excluded_NV = logits_NV.detach() < smallest_N1
    if targets_N is not None:
        excluded_NV.scatter_(1, targets_N[:, None], False)
    return logits_NV.masked_fill(excluded_NV, -torch.inf)


def spare_mass(
    logits_NV: torch.Tensor, spare_U: torch.Tensor | None, temperature: float
) -> torch.Tensor | None:
    """The probability that the model gives to rows without a token, which sampling cuts away.

    Args:
        logits_NV: A model's logits, fp32.
        spare_U: Ids of the rows without a token.
        temperature: Divides the logits first.

    Returns:
        [N], 0 to 1; None without such rows.
    """
    if spare_U is None:
        return None
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    return (logits_NV.index_select(1, spare_U).logsumexp(-1) - logits_NV.logsumexp(-1)).exp()


def head_of_tokens(
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    spare_U: torch.Tensor,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A head whose softmax gives rows without a token no probability, as the fused ops take it.

    A bias of −inf keeps the number of logits, which models pad so that matrix products are fast. Under a
    softcap it would become a finite logit, so the head loses the rows there.

    Args:
        weight_VH: The head's weight.
        bias_V: The head's bias, or None.
        targets_N: int64.
        spare_U: Ids of the rows without a token, ascending.
        softcap: The model's cap on logits, or None.

    Returns:
        Weight, bias and targets. A target without a token has the log-prob −inf, or is outside of the head.
    """
    size = len(weight_VH)
    if softcap is None:
        if bias_V is None:
            return weight_VH, weight_VH.new_zeros(size).index_fill_(0, spare_U, -torch.inf), targets_N
        return weight_VH, bias_V.index_fill(0, spare_U, -torch.inf), targets_N
    kept_V = torch.ones(size, dtype=torch.bool, device=spare_U.device).index_fill_(0, spare_U, False)
    # a stable sort, because masked_select would wait for the device to know its length
    ids_K = kept_V.sort(descending=True, stable=True).indices[: size - len(spare_U)]
    place_V = torch.where(kept_V, kept_V.cumsum(0) - 1, size)
    return (
        weight_VH.index_select(0, ids_K),
        None if bias_V is None else bias_V.index_select(0, ids_K),
        place_V[targets_N],
    )


def _penalties(logits_NV: torch.Tensor, seen_NL: torch.Tensor, penalty: float) -> torch.Tensor:
    """The factor of each logit, [N, V]. Repeats in seen_NL write the same value."""
    factor_NL = torch.where(logits_NV.gather(1, seen_NL) < 0, penalty, 1.0 / penalty).to(logits_NV.dtype)
    return torch.ones_like(logits_NV).scatter_(1, seen_NL, factor_NL)


def _smallest_kept(scores_NV: torch.Tensor, sampling: "Sampling") -> torch.Tensor | None:
    """[N, 1]: the smallest score inside top-k and nucleus, or None where all scores are inside."""
    size = scores_NV.shape[1]
    k = sampling.top_k if 0 < sampling.top_k < size else size
    if sampling.top_p == 1.0:
        return scores_NV.topk(k).values[:, -1:] if k < size else None
    lse_N1 = scores_NV.logsumexp(-1, keepdim=True)
    if k == size and scores_NV.device.type == "cpu" and size > 4096:
        # Most nuclei are small, and a sort of the whole vocabulary costs as much as a forward pass.
        top_NK = scores_NV.topk(1024).values
        if bool(((top_NK - lse_N1).exp().sum(-1) > sampling.top_p).all()):
            return _edge(top_NK, lse_N1, sampling.top_p)
    top_NK = scores_NV.topk(k).values if k < size else scores_NV.sort(-1, descending=True).values
    return _edge(top_NK, top_NK.logsumexp(-1, keepdim=True) if k < size else lse_N1, sampling.top_p)


def _edge(top_NK: torch.Tensor, lse_N1: torch.Tensor, top_p: float) -> torch.Tensor:
    """[N, 1]: score of the nucleus's last token, the first at which the summed probability reaches top_p."""
    reached_NK = (top_NK - lse_N1).exp().double().cumsum(-1)
    last_N1 = (reached_NK < top_p).sum(-1, keepdim=True).clamp_(max=top_NK.shape[1] - 1)
    return top_NK.gather(1, last_N1)


def pick(scores_NV: torch.Tensor, uniform_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples a token for each row from one number in [0, 1).

    It is the first token, in the order of ids, at which the sum of probabilities exceeds the number. Sums are
    computed in float64 over blocks and then inside one.

    Args:
        scores_NV: Logits of `sampling_logits`, fp32; overwritten.
        uniform_N: A number in [0, 1) for each row.

    Returns:
        The tokens [N] and their log-probs [N] (fp32, nats). A row that is not finite gives a token and NaN.
    """
    size = scores_NV.shape[1]
    in_blocks = size - size % BLOCK
    weight_NV = scores_NV.sub_(scores_NV.amax(-1, keepdim=True)).exp_()
    blocks_NJ = weight_NV[:, :in_blocks].unflatten(1, (-1, BLOCK)).sum(-1) if in_blocks else weight_NV[:, :0]
    if in_blocks < size:
        blocks_NJ = torch.cat([blocks_NJ, weight_NV[:, in_blocks:].sum(-1, keepdim=True)], 1)
    upto_NJ = blocks_NJ.double().cumsum(-1)
    total_N1 = upto_NJ[:, -1:]
    aim_N1 = uniform_N.double()[:, None] * total_N1
    block_N1 = torch.searchsorted(upto_NJ, aim_N1, right=True).clamp_(max=upto_NJ.shape[1] - 1)
    aim_N1 -= torch.where(block_N1 > 0, upto_NJ.gather(1, (block_N1 - 1).clamp_(min=0)), 0.0)
    ids_NK = block_N1 * BLOCK + torch.arange(BLOCK, device=scores_NV.device)
    inside_NK = (
        torch.where(ids_NK < size, weight_NV.gather(1, ids_NK.clamp(max=size - 1)), 0.0).double().cumsum(-1)
    )
    # The two ways of summing a block may differ in the last bit: never beyond its last token that can be
    # sampled.
    aim_N1 = torch.minimum(aim_N1, inside_NK[:, -1:] * (1 - 1e-12))
    place_N1 = torch.searchsorted(inside_NK, aim_N1, right=True).clamp_(max=BLOCK - 1)
    token_N1 = (block_N1 * BLOCK + place_N1).clamp_(max=size - 1)
    return token_N1[:, 0], (weight_NV.gather(1, token_N1) / total_N1).log()[:, 0].float()


def uniforms(seeds: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """Numbers in [0, 1) that decide the tokens of each sequence.

    A sequence's numbers depend on its seed alone, not on how many sequences there are, nor on how many tokens
    it may have.

    Args:
        seeds: One for each sequence.
        counts: Most steps of each sequence.

    Returns:
        [S, T], float64, on the CPU; 0 behind a sequence's last step.
    """
    numbers_ST = torch.zeros(len(seeds), max(counts, default=0), dtype=torch.float64)
    for row_T, seed, count in zip(numbers_ST, seeds, counts):
        row_T[:count] = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers_ST


class Context(NamedTuple):
    """The tokens before each requested row of packed sequences; `seen` is what `sampling_logits` reads."""

    ids_SL: torch.Tensor  # int64, padded with the sequence's first token
    sequence_N: torch.Tensor  # int64: each row's sequence
    length_N: torch.Tensor  # int64: tokens before the target

    def seen(self, at: slice) -> torch.Tensor:
        """Ids [rows, L] before a slice of rows."""
        ids_NL = self.ids_SL[self.sequence_N[at]]
        known_NL = torch.arange(ids_NL.shape[1], device=ids_NL.device) < self.length_N[at][:, None]
        return torch.where(known_NL, ids_NL, ids_NL[:, :1])


def context_of(ids_M: torch.Tensor, lengths: Sequence[int], rows_N: torch.Tensor) -> Context:
    """The tokens before each requested row.

    Args:
        ids_M: Packed ids.
        lengths: Tokens of each sequence, host integers.
        rows_N: Positions in M of the requested rows.

    Returns:
        The Context.
    """
    lengths_S = torch.tensor(lengths, device=ids_M.device)
    ends_S = lengths_S.cumsum(0)
    place_SL = (ends_S - lengths_S)[:, None] + torch.arange(max(lengths, default=0), device=ids_M.device)
    place_SL = torch.where(place_SL < ends_S[:, None], place_SL, place_SL[:, :1])
    sequence_N = torch.searchsorted(ends_S, rows_N, right=True)
    return Context(ids_M[place_SL], sequence_N, rows_N - (ends_S - lengths_S)[sequence_N] + 1)


def sampling_logprob(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    targets_N: torch.Tensor,
    sampling: "Sampling",
    context: Context | None,
    chunk_tokens: int | None = None,
    spare_U: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-prob of targets under the sampling distribution.

    Means the same as::

        logits_NV = scale * (hidden_NH.float() @ weight_VH.float().T + bias_V)
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
        scores_NV = sampling_logits(logits_NV, sampling, seen, targets_N, spare_U)
        scores_NV.log_softmax(-1).gather(1, targets_N[:, None])

    with logits in chunks of rows, fp32 whatever the inputs are, computed again in the backward.
    Differentiable in hidden, weight and bias; the gradient of the weight is summed in fp32. No gradient
    flows through the choice of the nucleus. Under ZeRO-3 call it inside the head module's own forward.

    Args:
        hidden_NH: Hidden states before each target.
        weight_VH: The head's weight.
        bias_V: The head's bias, or None.
        softcap: The model's cap on logits, or None.
        scale: The model's factor on logits.
        targets_N: int64.
        sampling: Repetition penalty, temperature, top-k and top-p.
        context: The tokens before each target; None without a repetition penalty.
        chunk_tokens: Rows whose logits exist at once; None: as many as the workspace holds.
        spare_U: Ids of the rows without a token; None where there are none.

    Returns:
        logp_N, fp32, nats.

    Raises:
        ValueError: A repetition penalty without a context.
    """
    if sampling.repetition_penalty != 1.0 and context is None:
        raise ValueError("context: expected the tokens before each row, for a repetition penalty, got None")
    return _SamplingLogprob.apply(
        hidden_NH, weight_VH, bias_V, softcap, scale, targets_N, sampling, context, chunk_tokens, spare_U
    )


class _SamplingLogprob(torch.autograd.Function):
    """Chunks of rows: autograd runs from logits to log-prob; the head's products are written out here."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        softcap: float | None,
        scale: float,
        targets_N: torch.Tensor,
        sampling: "Sampling",
        context: Context | None,
        chunk_tokens: int | None,
        spare_U: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, spare_U, *(context or ()))
        ctx.settings = softcap, scale, sampling, chunk_tokens
        logp_N = hidden_NH.new_empty(len(targets_N), dtype=torch.float32)
        for at, logits_CV in _logits(hidden_NH, weight_VH, bias_V, chunk_tokens)[1]:
            logp_N[at] = _rows(logits_CV, softcap, scale, targets_N, sampling, context, at, spare_U)
        return logp_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, spare_U, *fields = ctx.saved_tensors
        softcap, scale, sampling, chunk_tokens = ctx.settings
        context = Context(*fields) if fields else None
        head, chunks = _logits(hidden_NH, weight_VH, bias_V, chunk_tokens)
        gradients = linear.Gradients(head, hidden_NH.dtype, *ctx.needs_input_grad[:3])
        for at, logits_CV in chunks:
            logits_CV = logits_CV.detach().requires_grad_()
            with torch.enable_grad():
                logp_C = _rows(logits_CV, softcap, scale, targets_N, sampling, context, at, spare_U)
            (d_CV,) = torch.autograd.grad(logp_C, logits_CV, grad_N[at])
            gradients.add(at, d_CV.to(head.gradient_dtype))
        rounded = [
            None if gradient is None else gradient.to(source.dtype)
            for gradient, source in zip(gradients.done(), (hidden_NH, weight_VH, bias_V))
        ]
        return *rounded, *[None] * 7


def _logits(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, chunk_tokens: int | None
) -> tuple[linear.Head, Iterator[tuple[slice, torch.Tensor]]]:
    """The head, and an iterator over (slice, its fp32 logits); each step overwrites the logits before it."""
    head = linear.head(hidden_NH, weight_VH, bias_V, hidden_NH.device.type == "cuda")
    slices = linear.chunks(len(hidden_NH), len(weight_VH), chunk_tokens, hidden_NH.device)
    buffer_CV = head.buffer(slices)
    return head, ((at, head.logits(at, buffer_CV)) for at in slices)


def _rows(
    logits_CV: torch.Tensor,
    softcap: float | None,
    scale: float,
    targets_N: torch.Tensor,
    sampling: "Sampling",
    context: Context | None,
    at: slice,
    spare_U: torch.Tensor | None,
) -> torch.Tensor:
    """logp_C from the logits of the chunk `at`, which the head gives before scale and softcap."""
    if scale != 1.0:
        logits_CV = logits_CV * scale
    if softcap is not None:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    seen_CL = context.seen(at) if context is not None and sampling.repetition_penalty != 1.0 else None
    scores_CV = sampling_logits(logits_CV, sampling, seen_CL, targets_N[at], spare_U)
    return scores_CV.gather(1, targets_N[at][:, None])[:, 0] - scores_CV.logsumexp(-1)
