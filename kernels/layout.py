"""Rows of tokens, packed or padded, as flat vectors: what the references share. No host sync, nothing sorted.

Packed [N] with cu_seqlens [B+1] and padded [B, T] with a mask become the same five vectors over N flat
positions (N = B*T when padded). Positions past cu_seqlens[-1] belong to no row: they are masked.
"""

from typing import NamedTuple

import torch


def flattened(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """The tensor in a shape: itself where it has it, since even a view that changes nothing costs autograd.

    Args:
        tensor: Any tensor.
        shape: Its new shape.
    """
    return tensor if tensor.shape == shape else tensor.reshape(shape)


class Layout(NamedTuple):
    """Where rows and valid tokens are among N flat positions.

    Attributes:
        valid_N: The position holds a token that counts; bool.
        row_N: Index of the position's row; int64.
        edge_N: The position is the last of its row, masked or not; bool.
        final_N: The position is the last valid token of its row; bool.
        count_B: Valid tokens of each row; int64.
        span: No row has more positions than this; it bounds the number of steps of a scan.
    """

    valid_N: torch.Tensor
    row_N: torch.Tensor
    edge_N: torch.Tensor
    final_N: torch.Tensor
    count_B: torch.Tensor
    span: int


def check_offsets(op: str, cu_seqlens: torch.Tensor, tokens: int) -> None:
    """Checks offsets, on the CPU alone: on a device looking at values would make the host wait.

    Args:
        op: Name of the op, for messages.
        cu_seqlens: int32 [B+1].
        tokens: N.

    Raises:
        ValueError: Offsets do not start at 0, fall, or end after `tokens`.
    """
    if cu_seqlens.device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > tokens or any(b < a for a, b in zip(offsets, offsets[1:])):
        raise ValueError(
            f"{op}: cu_seqlens: expected offsets that start at 0, never fall and end at or before "
            f"{tokens}, got {offsets[:8]}{'...' if len(offsets) > 8 else ''} ending in {offsets[-1]}"
        )


def layout(op: str, tokens: int, cu_seqlens: torch.Tensor | None, mask: torch.Tensor | None) -> Layout:
    """The Layout of `tokens` flat positions.

    Args:
        op: Name of the op, for messages.
        tokens: N, or B*T.
        cu_seqlens: int32 [B+1], or None with a mask.
        mask: bool [B, T], or None with cu_seqlens.

    Raises:
        ValueError: Offsets that do not fit, on the CPU.
    """
    if cu_seqlens is not None:
        at_N = torch.arange(tokens, device=cu_seqlens.device)
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
    assert mask is not None, f"{op}: rows need cu_seqlens or a mask"
    at_N = torch.arange(tokens, device=mask.device)
    width = max(mask.shape[1], 1)
    later_BT = mask.flip(1).cumsum(1).flip(1)  # valid tokens at or after each position
    final_N = (mask & (later_BT == 1)).reshape(-1)
    return Layout(
        mask.reshape(-1), at_N // width, (at_N + 1) % width == 0, final_N, mask.sum(1), mask.shape[1]
    )


def per_token(value_B: torch.Tensor, rows: Layout) -> torch.Tensor:
    """Each position's value of its row.

    Args:
        value_B: One value for each row.
        rows: Where the rows are.

    Returns:
        [N], of the dtype of value_B; zeros where there is no row at all.
    """
    if value_B.shape[0] == 0:
        return torch.zeros(rows.row_N.shape, dtype=value_B.dtype, device=value_B.device)
    return value_B[rows.row_N]


def shares(
    rows: Layout, token_mean: bool, normalizer: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of a reduced loss, which is inverse * sum(share * x).

    Args:
        rows: Where the tokens are.
        token_mean: The mean over tokens; else the mean over sequences of each one's token mean.
        normalizer: 0-d count of sequences (or tokens) that the loss is divided by; None for those of this
            call.
        dtype: Of the results.

    Returns:
        share_N: 1 / tokens of the row, or 1 with token_mean; 0 where masked.
        inverse: 0-d, 1 / the count; 0 where that is 0, NaN where it is negative or NaN.
    """
    share_N = rows.valid_N.to(dtype)
    if not token_mean:
        share_N = share_N * per_token(1 / rows.count_B.clamp(min=1).to(dtype), rows)
    return share_N, _inverse(rows.count_B, token_mean, normalizer, dtype)


def _inverse(
    count_B: torch.Tensor, token_mean: bool, normalizer: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """0-d, 1 / the count of sequences or tokens; 0 where that is 0, NaN where it is negative or NaN."""
    if normalizer is not None:
        return torch.where(normalizer == 0, 0, torch.where(normalizer > 0, 1 / normalizer, torch.nan))
    count = (count_B.sum() if token_mean else (count_B > 0).sum()).to(dtype)
    return torch.where(count > 0, 1 / count, 0)


def weights(
    op: str,
    tokens: int,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    token_mean: bool,
    normalizer: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of each token in a reduced loss, which is sum(weight * x).

    Args:
        op: As in `layout`, and so are the next three.
        tokens: N, or B*T.
        cu_seqlens: int32 [B+1], or None with a mask.
        mask: bool [B, T], or None with cu_seqlens.
        token_mean: As in `shares`, and so are the others.
        normalizer: 0-d count that the loss is divided by; None for that of this call.
        dtype: Of the weights.

    Returns:
        weight_N, 0 where masked, whatever the normalizer is, and valid_N (bool).

    Raises:
        ValueError: As `layout`.
    """
    if mask is not None:
        valid_N, count_B = mask.reshape(-1), mask.sum(1)
    else:
        assert cu_seqlens is not None, f"{op}: rows need cu_seqlens or a mask"
        check_offsets(op, cu_seqlens, tokens)
        count_B = cu_seqlens.diff()
        at_N = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        valid_N = at_N < cu_seqlens[-1]
    inverse = _inverse(count_B, token_mean, normalizer, dtype)
    if token_mean or count_B.shape[0] == 0:
        return torch.where(valid_N, inverse, 0), valid_N
    share_B = inverse / count_B.clamp(min=1)
    if mask is not None:
        return torch.where(mask, share_B[:, None], 0).reshape(-1), valid_N
    assert cu_seqlens is not None, f"{op}: rows need cu_seqlens or a mask"
    if count_B.shape[0] > 1:
        row_N = torch.searchsorted(cu_seqlens[1:], at_N, right=True)
        share_B = share_B[row_N.clamp(max=count_B.shape[0] - 1)]
    return torch.where(valid_N, share_B, 0), valid_N


def suffix_scan(add_N: torch.Tensor, decay_N: torch.Tensor, span: int) -> torch.Tensor:
    """y_t = add_t + decay_t * y_{t+1}, with y = 0 after the end, in log2(span) doublings.

    Args:
        add_N: What each position adds.
        decay_N: Its factor; 0 at the last position of a row, which separates the rows.
        span: The most positions of a row.

    Returns:
        y_N.
    """
    step = 1
    while step < span:
        add_N = torch.cat([add_N[:-step] + decay_N[:-step] * add_N[step:], add_N[-step:]])
        decay_N = torch.cat([decay_N[:-step] * decay_N[step:], decay_N[-step:]])
        step *= 2
    return add_N


def following(value_N: torch.Tensor, rows: Layout) -> torch.Tensor:
    """value_{t+1} inside a row, 0 after its last position."""
    shifted_N = torch.cat([value_N[1:], value_N[:1]])
    return torch.where(rows.edge_N, torch.zeros_like(value_N), shifted_N)
