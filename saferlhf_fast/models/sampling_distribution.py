"""The distribution that responses are sampled from, for who samples and for who scores: one definition.

A repetition penalty, then temperature, top-k and top-p, on fp32 logits, in the order of transformers and
vLLM. A nucleus is told by its smallest logit, so that of equally likely tokens all belong to it or none,
whatever the order of a sort. Only a temperature (`plain`): the fused ops of saferlhf_fast.kernels score that,
and nothing of this file is needed but `pick`.

Shapes: N rows (one per token to sample or to score), C those of a chunk, V vocabulary, H hidden size, L
tokens before a row's, S sequences, J blocks of the vocabulary, K tokens of a block or of a nucleus.
"""

from typing import NamedTuple

import torch

from ..kernels import linear

BLOCK = 256
"""Tokens of a block in which `pick` looks for one: two short sums instead of one over the vocabulary."""


def plain(sampling):
    """True when nothing but a temperature shapes the distribution."""
    return sampling.top_p == 1.0 and sampling.top_k == 0 and sampling.repetition_penalty == 1.0


def sampling_logits(logits_NV, sampling, seen_NL=None, targets_N=None):
    """Logits of a model, fp32 -> logits whose softmax is sampled from; −inf where nothing is. Differentiable.

    seen_NL: ids of the tokens before each row's, repeats allowed; only read for a repetition penalty.
    targets_N: tokens that stay possible whatever the nucleus says, so that their log-prob is finite: the
    trainer's logits are not the sampler's to the last bit, and a token at its edge may lie outside by now.
    """
    if sampling.repetition_penalty != 1.0:
        logits_NV = logits_NV * _penalties(logits_NV.detach(), seen_NL, sampling.repetition_penalty)
    if sampling.temperature != 1.0:
        logits_NV = logits_NV / sampling.temperature
    smallest_N1 = _smallest_kept(logits_NV.detach(), sampling)
    if smallest_N1 is None:
        return logits_NV
    out_NV = logits_NV.detach() < smallest_N1
    if targets_N is not None:
        out_NV.scatter_(1, targets_N[:, None], False)
    return logits_NV.masked_fill(out_NV, -torch.inf)


def _penalties(logits_NV, seen_NL, penalty):
    """What each logit is multiplied by. Repeats in seen_NL write the same value."""
    factor_NL = torch.where(logits_NV.gather(1, seen_NL) < 0, penalty, 1.0 / penalty).to(logits_NV.dtype)
    return torch.ones_like(logits_NV).scatter_(1, seen_NL, factor_NL)


def _smallest_kept(scores_NV, sampling):
    """[N, 1]: the smallest score inside top-k and nucleus, or None where all are."""
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


def _edge(top_NK, lse_N1, top_p):
    """Score of the last token of the nucleus: the first at which the probability of all before and itself
    reaches top_p.
    """
    reached_NK = (top_NK - lse_N1).exp().double().cumsum(-1)
    last_N1 = (reached_NK < top_p).sum(-1, keepdim=True).clamp_(max=top_NK.shape[1] - 1)
    return top_NK.gather(1, last_N1)


def pick(scores_NV, uniform_N):
    """Warped fp32 scores, which it destroys, and a number in [0, 1) for each row -> (token_N, logp_N).

    The first token, in the order of ids, at which the sum of probabilities exceeds the number. Sums are made
    in float64 over blocks and then inside one. A row that is not finite gives some token and NaN.
    """
    size = scores_NV.shape[1]
    whole = size - size % BLOCK
    weight_NV = scores_NV.sub_(scores_NV.amax(-1, keepdim=True)).exp_()
    blocks_NJ = weight_NV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1) if whole else weight_NV[:, :0]
    if whole < size:
        blocks_NJ = torch.cat([blocks_NJ, weight_NV[:, whole:].sum(-1, keepdim=True)], 1)
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
    at_N1 = torch.searchsorted(inside_NK, aim_N1, right=True).clamp_(max=BLOCK - 1)
    token_N1 = (block_N1 * BLOCK + at_N1).clamp_(max=size - 1)
    return token_N1[:, 0], (weight_NV.gather(1, token_N1) / total_N1).log()[:, 0].float()


def uniforms(seeds, counts):
    """Numbers in [0, 1) that decide the tokens of each sequence -> [sequences, most steps], float64, on the
    CPU.

    A sequence's depend on its seed alone: not on how many there are, nor on how many tokens it may have.
    """
    made = torch.zeros(len(seeds), max(counts, default=0), dtype=torch.float64)
    for row, seed, count in zip(made, seeds, counts):
        row[:count] = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made


class Context(NamedTuple):
    """What stands before each asked-for row of packed sequences; `seen` is what `sampling_logits` reads."""

    ids_SL: torch.Tensor  # int64, filled up with the sequence's first token
    sequence_N: torch.Tensor  # int64
    length_N: torch.Tensor  # int64: tokens before the target

    def seen(self, at):
        """Ids [rows, L] of a slice of rows."""
        ids_NL = self.ids_SL[self.sequence_N[at]]
        known_NL = torch.arange(ids_NL.shape[1], device=ids_NL.device) < self.length_N[at][:, None]
        return torch.where(known_NL, ids_NL, ids_NL[:, :1])


