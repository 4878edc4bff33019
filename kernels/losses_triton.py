"""What the two losses share in Triton: where a program's row lies, what a token of it counts, the sums over all rows.

One launch: a program per row leaves the sums over its tokens in sums_KP (K kinds, P programs), and the one that finishes last
adds them up in row order, in float64. K kinds: M means, then whether the row has a token, its tokens, and the row's share of
the loss. None stands for what is not given; Triton compiles a kernel for each case.
"""

import triton
import triton.language as tl

# Tokens a program reads at once, for rows that are short on average and for others. Two per thread: with four, and for
# programs of two warps, ptxas spills.
CONFIGS = (dict(BLOCK=256, num_warps=4), dict(BLOCK=512, num_warps=8))


def config(tokens, rows):
    """The config for rows of tokens / rows positions on average."""
    return CONFIGS[tokens > 256 * rows]


@triton.jit
def span(row, rows, positions, cu_seqlens, width):
    """(begin as int64, length) of a row's positions, of which there are `positions` in all; nothing past the last row."""
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + row)
        length = tl.load(cu_seqlens + tl.minimum(row + 1, rows)) - begin
        begin = begin.to(tl.int64)
    else:
        begin = row.to(tl.int64) * width
        length = tl.minimum(width, positions - begin).to(tl.int32)
    return begin, length


@triton.jit
def token_mask(mask_N, begin, at, length):
    """Which positions at[...] of a row are tokens."""
    on = at < length
    if mask_N is not None:
        on = on & (tl.load(mask_N + begin + at, mask=on, other=0) != 0)
    return on


@triton.jit
def count_tokens(mask_N, begin, length, BLOCK: tl.constexpr):
    """The tokens of a row, as float32."""
    count = length.to(tl.float32)
    if mask_N is not None:
        count_t = tl.zeros([BLOCK], tl.float32)
        for start in range(0, length, BLOCK):
            count_t += token_mask(mask_N, begin, start + tl.arange(0, BLOCK), length).to(tl.float32)
        count = tl.sum(count_t, 0)
    return count


@triton.jit
def zero_tail(gradient_N, program, programs, rows, positions, cu_seqlens, BLOCK: tl.constexpr):
    """Zeros past cu_seqlens[-1], by all programs (int64)."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + rows).to(tl.int64) + program.to(tl.int64) * BLOCK
        for start in range(first, positions, programs * BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(gradient_N + at, tl.zeros([BLOCK], tl.float32), mask=at < positions)


@triton.jit
def is_last(counter, programs):
    """Counts this program in; true for the one that comes last, which also sets the counter back."""
    tl.debug_barrier()  # the sums of all threads are written before one thread counts
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def report(loss, inverse, statistics, sums_KP, first, rows, programs, normalizer, token_mean, M: tl.constexpr,
           K: tl.constexpr, BLOCK_B: tl.constexpr):
    """Loss, 1/Z and statistics [M + 2] from the sums of the programs first .. first + rows. first, programs: int64.
    K: a power of two > M + 2."""
    k = tl.arange(0, K)
    sum_KB = tl.zeros([K, BLOCK_B], tl.float64)
    for start in tl.range(0, rows, BLOCK_B, loop_unroll_factor=2):
        row = start + tl.arange(0, BLOCK_B)
        # Not from this multiprocessor's own cache: others wrote them.
        sum_KB += tl.load(sums_KP + k[:, None] * programs + (first + row)[None, :],
                          mask=(k < M + 3)[:, None] & (row < rows)[None, :], other=0.0, cache_modifier=".cg").to(tl.float64)
    sum_K = tl.sum(sum_KB, 1).to(tl.float32)
    sequences = tl.sum(tl.where(k == M, sum_K, 0.0), 0)
    tokens = tl.sum(tl.where(k == M + 1, sum_K, 0.0), 0)
    divisor = tl.where(token_mean != 0, tokens, sequences)
    if normalizer is not None:
        divisor = tl.load(normalizer)
    # 0: no token anywhere. A negative or NaN normalizer must show.
    factor = tl.where(divisor > 0, 1 / tl.where(divisor > 0, divisor, 1.0), tl.where(divisor == 0, 0.0, float("nan")))
    tl.store(inverse, factor)
    tl.store(loss, tl.sum(tl.where(k == M + 2, sum_K, 0.0), 0) * factor)
    tl.store(statistics + k, tl.where(k < M, sum_K / tl.maximum(tokens, 1.0), sum_K), mask=k < M + 2)
