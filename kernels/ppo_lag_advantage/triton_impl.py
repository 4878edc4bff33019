"""KL shaping, both scans, their combination and the statistics in Triton, in one launch.

The kernel reads λ (the multiplier) from device memory. Each token is read once (the mask twice: its row must
be known to the end before the first block). A program takes every PROGRAMS-th row; the scan is that of
kernels/gae/triton_impl.py, which also explains the shape suffixes. Its sums stay in registers, one per
thread, until its last row is done; then it writes its share of the statistics, and the last program of all
adds the shares up in order. S: the 12 statistics. P: programs.
"""

import torch
import triton
import triton.language as tl

from ..counters import counter
from ..gae.triton_impl import join4, places, scan_config, stream, vector_bounds, write
from ..rows_triton import count_valid, load_valid, row_arguments, valid_mask, zero_tail
from .reference import STATISTICS

# Programs of a launch at most, the same on every device, so that the order of the sums is too. It bounds what
# the last program has to add up alone.
PROGRAMS = tl.constexpr(1024)
# Registers of a thread at most. Without this bound ptxas takes fewer, to fit one more block on a
# multiprocessor, and spills for it.
REGISTERS = 128


@triton.jit
def bounded(x, limit):
    """The number, bounded to -limit .. limit; NaN stays NaN."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def put_four(shares_SP, at, x0_G, x1_G, x2_G, x3_G):
    """Writes this program's share of the statistics at .. at + 3."""
    places_S = (at + tl.arange(0, 4)) * PROGRAMS + tl.program_id(0)
    tl.store(shares_SP + places_S, tl.sum(join4(x0_G, x1_G, x2_G, x3_G), 0))


@triton.jit
def add_up(statistics_S, shares_SP, programs, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr):
    """Writes the statistics from all programs' shares.

    Those from the fifth on are divided by the number of sequences, which is the fourth.
    """
    at_S, at_P = tl.arange(0, 16), tl.arange(0, BLOCK_P)
    total_SP = tl.zeros([16, BLOCK_P], tl.float32)
    for start in range(0, programs, BLOCK_P):
        inside_SP = (at_S < 12)[:, None] & (start + at_P < programs)[None, :]
        # Past the first-level cache, which knows nothing of what other programs wrote.
        total_SP += tl.load(
            shares_SP + at_S[:, None] * STRIDE + (start + at_P)[None, :],
            mask=inside_SP,
            other=0.0,
            cache_modifier=".cg",
        )
    total_S = tl.sum(total_SP, 1)
    sequences = tl.maximum(tl.sum(tl.where(at_S == 3, total_S, 0.0), 0), 1.0)
    tl.store(statistics_S + at_S, tl.where(at_S < 4, total_S, total_S / sequences), mask=at_S < 12)


