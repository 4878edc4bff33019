"""The policy loss and its gradients in Triton, in one launch.

There is a program per row; the last one adds up the sums of all. `policy_terms`, the objective of one token,
is also what the kernels use that start from logits.
"""

import torch
import triton
import triton.language as tl

from ..counters import counter
from ..losses_triton import config, is_last, report
from ..rows_triton import count_valid, load_valid, row_arguments, segment_bounds, valid_mask, zero_tail
from .reference import STATISTICS

MEANS = tl.constexpr(len(STATISTICS) - 2)
LOG_RATIO_LIMIT = tl.constexpr(20.0)  # as in reference.py


@triton.jit
def clamped(x, low, high):
    """The number, bounded to low .. high; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def k3(x, exp_x):
    """The value of exp(x) - 1 - x, from its series near 0, where the subtraction would lose every digit."""
    series = x * x * 0.5 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
    return tl.where(tl.abs(x) < 0.25, series, exp_x - 1 - x)


@triton.jit
def policy_terms(
    logp,
    old_logp,
    advantage,
    ref_logp,
    entropy,
    clip_ratio,
    clip_high,
    dual_clip,
    kl_coeff,
    K1: tl.constexpr,
    entropy_coeff,
    HAS_REF: tl.constexpr,
):
    """reference.policy_terms in float32, in the order of reference.Terms: of each token, unweighted.

    Without a reference policy ref_logp is any number and kl is 0; without an entropy term entropy is 0.0.
    """
    difference = logp - old_logp
    log_ratio = clamped(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = tl.exp(log_ratio)
    plain, clipped = ratio * advantage, clamped(ratio, 1 - clip_ratio, 1 + clip_high) * advantage
    worse = plain > clipped  # false for NaN, which must stay visible
    # advantage < 0 and ratio > dual_clip; so written ptxas has registers enough on every architecture
    # (tests/kernels/test_compile.py).
    bounded = ratio > tl.where(advantage < 0, dual_clip, float("inf"))
    loss = -tl.where(bounded, tl.minimum(ratio, dual_clip) * advantage, tl.where(worse, clipped, plain))
    d_logp = tl.where(worse | bounded | (tl.abs(difference) > LOG_RATIO_LIMIT), 0.0, -plain)
    outside = (ratio < 1 - clip_ratio) | (ratio > 1 + clip_high)
    divergence = k3(log_ratio, ratio)
    kl = tl.zeros_like(loss)
    if HAS_REF:
        gap = ref_logp - logp
        if K1:
            kl = -gap
            d_logp += kl_coeff
        else:
            near = clamped(gap, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            kl = k3(near, tl.exp(near))
            # 1 - exp(near), from the difference that k3 has kept.
            d_logp += tl.where(tl.abs(gap) > LOG_RATIO_LIMIT, 0.0, -kl_coeff * (kl + near))
        loss += kl_coeff * kl
    return loss - entropy_coeff * entropy, d_logp, outside, divergence, ratio, kl, worse, bounded, log_ratio


@triton.jit(do_not_specialize=["positions", "rows", "token_mean"])
def loss_kernel(
    loss,
    gradient_N,
    entropy_gradient_N,
    inverse,
    statistics,
    sums_KP,
    counter,
    logp_N,
    old_logp_N,
    advantages_N,
    ref_logp_N,
    entropy_N,
    cu_seqlens,
    mask_N,
    normalizer,
    scale,
    shift,
    positions,
    rows,
    width,
    token_mean,
    clip_ratio,
    clip_high,
    dual_clip,
    kl_coeff,
    entropy_coeff,
    K1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its gradients and sums; the last program adds up the sums."""
    row, programs = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    begin, end = segment_bounds(cu_seqlens, row, rows, width)
    length = (end - begin).to(tl.int32)
    count = count_valid(mask_N, begin, tl.arange(0, BLOCK), None, length)[0].to(tl.float32)
    share = tl.where(token_mean != 0, 1.0, 1.0 / tl.maximum(count, 1.0))
    by, plus = 1.0, 0.0
    if scale is not None:
        by = tl.load(scale)
    if shift is not None:
        plus = tl.load(shift)
    zero_t = tl.zeros([BLOCK], tl.float32)
    loss_t, outside_t, divergence_t, ratio_t = zero_t, zero_t, zero_t, zero_t
    advantage_t, kl_t, entropy_t = zero_t, zero_t, zero_t
    clipped_t, bounded_t, log_ratio_t = zero_t, zero_t, zero_t
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        on = valid_mask(mask_N, begin, at, None, length)
        logp = load_valid(logp_N, begin, at, on)
        old_logp = load_valid(old_logp_N, begin, at, on)
        advantage = load_valid(advantages_N, begin, at, on)
        advantage = tl.where(on, advantage * by + plus, 0.0)
        ref_logp, entropy = 0.0, 0.0
        if ref_logp_N is not None:
            ref_logp = load_valid(ref_logp_N, begin, at, on)
        if entropy_N is not None:
            entropy = load_valid(entropy_N, begin, at, on)
            tl.store(
                entropy_gradient_N + begin + at, tl.where(on, -entropy_coeff * share, 0.0), mask=at < length
            )
            entropy_t += entropy
        token_loss, d_logp, outside, divergence, ratio, kl, clipped, bounded, log_ratio = policy_terms(
            logp,
            old_logp,
            advantage,
            ref_logp,
            entropy,
            clip_ratio,
            clip_high,
            dual_clip,
            kl_coeff,
            K1,
            entropy_coeff,
            ref_logp_N is not None,
        )
        tl.store(gradient_N + begin + at, tl.where(on, d_logp * share, 0.0), mask=at < length)
        loss_t += token_loss
        outside_t += outside.to(tl.float32)
        divergence_t += divergence
        ratio_t += tl.where(on, ratio, 0.0)
        advantage_t += advantage
        kl_t += kl
        clipped_t += clipped.to(tl.float32)
        bounded_t += bounded.to(tl.float32)
        log_ratio_t += log_ratio
    zero_tail(gradient_N, cu_seqlens, rows, positions, row, programs, BLOCK)
    if entropy_N is not None:
        zero_tail(entropy_gradient_N, cu_seqlens, rows, positions, row, programs, BLOCK)
    sums_K = sums_KP + row
    tl.store(sums_K, tl.sum(outside_t, 0))
    tl.store(sums_K + programs, tl.sum(divergence_t, 0))
    tl.store(sums_K + 2 * programs, tl.sum(ratio_t, 0))
    tl.store(sums_K + 3 * programs, tl.sum(advantage_t, 0))
    tl.store(sums_K + 4 * programs, tl.sum(kl_t, 0))
    tl.store(sums_K + 5 * programs, tl.sum(entropy_t, 0))
    tl.store(sums_K + 6 * programs, tl.sum(clipped_t, 0))
    tl.store(sums_K + 7 * programs, tl.sum(bounded_t, 0))
    tl.store(sums_K + 8 * programs, tl.sum(log_ratio_t, 0))
    tl.store(sums_K + 9 * programs, (count > 0).to(tl.float32))
    tl.store(sums_K + 10 * programs, count)
    tl.store(sums_K + 11 * programs, tl.sum(loss_t, 0) * share)
    if is_last(counter, programs):
        report(
            loss,
            inverse,
            statistics,
            sums_KP,
            programs * 0,
            rows,
            programs,
            normalizer,
            token_mean,
            MEANS,
            16,
            BLOCK // 4,
        )