def context_of(ids_M, lengths, rows_N):
    """Packed ids, host lengths of the sequences, positions in M that are asked for -> Context."""
    lengths_S = torch.tensor(lengths, device=ids_M.device)
    ends_S = lengths_S.cumsum(0)
    at_SL = (ends_S - lengths_S)[:, None] + torch.arange(max(lengths, default=0), device=ids_M.device)
    at_SL = torch.where(at_SL < ends_S[:, None], at_SL, at_SL[:, :1])
    sequence_N = torch.searchsorted(ends_S, rows_N, right=True)
    return Context(ids_M[at_SL], sequence_N, rows_N - (ends_S - lengths_S)[sequence_N] + 1)


def sampling_logprob(
    hidden_NH, weight_VH, bias_V, softcap, scale, targets_N, sampling, context, chunk_tokens=None
):
    """Log-prob of targets under the sampling distribution, fp32 [N].

    Means the same as::

        logits_NV = softcap(scale * (hidden_NH.float() @ weight_VH.float().T + bias_V))      # softcap * tanh(· / softcap)
        sampling_logits(logits_NV, sampling, seen, targets_N).log_softmax(-1).gather(1, targets_N[:, None])

    with logits in chunks of rows, fp32 whatever the inputs are, made again in the backward. Differentiable in
    hidden, weight and bias; the gradient of the weight is added up in fp32. Which tokens belong to the
    nucleus is taken as given. softcap: None for none · context: a `Context`, None without a repetition
    penalty · chunk_tokens: rows whose logits exist at once, by the workspace when None. Under ZeRO-3 call it
    inside the head module's own forward.
    """
    if sampling.repetition_penalty != 1.0 and context is None:
        raise ValueError("context: expected the tokens before each row, for a repetition penalty, got None")
    return _SamplingLogprob.apply(
        hidden_NH, weight_VH, bias_V, softcap, scale, targets_N, sampling, context, chunk_tokens
    )


class _SamplingLogprob(torch.autograd.Function):
    """Chunks of rows: autograd goes through what lies between logits and log-prob, the head's products are
    ours.
    """

    @staticmethod
    def forward(
        ctx, hidden_NH, weight_VH, bias_V, softcap, scale, targets_N, sampling, context, chunk_tokens
    ):
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, *(context or ()))
        ctx.settings = softcap, scale, sampling, chunk_tokens
        logp_N = hidden_NH.new_empty(len(targets_N), dtype=torch.float32)
        for at, logits_CV in _logits(hidden_NH, weight_VH, bias_V, chunk_tokens)[1]:
            logp_N[at] = _rows(logits_CV, softcap, scale, targets_N, sampling, context, at)
        return logp_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        hidden_NH, weight_VH, bias_V, targets_N, *context = ctx.saved_tensors
        softcap, scale, sampling, chunk_tokens = ctx.settings
        context = Context(*context) if context else None
        head, parts = _logits(hidden_NH, weight_VH, bias_V, chunk_tokens)
        gradients = linear.Gradients(head, hidden_NH.dtype, *ctx.needs_input_grad[:3])
        for at, logits_CV in parts:
            logits_CV = logits_CV.detach().requires_grad_()
            with torch.enable_grad():
                logp_C = _rows(logits_CV, softcap, scale, targets_N, sampling, context, at)
            (d_CV,) = torch.autograd.grad(logp_C, logits_CV, grad_N[at])
            gradients.add(at, d_CV.to(head.made))
        made = [
            None if gradient is None else gradient.to(source.dtype)
            for gradient, source in zip(gradients.done(), (hidden_NH, weight_VH, bias_V))
        ]
        return *made, *[None] * 6


def _logits(hidden_NH, weight_VH, bias_V, chunk_tokens):
    """-> the head, and an iterator over (slice, its fp32 logits), which is good for one chunk at a time."""
    head = linear.head(hidden_NH, weight_VH, bias_V, hidden_NH.device.type == "cuda")
    slices = linear.chunks(len(hidden_NH), len(weight_VH), chunk_tokens, hidden_NH.device)
    buffer_CV = head.buffer(slices)
    return head, ((at, head.logits(at, buffer_CV)) for at in slices)


def _rows(logits_CV, softcap, scale, targets_N, sampling, context, at):
    """A chunk's logits as the head makes them -> logp_C."""
    if scale != 1.0:
        logits_CV = logits_CV * scale
    if softcap is not None:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    seen_CL = context.seen(at) if sampling.repetition_penalty != 1.0 else None
    scores_CV = sampling_logits(logits_CV, sampling, seen_CL, targets_N[at])
    return scores_CV.gather(1, targets_N[at][:, None])[:, 0] - scores_CV.logsumexp(-1)