@triton.jit
def advantage_kernel(
    advantages_N,
    reward_returns_N,
    cost_returns_N,
    statistics_S,
    shares_SP,
    done,
    logp_N,
    ref_logp_N,
    reward_B,
    cost_B,
    reward_values_N,
    cost_values_N,
    multiplier,
    cu_seqlens,
    mask_N,
    rows,
    width,
    tokens,
    kl_coeff,
    clip_score,
    decay,
    share,
    CARRY: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Every PROGRAMS-th row; the last program adds up the statistics.

    cost_returns_N, cost_B, cost_values_N and multiplier are None without cost; one of cu_seqlens and mask_N
    is None.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    first_G1, at_GK = places(GROUPS)
    count, sequences = 0, 0
    if cost_B is not None:
        of_reward = 1 / (1 + tl.load(multiplier).to(tl.float32))
        of_cost = tl.load(multiplier).to(tl.float32) * of_reward
    none_G = tl.zeros([GROUPS], tl.float32)
    sum_G, square_G, mean_kl_G, kl_G, shaped_r_G, shaped_c_G = none_G, none_G, none_G, none_G, none_G, none_G
    advantage_r_G, advantage_c_G, return_r_G, return_c_G = none_G, none_G, none_G, none_G
    for row in range(program, rows, programs):
        base, lead, stop = vector_bounds(cu_seqlens, row, rows, width)
        tokens_here, last = count_valid(mask_N, base, at_GK, lead, stop)
        count += tokens_here
        sequences += (tokens_here > 0).to(tl.int32)
        weight = 1.0 / tl.maximum(tokens_here, 1).to(tl.float32)
        state_r = 0.0
        state_c = 0.0
        blocks = tl.cdiv(stop, 4 * GROUPS)
        for block in range(blocks):
            start = (blocks - 1 - block) * (4 * GROUPS)
            here_GK = start + at_GK
            valid_GK = valid_mask(mask_N, base, here_GK, lead, stop)
            kl_GK = load_valid(logp_N, base, here_GK, valid_GK) - load_valid(
                ref_logp_N, base, here_GK, valid_GK
            )
            final_GK = valid_GK & (here_GK == last)
            score = tl.load(reward_B + row).to(tl.float32)
            r_GK = bounded(tl.where(final_GK, score, 0.0) - kl_coeff * kl_GK, clip_score)
            return_GK, advantage_GK, state_r = stream(
                r_GK, reward_values_N, base, here_GK, valid_GK, decay, share, CARRY, state_r
            )
            write(reward_returns_N, base, start + first_G1, here_GK, return_GK, lead, stop)
            mean_kl_G += weight * tl.sum(kl_GK, 1)
            kl_G += tl.sum(kl_GK, 1)
            shaped_r_G += tl.sum(r_GK, 1)
            advantage_r_G += weight * tl.sum(advantage_GK, 1)
            return_r_G += weight * tl.sum(return_GK, 1)
            if cost_B is not None:
                score = tl.load(cost_B + row).to(tl.float32)
                c_GK = bounded(tl.where(final_GK, score, 0.0) + kl_coeff * kl_GK, clip_score)
                return_GK, advantage_c_GK, state_c = stream(
                    c_GK, cost_values_N, base, here_GK, valid_GK, decay, share, CARRY, state_c
                )
                write(cost_returns_N, base, start + first_G1, here_GK, return_GK, lead, stop)
                shaped_c_G += tl.sum(c_GK, 1)
                advantage_c_G += weight * tl.sum(advantage_c_GK, 1)
                return_c_G += weight * tl.sum(return_GK, 1)
                advantage_GK = of_reward * advantage_GK - of_cost * advantage_c_GK
            write(advantages_N, base, start + first_G1, here_GK, advantage_GK, lead, stop)
            sum_G += tl.sum(advantage_GK, 1)
            square_G += tl.sum(advantage_GK * advantage_GK, 1)
    one_G = (tl.arange(0, GROUPS) == 0).to(tl.float32)
    put_four(shares_SP, 0, count * one_G, sum_G, square_G, sequences * one_G)
    put_four(shares_SP, 4, mean_kl_G, kl_G, shaped_r_G, shaped_c_G)
    put_four(shares_SP, 8, advantage_r_G, advantage_c_G, return_r_G, return_c_G)
    tl.debug_barrier()  # every thread's share is written before one of them says so
    if tl.atomic_add(done, 1, sem="acq_rel") == programs - 1:
        add_up(statistics_S, shares_SP, programs, PROGRAMS, GROUPS)
        tl.store(done, 0)
    zero_tail(advantages_N, cu_seqlens, rows, tokens, program, programs, 4 * GROUPS)
    zero_tail(reward_returns_N, cu_seqlens, rows, tokens, program, programs, 4 * GROUPS)
    if cost_B is not None:
        zero_tail(cost_returns_N, cu_seqlens, rows, tokens, program, programs, 4 * GROUPS)


def ppo_lag_advantage(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    reward: torch.Tensor,
    cost: torch.Tensor | None,
    reward_values: torch.Tensor,
    cost_values: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    kl_coeff: float,
    gamma: float,
    lam: float,
    clip_score: float,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference; float32, bfloat16 or float16 in, float32 out."""
    tokens, device = logp.numel(), logp.device
    cu_seqlens, mask, rows, width = row_arguments("ppo_lag_advantage", cu_seqlens, mask, tokens)
    programs = min(max(rows, 1), PROGRAMS.value)
    flat_logp = logp.contiguous()
    inputs = [
        None if tensor is None else tensor.contiguous()
        for tensor in (flat_logp, ref_logp, reward, cost, reward_values, cost_values, multiplier)
    ]
    advantages, reward_returns = (torch.empty_like(flat_logp, dtype=torch.float32) for _ in range(2))
    cost_returns = None if cost is None else torch.empty_like(flat_logp, dtype=torch.float32)
    statistics_S = torch.empty(len(STATISTICS), dtype=torch.float32, device=device)
    shares_SP = torch.empty(len(STATISTICS) * PROGRAMS.value, dtype=torch.float32, device=device)
    with torch.cuda.device(logp.get_device()):
        advantage_kernel[(programs,)](
            advantages,
            reward_returns,
            cost_returns,
            statistics_S,
            shares_SP,
            counter(device),
            *inputs,
            cu_seqlens,
            mask,
            rows,
            width,
            tokens,
            kl_coeff,
            clip_score,
            gamma * lam,
            gamma - gamma * lam,
            CARRY=carry and mask is not None,
            maxnreg=REGISTERS,
            **scan_config(tokens, rows),
        )
    if cost_returns is None:
        cost_returns = torch.empty(0, dtype=torch.float32, device=device)
    return advantages, reward_returns, cost_returns, statistics_S