def ppo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    ref_logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    clip_ratio: float,
    clip_high: float,
    dual_clip: float,
    kl_coeff: float,
    k1: bool,
    entropy_coeff: float,
    token_mean: bool,
    normalizer: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference; float32, bfloat16 or float16 in, float32 out."""
    inputs = [
        None if tensor is None else tensor.contiguous()
        for tensor in (logp, old_logp, advantages, ref_logp, entropy)
    ]
    cu_seqlens, mask, rows, width = row_arguments("ppo_loss", cu_seqlens, mask, logp.numel())
    programs = max(rows, 1)

    def new(*shape: int) -> torch.Tensor:
        return logp.new_empty(shape, dtype=torch.float32)

    loss, gradient, inverse, statistics = new(), new(*logp.shape), new(), new(len(STATISTICS))
    entropy_gradient = new(0) if entropy is None else new(*logp.shape)
    with torch.cuda.device(logp.get_device()):
        loss_kernel[(programs,)](
            loss,
            gradient,
            entropy_gradient,
            inverse,
            statistics,
            new(len(STATISTICS) + 1, programs),
            counter(logp.device),
            *inputs,
            cu_seqlens,
            mask,
            normalizer,
            scale,
            shift,
            logp.numel(),
            rows,
            width,
            int(token_mean),
            clip_ratio,
            clip_high,
            dual_clip,
            kl_coeff,
            entropy_coeff,
            K1=k1,
            **config(logp.numel(), programs),
        )
    return loss, gradient, entropy_gradient, inverse, statistics
