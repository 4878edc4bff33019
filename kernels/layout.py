"""Rows of tokens, packed or padded, as flat vectors: what the references share. No host sync, nothing sorted.

Packed [N] with cu_seqlens [B+1] and padded [B, T] with a mask become the same five vectors over N flat
positions (N = B*T when padded). Positions past cu_seqlens[-1] belong to no row: they are masked.
"""

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """valid_N: token is real. row_N: its row. edge_N: last position of a row. final_N: last valid token of a
    row. count_B: valid tokens per row. span: no row is longer than this (bounds the scan).
    """

    valid_N: torch.Tensor
    row_N: torch.Tensor
    edge_N: torch.Tensor
    final_N: torch.Tensor
    count_B: torch.Tensor
    span: int


def check_offsets(op, cu_seqlens, tokens):
    """On the CPU, where values are at hand: offsets start at 0, never fall, and end at or before `tokens`."""
    if cu_seqlens.device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > tokens or any(b < a for a, b in zip(offsets, offsets[1:])):
        raise ValueError(
            f"{op}: cu_seqlens: expected offsets that start at 0, never fall and end at or before "
            f"{tokens}, got {offsets[:8]}{'...' if len(offsets) > 8 else ''} ending in {offsets[-1]}"
        )


def layout(op, tokens, cu_seqlens, mask):
    """The Layout of `tokens` flat positions; exactly one of cu_seqlens and mask is given."""
    device = (mask if cu_seqlens is None else cu_seqlens).device
    at_N = torch.arange(tokens, device=device)
    if cu_seqlens is not None:
        check_offsets(op, cu_seqlens, tokens)
        offsets = cu_seqlens.long()
        count_B = offsets.diff()
        row_N = torch.searchsorted(offsets[1:], at_N, right=True)
        valid_N = row_N < count_B.shape[0]
        row_N = row_N.clamp(max=max(count_B.shape[0] - 1, 0))
        if count_B.shape[0] == 0:
            return Layout(valid_N, row_N, ~valid_N, valid_N, count_B, 0)
        edge_N = at_N + 1 == offsets[1:][row_N]
        return Layout(valid_N, row_N, edge_N, edge_N & valid_N, count_B, tokens)
    width = max(mask.shape[1], 1)
    later_BT = mask.flip(1).cumsum(1).flip(1)  # valid tokens at or after each position
    final_N = (mask & (later_BT == 1)).reshape(-1)
    return Layout(
        mask.reshape(-1), at_N // width, (at_N + 1) % width == 0, final_N, mask.sum(1), mask.shape[1]
    )


def per_token(value_B, rows):
    """value_B[row] for each flat position; zeros where there is no row at all."""
    if value_B.shape[0] == 0:
        return torch.zeros(rows.row_N.shape, dtype=value_B.dtype, device=value_B.device)
    return value_B[rows.row_N]


def shares(rows, token_mean, normalizer, dtype):
    """(share_N, inverse) such that the reduced loss is inverse * sum(share * x); share is 0 where masked.

    share: 1 / tokens of the row (sequence-mean) or 1 (token-mean). inverse: 1 / `normalizer` (0-d), or
    without one 1 / rows with a token (or tokens) of this call; 0 where that is 0, NaN where `normalizer` is
    NaN or negative.
    """
    share_N = rows.valid_N.to(dtype)
    if not token_mean:
        share_N = share_N * per_token(1 / rows.count_B.clamp(min=1).to(dtype), rows)
    if normalizer is None:
        normalizer = (rows.count_B.sum() if token_mean else (rows.count_B > 0).sum()).to(dtype)
    return share_N, torch.where(normalizer == 0, 0, torch.where(normalizer > 0, 1 / normalizer, torch.nan))


def weights(rows, token_mean, normalizer, dtype):
    """weight_N = share * inverse: the reduced loss is sum(weight * x).

    0 where masked, whatever the normalizer is.
    """
    share_N, inverse = shares(rows, token_mean, normalizer, dtype)
    return torch.where(rows.valid_N, share_N * inverse, 0)


def suffix_scan(add_N, decay_N, span):
    """y_t = add_t + decay_t * y_{t+1}, y after the end 0, in log2(span) doublings (decay is 0 at a row's last
    position).
    """
    step = 1
    while step < span:
        add_N = torch.cat([add_N[:-step] + decay_N[:-step] * add_N[step:], add_N[-step:]])
        decay_N = torch.cat([decay_N[:-step] * decay_N[step:], decay_N[-step:]])
        step *= 2
    return add_N


def following(value_N, rows):
    """value_{t+1} inside a row, 0 after its last position."""
    shifted_N = torch.cat([value_N[1:], value_N[:1]])
    return torch.where(rows.edge_N, torch.zeros_like(value_N), shifted_N)
