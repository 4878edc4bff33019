"""What the two losses share in Triton: the sums over all rows, and the sizes of a launch.

One launch: a program per row leaves the sums over its tokens in sums_KP (K kinds, P programs), and the one
that finishes last adds them up in row order, in float64. K kinds: M means, then whether the row has a token,
its tokens, and the row's share of the loss. An argument that is not given is None; Triton compiles a kernel
for each case.
"""

import triton
import triton.language as tl

# Tokens a program reads at once, for rows that are short on average and for others. Two per thread: with
# four, and for programs of two warps, ptxas spills.
CONFIGS = (dict(BLOCK=256, num_warps=4), dict(BLOCK=512, num_warps=8))


def config(tokens: int, rows: int) -> dict[str, int]:
    """Options of a launch for rows of tokens / rows positions on average: BLOCK and num_warps."""
    return CONFIGS[tokens > 256 * rows]


@triton.jit
def is_last(counter, programs):
    """Counts this program in; true for the one that comes last, which also sets the counter back."""
    tl.debug_barrier()  # the sums of all threads are written before one thread counts
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def report(
    loss,
    inverse,
    statistics,
    sums_KP,
    first,
    rows,
    programs,
    normalizer,
    token_mean,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Writes loss, 1/Z and statistics [M + 2] from the sums of the programs first .. first + rows - 1.

    first, programs: int64. K: a power of two > M + 2.
    """
    k = tl.arange(0, K)
    sum_KB = tl.zeros([K, BLOCK_B], tl.float64)
    for start in tl.range(0, rows, BLOCK_B, loop_unroll_factor=2):
        row = start + tl.arange(0, BLOCK_B)
        # Not from this multiprocessor's own cache: others wrote them.
        sum_KB += tl.load(
            sums_KP + k[:, None] * programs + (first + row)[None, :],
            mask=(k < M + 3)[:, None] & (row < rows)[None, :],
            other=0.0,
            cache_modifier=".cg",
        ).to(tl.float64)
    sum_K = tl.sum(sum_KB, 1).to(tl.float32)
    sequences = tl.sum(tl.where(k == M, sum_K, 0.0), 0)
    tokens = tl.sum(tl.where(k == M + 1, sum_K, 0.0), 0)
    divisor = tl.where(token_mean != 0, tokens, sequences)
    if normalizer is not None:
        divisor = tl.load(normalizer)
    # 0: no token anywhere. A negative or NaN normalizer must show.
    factor = tl.where(
        divisor > 0, 1 / tl.where(divisor > 0, divisor, 1.0), tl.where(divisor == 0, 0.0, float("nan"))
    )
    tl.store(inverse, factor)
    tl.store(loss, tl.sum(tl.where(k == M + 2, sum_K, 0.0), 0) * factor)
    tl.store(statistics + k, tl.where(k < M, sum_K / tl.maximum(tokens, 1.0), sum_K), mask=k < M + 2)
