"""Generalised advantage estimation in Triton, in one launch.

Also what the scan of ppo_lag_advantage is made of.

What token t + 1 hands to token t is x[t] = gamma * V[t+1] + gamma * lam * A[t+1], so that A[t] = rewards[t] +
x[t] - V[t]. It obeys one recurrence in both mask modes, with no look at a neighbour:

    x[t-1] = decay * x[t] + decay * rewards[t] + share * V[t]     decay = gamma * lam
    x[t-1] = decay * x[t]    at a masked token of mode "zero"     share = gamma * (1 - lam)
    x[t-1] = x[t]            at a masked token of mode "carry"

One program per row takes the row in blocks from right to left. A thread has PER neighbouring positions of a
block, which it goes through one after another; the groups of all threads are joined by an associative scan.
The groups are in the scan's order (the last comes first), because a scan that runs in reverse turns its
operands round with shuffles of its own.

Shape suffixes: G groups of a block, K = PER positions of a group. Blocks start at multiples of 16 positions,
wherever the row starts, so that stores are vectors; rows that share a group store its positions one by one.
"""

import torch
import triton
import triton.language as tl

from ..rows_triton import load_valid, row_arguments, segment_bounds, valid_mask, zero_tail

# Positions of a block: warps. The first block that a row of mean length fits into is taken, or the largest.
CONFIGS = {128: 1, 512: 4, 1024: 8}
PER = 4  # positions of a thread, as `split4` takes them: 16 bytes of float32


@triton.jit
def split4(x_GK):
    """The four columns of [G, 4]."""
    even, odd = tl.split(tl.reshape(x_GK, (x_GK.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join4(x0, x1, x2, x3):
    """[G, 4] from its four columns."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (x0.shape[0], 4))


@triton.jit
def compose(a1, b1, e1, f1, a2, b2, e2, f2):
    """Joins two runs of groups, 2 left of 1, into one.

    An x that comes in from the right leaves a run as a*x + b, and reaches its leftmost group as e*x + f.
    """
    return a2 * a1, a2 * b1 + b2, e2 * a1, e2 * b1 + f2


@triton.jit
def scan_block(give_GK, decay_GK, state):
    """(the x [G, K] that reaches each position, the state that leaves the block).

    A position turns x into decay * x + give; `state` comes in from the right.
    """
    g0, g1, g2, g3 = split4(give_GK)
    d0, d1, d2, d3 = split4(decay_GK)
    a = d0 * d1 * d2 * d3
    b = g0 + d0 * (g1 + d1 * (g2 + d2 * g3))
    _, _, e, f = tl.associative_scan((a, b, tl.full(a.shape, 1.0, tl.float32), tl.zeros_like(b)), 0, compose)
    x3 = e * state + f
    x2 = d3 * x3 + g3
    x1 = d2 * x2 + g2
    x0 = d1 * x1 + g1
    last_G = tl.arange(0, a.shape[0]) == a.shape[0] - 1
    return join4(x0, x1, x2, x3), tl.sum(tl.where(last_G, d0 * x0 + g0, 0.0), 0)


@triton.jit
def places(GROUPS: tl.constexpr):
    """(first position [G, 1] of each group, positions [G, K]) within a block, the rightmost group first."""
    first_G = (GROUPS - 1 - tl.arange(0, GROUPS)) * 4
    return first_G[:, None], first_G[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def vector_bounds(cu_seqlens, row, rows, width):
    """(base, lead, stop) of a row: it is base + lead .. base + stop - 1, base a multiple of 16."""
    begin, end = segment_bounds(cu_seqlens, row, rows, width)
    base = tl.multiple_of(begin // 16 * 16, 16)
    return base, (begin - base).to(tl.int32), (end - base).to(tl.int32)


@triton.jit
def stream(reward_GK, values_N, base, at_GK, valid_GK, decay, share, CARRY: tl.constexpr, state):
    """(return_GK, advantage_GK, the state that leaves the block), 0 where not valid.

    reward_GK is 0 there too.
    """
    value_GK = load_valid(values_N, base, at_GK, valid_GK)
    decay_GK = tl.where(valid_GK, decay, 1.0 if CARRY else decay)
    x_GK, state = scan_block(decay * reward_GK + share * value_GK, decay_GK, state)
    return_GK = tl.where(valid_GK, reward_GK + x_GK, 0.0)
    return return_GK, return_GK - value_GK, state


@triton.jit
def write(out_N, base, first_G1, at_GK, value_GK, lead, stop):
    """Stores at the row's own positions, masked or not: complete groups as vectors, the others one by one."""
    complete_G1 = (first_G1 >= lead) & (first_G1 + 4 <= stop)
    tl.store(out_N + base + at_GK, value_GK, mask=complete_G1)
    tl.store(out_N + base + at_GK, value_GK, mask=(at_GK >= lead) & (at_GK < stop) & (complete_G1 == 0))


@triton.jit
def gae_kernel(
    advantages_N,
    returns_N,
    rewards_N,
    values_N,
    cu_seqlens,
    mask_N,
    rows,
    width,
    tokens,
    decay,
    share,
    CARRY: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The rows of this program; `width` is T of padded rows.

    There are as many programs as rows, but at least one, for the positions after the last row.
    """
    first_G1, at_GK = places(GROUPS)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        base, lead, stop = vector_bounds(cu_seqlens, row, rows, width)
        state = 0.0
        blocks = tl.cdiv(stop, 4 * GROUPS)
        for block in range(blocks):
            start = (blocks - 1 - block) * (4 * GROUPS)
            valid_GK = valid_mask(mask_N, base, start + at_GK, lead, stop)
            reward_GK = load_valid(rewards_N, base, start + at_GK, valid_GK)
            return_GK, advantage_GK, state = stream(
                reward_GK, values_N, base, start + at_GK, valid_GK, decay, share, CARRY, state
            )
            write(returns_N, base, start + first_G1, start + at_GK, return_GK, lead, stop)
            write(advantages_N, base, start + first_G1, start + at_GK, advantage_GK, lead, stop)
    zero_tail(advantages_N, cu_seqlens, rows, tokens, tl.program_id(0), tl.num_programs(0), 4 * GROUPS)
    zero_tail(returns_N, cu_seqlens, rows, tokens, tl.program_id(0), tl.num_programs(0), 4 * GROUPS)


def scan_config(tokens: int, rows: int) -> dict[str, int]:
    """Options of a launch for rows of tokens / rows positions on average: GROUPS and num_warps.

    The host knows no more than the average of packed rows.
    """
    mean = tokens / max(rows, 1)
    block = next((size for size in CONFIGS if size >= mean), max(CONFIGS))
    return dict(GROUPS=block // PER, num_warps=CONFIGS[block])


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    gamma: float,
    lam: float,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference; float32, bfloat16 or float16 in, float32 out."""
    tokens = rewards.numel()
    rewards, values = rewards.contiguous(), values.contiguous()
    cu_seqlens, mask, rows, width = row_arguments("gae", cu_seqlens, mask, tokens)
    advantages, returns = (torch.empty_like(rewards, dtype=torch.float32) for _ in range(2))
    if tokens == 0:
        return advantages, returns
    with torch.cuda.device(rewards.get_device()):
        gae_kernel[(max(rows, 1),)](
            advantages,
            returns,
            rewards,
            values,
            cu_seqlens,
            mask,
            rows,
            width,
            tokens,
            gamma * lam,
            gamma - gamma * lam,
            CARRY=carry and mask is not None,
            **scan_config(tokens, rows),
        )
    return advantages, returns
