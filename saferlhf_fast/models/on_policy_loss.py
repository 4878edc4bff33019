"""The policy loss of the policy that sampled: log-probs, loss and gradients from one pass over the logits.

With one optimiser step per batch the advantages depend on log-probs that this same forward computes (KL
shaping), and so do the losses. A sequence's advantages need the log-probs of the complete sequence and of no
other, so the head works through chunks of complete sequences. For each chunk it computes the logits, reads
the log-probs, has advantages and d loss / d log-prob computed from those, writes d logits over the logits,
and takes both gradient products. That is three products in all; a pass for the old log-probs followed by
`linear_ppo_loss` takes four.

Leaves out: several optimiser steps per batch, whose ratio is not 1 (`linear_ppo_loss`).
Shapes: legend in rollout/types.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels import linear
from ..kernels.checks import known_ids
from ..kernels.dispatch import choose
from ..kernels.first_order import first_order_only, track_inputs

ChunkLoss = Callable[[slice, slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(slice of sequences, slice of tokens, logp_C: fp32, nats, no graph) -> (loss, d loss / d logp_C)."""


def on_policy_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    counts: Sequence[int],
    chunk_loss: ChunkLoss,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """The policy loss, with gradients computed in the forward.

    Args:
        hidden_NH: Hidden states before each token.
        weight_VH: The head's weight.
        bias_V: The head's bias, or None.
        targets_N: int64; the token after each hidden state.
        counts: Tokens of each sequence, host integers.
        chunk_loss: Called once for each chunk, in order.
        temperature: Of the distribution that was sampled.
        softcap: The model's cap on logits, or None.

    Returns:
        The loss, a scalar (fp32) with gradients to hidden states, weight and bias.
    """
    loss = _OnPolicy.apply(
        hidden_NH, weight_VH, bias_V, targets_N, counts, chunk_loss, temperature, softcap or 0.0
    )
    track_inputs(loss, hidden_NH, weight_VH, bias_V)
    return loss


def loss_of(logp_N: torch.Tensor, counts: Sequence[int], chunk_loss: ChunkLoss) -> torch.Tensor:
    """The same loss from log-probs with a graph that were computed in another way."""
    loss, grad_N = chunk_loss(slice(0, len(counts)), slice(0, len(logp_N)), logp_N.detach())
    return loss + ((logp_N - logp_N.detach()) * grad_N).sum()


def complete_sequences(counts: Sequence[int], most: int) -> list[tuple[slice, slice]]:
    """Cuts a pass into chunks of complete sequences.

    Args:
        counts: Tokens of each sequence.
        most: Tokens that a chunk may have; a longer sequence is a chunk by itself.

    Returns:
        (slice of sequences, slice of tokens) of each chunk.
    """
    chunks: list[tuple[slice, slice]] = []
    first, start, tokens = 0, 0, 0
    for i, count in enumerate(counts):
        if tokens and tokens + count > most:
            chunks.append((slice(first, i), slice(start, start + tokens)))
            first, start, tokens = i, start + tokens, 0
        tokens += count
    return (
        [*chunks, (slice(first, len(counts)), slice(start, start + tokens))]
        if len(counts) > first
        else chunks
    )


class _OnPolicy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        counts: Sequence[int],
        chunk_loss: ChunkLoss,
        temperature: float,
        softcap: float,
    ) -> torch.Tensor:
        known_ids("on_policy_loss", targets_N, len(weight_VH))
        forward, _ = choose("token_logprob", (hidden_NH,), "auto")
        backward, _ = choose("token_logprob_backward", (hidden_NH,), "auto")
        head = linear.head(hidden_NH, weight_VH, bias_V, hidden_NH.device.type == "cuda")
        gradients = linear.Gradients(head, linear.stored_dtype(hidden_NH.dtype), *ctx.needs_input_grad[:3])
        chunks = complete_sequences(counts, linear.chunk_size(len(weight_VH), hidden_NH.device))
        buffer_CV, total = head.buffer([at for _, at in chunks]), hidden_NH.new_zeros((), dtype=torch.float32)
        for sequences, at in chunks:
            logits_CV = head.logits(at, buffer_CV)
            logp_C, entropy_C, lse_C = forward(logits_CV, targets_N[at], temperature, None, softcap, False)
            loss, grad_C = chunk_loss(sequences, at, logp_C)
            total += loss
            d_CV = head.gradient_view(logits_CV)
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
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype
        ctx.save_for_backward(*gradients.done())
        return total

    @staticmethod
    @first_order_only("on_policy_loss")
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.dtypes
        scaled = [
            None if gradient is None else linear.scaled(gradient, upstream, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, (hidden, weight, weight))
        ]
        return *scaled, None, None, None, None, None
