"""Generalised advantage estimation in plain torch, any float dtype: the definition. Differentiable."""

import torch

from ..checks import result_dtype
from ..layout import Layout, following, layout, suffix_scan


def scan(
    reward_N: torch.Tensor, value_N: torch.Tensor, rows: Layout, gamma: float, lam: float, carry: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns of flat rows.

    The doublings square the decay 17 times in a row of 131,072 tokens: in float32 that alone is off by 1000
    times the tolerance where gamma * lam is near 1. So they run in float64.

    Args:
        reward_N: Rewards, 0 where masked.
        value_N: Values, 0 where masked.
        rows: Where the rows are.
        gamma: Discount.
        lam: Decay of the sum of differences.
        carry: A masked token between valid ones is skipped; else its reward and value count as 0.

    Returns:
        advantage_N and return_N in the dtype of value_N, 0 where masked.
    """
    dtype = value_N.dtype
    reward_N, value_N = reward_N.double(), value_N.double()
    inside_N = (~rows.edge_N).to(value_N.dtype)
    if carry:
        # A hole passes on what follows it: both the next value and the running sum go through unchanged.
        hole_N = ~rows.valid_N
        next_N = following(suffix_scan(value_N, hole_N * inside_N, rows.span), rows)
        decay_N = torch.where(hole_N, inside_N, gamma * lam * inside_N)
    else:
        next_N = following(value_N, rows)
        decay_N = gamma * lam * inside_N
    delta_N = reward_N + gamma * next_N - value_N
    if carry:
        delta_N = torch.where(rows.valid_N, delta_N, 0)
    advantage_N = suffix_scan(delta_N, decay_N, rows.span)
    advantage_N = torch.where(rows.valid_N, advantage_N, 0)
    return advantage_N.to(dtype), torch.where(rows.valid_N, advantage_N + value_N, 0).to(dtype)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    gamma: float,
    lam: float,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns.

    Args:
        rewards: Reward of each token, packed [N] or padded [B, T], any float dtype.
        values: Value before each token, of the same shape.
        cu_seqlens: int32 [B+1], or None with a mask.
        mask: bool [B, T], or None with cu_seqlens.
        gamma: Discount.
        lam: Decay of the sum of differences.
        carry: A masked token between valid ones is skipped; else its reward and value count as 0.

    Returns:
        advantages and returns, shaped as rewards; float64 for float64 rewards, else float32.
    """
    dtype = result_dtype(rewards)
    rows = layout("gae", rewards.numel(), cu_seqlens, mask)
    reward_N = torch.where(rows.valid_N, rewards.reshape(-1).to(dtype), 0)
    value_N = torch.where(rows.valid_N, values.reshape(-1).to(dtype), 0)
    advantage_N, return_N = scan(reward_N, value_N, rows, gamma, lam, carry)
    return advantage_N.reshape(rewards.shape), return_N.reshape(rewards.shape)
