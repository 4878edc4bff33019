"""Rows of tokens in Triton, packed or padded.

Where a row is, which of its positions are valid, and the positions after the last row. Either cu_seqlens or
mask_N is None, and Triton compiles a kernel for each case. A kernel takes its row in blocks: it reads and
writes the positions base + at, where `base` is int64 and `at` int32 of any shape. The row is base + lead ..
base + stop - 1. `lead` is None where the row begins at `base`; a kernel whose blocks must begin at multiples
of 16 has its base before the row.
"""

import torch
import triton
import triton.language as tl

from .layout import check_offsets


@triton.jit
def segment_bounds(cu_seqlens, row, rows, width):
    """(begin, end) of a row's positions as int64; the row past the last one is empty.

    width: T of padded rows.
    """
    if cu_seqlens is None:
        begin = tl.cast(row, tl.int64) * width
        end = begin + tl.where(row < rows, width, 0)
    else:
        begin = tl.load(cu_seqlens + row).to(tl.int64)
        end = tl.load(cu_seqlens + tl.minimum(row + 1, rows)).to(tl.int64)
    return begin, end


@triton.jit
def valid_mask(mask_N, base, at, lead, stop):
    """Which of the positions `at` belong to the row and are not masked."""
    valid = at < stop if lead is None else (at >= lead) & (at < stop)
    if mask_N is not None:
        valid = tl.load(mask_N + base + at, mask=valid, other=0).to(tl.int1)
    return valid


@triton.jit
def count_valid(mask_N, base, at, lead, stop):
    """(number of valid positions, the last one or -1) of a row, int32.

    at: the positions of its first block.
    """
    if mask_N is None:
        return stop if lead is None else stop - lead, stop - 1
    count, last = tl.zeros(at.shape, tl.int32), tl.full(at.shape, -1, tl.int32)
    for start in range(0, stop, at.numel):
        valid = valid_mask(mask_N, base, start + at, lead, stop)
        count += valid.to(tl.int32)
        last = tl.maximum(last, tl.where(valid, start + at, -1))
    return tl.sum(count), tl.max(last)


@triton.jit
def load_valid(x_N, base, at, valid):
    """float32 of the shape of `at`, 0 where not valid; nothing is read there."""
    return tl.load(x_N + base + at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def zero_tail(out_N, cu_seqlens, rows, positions, program, programs, BLOCK: tl.constexpr):
    """Writes zeros past the last offset; each of `programs` programs writes its share."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + rows).to(tl.int64) + program.to(tl.int64) * BLOCK
        for start in range(first, positions, programs.to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(out_N + at, tl.zeros([BLOCK], tl.float32), mask=at < positions)


def row_arguments(
    op: str, cu_seqlens: torch.Tensor | None, mask: torch.Tensor | None, tokens: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    """Rows as the kernels take them; offsets on the CPU (the interpreter's tensors) are checked.

    Args:
        op: Name of the op, for messages.
        cu_seqlens: int32 [B+1], or None with a mask.
        mask: bool [B, T], or None with cu_seqlens.
        tokens: N, or B*T.

    Returns:
        (cu_seqlens, mask, B, T of padded rows or 0): contiguous, one of the tensors None.
    """
    if cu_seqlens is None:
        assert mask is not None, f"{op}: rows need cu_seqlens or a mask"
        return None, mask.contiguous(), mask.shape[0], mask.shape[1]
    check_offsets(op, cu_seqlens, tokens)
    return cu_seqlens.contiguous(), None, cu_seqlens.shape[0] - 1, 0
