"""The clipped value loss of one or two critics in Triton, in one launch.

There is a program per critic and row; the last one adds up the sums of all.
"""

import torch
import triton
import triton.language as tl

from ..counters import counter
from ..losses_triton import config, is_last, report
from ..rows_triton import count_valid, load_valid, row_arguments, segment_bounds, valid_mask, zero_tail
from .reference import STATISTICS

MEANS = tl.constexpr(len(STATISTICS) - 2)


@triton.jit(do_not_specialize=["positions", "rows", "critics", "token_mean"])
def loss_kernel(
    loss_C,
    gradient_CN,
    inverse,
    statistics_CS,
    sums_KP,
    counter,
    values_CN,
    old_values_CN,
    returns_CN,
    cu_seqlens,
    mask_N,
    normalizer,
    positions,
    rows,
    width,
    critics,
    token_mean,
    clip_value,
    BLOCK: tl.constexpr,
):
    """One row of one critic: its gradient and sums; the last program adds up the sums."""
    program, programs = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    each = tl.maximum(rows, 1)  # programs of one critic
    critic, row = program // each, program % each
    begin, end = segment_bounds(cu_seqlens, row, rows, width)
    length = (end - begin).to(tl.int32)
    count = count_valid(mask_N, begin, tl.arange(0, BLOCK), None, length)[0].to(tl.float32)
    share = tl.where(token_mean != 0, 1.0, 1.0 / tl.maximum(count, 1.0))
    gradient_N = gradient_CN + critic.to(tl.int64) * positions
    from_here = critic.to(tl.int64) * positions + begin
    zero_t = tl.zeros([BLOCK], tl.float32)
    loss_t, outside_t, value_t, return_t, error_t, flat_t = zero_t, zero_t, zero_t, zero_t, zero_t, zero_t
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        on = valid_mask(mask_N, begin, at, None, length)
        value = load_valid(values_CN, from_here, at, on)
        old = load_valid(old_values_CN, from_here, at, on)
        goal = load_valid(returns_CN, from_here, at, on)
        difference = value - old
        far = tl.abs(difference) > clip_value
        bounded = tl.where(
            difference > clip_value, clip_value, tl.where(difference < -clip_value, -clip_value, difference)
        )
        plain, other = value - goal, old + bounded - goal
        plain_square, other_square = plain * plain, other * other
        # Two equal squares outside the range: autograd of maximum gives half to each, and the clipped one has
        # none.
        tie = tl.where(far & (other_square == plain_square), 0.5, 1.0)
        flat = far & (other_square > plain_square)
        slope = tl.where(flat, 0.0, plain * tie)
        tl.store(gradient_N + begin + at, tl.where(on, slope * share, 0.0), mask=at < length)
        # A NaN anywhere is in other_square, which wins what cannot be compared.
        loss_t += 0.5 * tl.where(plain_square >= other_square, plain_square, other_square)
        outside_t += far.to(tl.float32)
        value_t += value
        return_t += goal
        error_t += plain_square
        flat_t += flat.to(tl.float32)
    zero_tail(gradient_N, cu_seqlens, rows, positions, row, each, BLOCK)
    sums_K = sums_KP + program
    tl.store(sums_K, tl.sum(outside_t, 0))
    tl.store(sums_K + programs, tl.sum(value_t, 0))
    tl.store(sums_K + 2 * programs, tl.sum(return_t, 0))
    tl.store(sums_K + 3 * programs, tl.sum(error_t, 0))
    tl.store(sums_K + 4 * programs, tl.sum(flat_t, 0))
    tl.store(sums_K + 5 * programs, (count > 0).to(tl.float32))
    tl.store(sums_K + 6 * programs, count)
    tl.store(sums_K + 7 * programs, tl.sum(loss_t, 0) * share)
    if is_last(counter, programs):
        first = programs * 0
        for _ in range(critics):
            report(
                loss_C,
                inverse,
                statistics_CS,
                sums_KP,
                first,
                rows,
                programs,
                normalizer,
                token_mean,
                MEANS,
                8,
                BLOCK // 4,
            )
            loss_C += 1
            statistics_CS += MEANS + 2
            first += each


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    clip_value: float,
    token_mean: bool,
    normalizer: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference; float32, bfloat16 or float16 in, float32 out."""
    critics, positions = values.shape[0], values[0].numel()
    cu_seqlens, mask, rows, width = row_arguments("value_loss", cu_seqlens, mask, positions)
    programs = critics * max(rows, 1)
    inputs = [tensor.contiguous() for tensor in (values, old_values, returns)]

    def new(*shape: int) -> torch.Tensor:
        return values.new_empty(shape, dtype=torch.float32)

    loss_C, gradient, inverse, statistics = (
        new(critics),
        new(*values.shape),
        new(),
        new(critics, len(STATISTICS)),
    )
    with torch.cuda.device(values.get_device()):
        loss_kernel[(programs,)](
            loss_C,
            gradient,
            inverse,
            statistics,
            new(len(STATISTICS) + 1, programs),
            counter(values.device),
            *inputs,
            cu_seqlens,
            mask,
            normalizer,
            positions,
            rows,
            width,
            critics,
            int(token_mean),
            clip_value,
            **config(positions, max(rows, 1)),
        )
    return loss_C, gradient, inverse, statistics
