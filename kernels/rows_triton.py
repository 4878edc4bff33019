"""Rows of tokens in Triton, packed or padded: where a row lies, which of its positions are valid, what
follows the last row.

Either cu_seqlens or mask_N is None, and Triton compiles a kernel for each case. A kernel takes its row in
blocks: it reads and writes the positions base + at, where `base` is int64 and `at` int32 of any shape. The
row is base + lead .. base + stop - 1. `lead` is None where the row begins at `base`; a kernel whose blocks
must begin at multiples of 16 has its base before the row.
"""

import triton
import triton.language as tl

from .layout import check_offsets


@triton.jit
def segment_bounds(cu_seqlens, row, rows, width):
    """(begin, end) of a row's positions as int64; the row past the last one has none. width: T of padded
    rows.
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
    """Which positions `at` are of the row and not masked."""
    valid = at < stop if lead is None else (at >= lead) & (at < stop)
    if mask_N is not None:
        valid = tl.load(mask_N + base + at, mask=valid, other=0).to(tl.int1)
    return valid


@triton.jit
def count_valid(mask_N, base, at, lead, stop):
    """(number of valid positions, the last one or -1) of a row, int32. at: the positions of its first block."""
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
    """float32 of at's shape, 0 where not valid; nothing is read there."""
    return tl.load(x_N + base + at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def zero_tail(out_N, cu_seqlens, rows, positions, program, programs, BLOCK: tl.constexpr):
    """Zeros past the last offset, `program` doing its share of `programs`."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + rows).to(tl.int64) + program.to(tl.int64) * BLOCK
        for start in range(first, positions, programs.to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(out_N + at, tl.zeros([BLOCK], tl.float32), mask=at < positions)


def row_arguments(op, cu_seqlens, mask, tokens):
    """(cu_seqlens, mask, rows, T of padded rows or 0) as the kernels take them: contiguous, one of the
    tensors None; offsets on the CPU (the interpreter's tensors) are looked at.
    """
    if cu_seqlens is None:
        return None, mask.contiguous(), *mask.shape
    check_offsets(op, cu_seqlens, tokens)
    return cu_seqlens.contiguous(), None, cu_seqlens.shape[0] - 1, 0
