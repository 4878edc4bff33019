"""The clipped policy loss in Triton. Here: the objective of one token, which the kernels that start from logits use too."""

import triton
import triton.language as tl

LOG_RATIO_LIMIT = tl.constexpr(20.0)  # as in reference.py


@triton.jit
def clamped(x, low, high):
    """x between low and high; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def k3(x, exp_x):
    """exp(x) - 1 - x, from its series near 0, where the subtraction would lose every digit."""
    series = x * x * 0.5 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
    return tl.where(tl.abs(x) < 0.25, series, exp_x - 1 - x)


@triton.jit
def policy_terms(logp, old_logp, advantage, ref_logp, entropy, clip_ratio, kl_coeff, K1: tl.constexpr, entropy_coeff,
                 HAS_REF: tl.constexpr):
    """reference.policy_terms in float32: (loss, d_logp, outside, divergence, ratio, kl) of each token, unweighted.

    Without a reference policy ref_logp is any number and kl is 0; without an entropy term entropy is 0.0.
    """
    difference = logp - old_logp
    log_ratio = clamped(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = tl.exp(log_ratio)
    plain, clipped = ratio * advantage, clamped(ratio, 1 - clip_ratio, 1 + clip_ratio) * advantage
    worse = plain > clipped     # false for NaN, which must stay visible
    loss = -tl.where(worse, clipped, plain)
    d_logp = tl.where(worse | (tl.abs(difference) > LOG_RATIO_LIMIT), 0.0, -plain)
    outside = (ratio < 1 - clip_ratio) | (ratio > 1 + clip_ratio)
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
    return loss - entropy_coeff * entropy, d_logp, outside, divergence, ratio, kl
