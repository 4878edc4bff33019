"""The policy loss of the policy that sampled: log-probs, what is made of them, and gradients, from one look
at the logits.

With one optimiser step per batch the advantages depend on log-probs that this very forward makes (KL
shaping), and so do the losses. A sequence's advantages need the log-probs of the whole sequence and of no
other: so the head works through chunks of whole sequences. A chunk's logits are made, its log-probs read,
advantages and d loss / d log-prob made of those, d logits written over the logits, and both gradient products
taken: three products in all, where a pass for the old log-probs and `linear_ppo_loss` after it take four.

Leaves out: several optimiser steps per batch, whose ratio is not 1 (`linear_ppo_loss`).
Shapes: N tokens, C those of a chunk, H hidden, V vocabulary.
"""

import torch

from ..kernels import linear
from ..kernels.checks import known_ids
from ..kernels.dispatch import choose
from ..kernels.first_order import first_order_only, track_inputs


def on_policy_loss(
    hidden_NH, weight_VH, bias_V, targets_N, counts, chunk_loss, temperature=1.0, softcap=None
):
    """-> loss, a scalar with gradients to hidden, weight and bias.

    counts: tokens of each sequence, host integers · chunk_loss(sequences, tokens, logp_C) -> (loss, d loss /
    d logp_C): two slices that say where the chunk lies, and its log-probs (fp32, nats, no graph). It is
    called once for each chunk, in order.
    """
    loss = _OnPolicy.apply(
        hidden_NH, weight_VH, bias_V, targets_N, counts, chunk_loss, temperature, softcap or 0.0
    )
    track_inputs(loss, hidden_NH, weight_VH, bias_V)
    return loss


def loss_of(logp_N, counts, chunk_loss):
    """The same loss from log-probs that were made otherwise, with graph."""
    loss, grad_N = chunk_loss(slice(0, len(counts)), slice(0, len(logp_N)), logp_N.detach())
    return loss + ((logp_N - logp_N.detach()) * grad_N).sum()


def whole_sequences(counts, most):
    """Chunks of at most `most` tokens, or one sequence -> [(slice of sequences, slice of tokens)]."""
    cuts, first, at, held = [], 0, 0, 0
    for i, count in enumerate(counts):
        if held and held + count > most:
            cuts.append((slice(first, i), slice(at, at + held)))
            first, at, held = i, at + held, 0
        held += count
    return [*cuts, (slice(first, len(counts)), slice(at, at + held))] if len(counts) > first else cuts


class _OnPolicy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, targets_N, counts, chunk_loss, temperature, softcap):
        known_ids("on_policy_loss", targets_N, len(weight_VH))
        forward, _ = choose("token_logprob", (hidden_NH,), "auto")
        backward, _ = choose("token_logprob_backward", (hidden_NH,), "auto")
        head = linear.head(hidden_NH, weight_VH, bias_V, hidden_NH.device.type == "cuda")
        gradients = linear.Gradients(head, linear.held(hidden_NH.dtype), *ctx.needs_input_grad[:3])
        cuts = whole_sequences(counts, linear.chunk_size(len(weight_VH), hidden_NH.device))
        buffer_CV, total = head.buffer([at for _, at in cuts]), hidden_NH.new_zeros((), dtype=torch.float32)
        for sequences, at in cuts:
            logits_CV = head.logits(at, buffer_CV)
            logp_C, entropy_C, lse_C = forward(logits_CV, targets_N[at], temperature, None, softcap, False)
            loss, grad_C = chunk_loss(sequences, at, logp_C)
            total += loss
            d_CV = head.over(logits_CV)
            backward(
                logits_CV,
                targets_N[at],
                logp_C,
                entropy_C,
                lse_C,
                grad_C,
                None,
                temperature,
                None,
                softcap,
                d_CV,
            )
            gradients.add(at, d_CV)
        made = gradients.done()
        ctx.kinds = hidden_NH.dtype, weight_VH.dtype
        ctx.save_for_backward(*made)
        return total

    @staticmethod
    @first_order_only("on_policy_loss")
    def backward(ctx, upstream):
        hidden, weight = ctx.kinds
        made = [
            None if gradient is None else linear.scaled(gradient, upstream, kind)
            for gradient, kind in zip(ctx.saved_tensors, (hidden, weight, weight))
        ]
        return *made, None, None, None, None, None
