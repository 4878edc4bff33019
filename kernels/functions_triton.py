"""Functions of a number in Triton that keep their digits near 0.

Each takes a series where the plain formula would subtract two numbers that are almost equal.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """The tanh of x from exp; from its series near 0, where 1 - 2 / (exp(2x) + 1) would lose every digit."""
    y = x * x
    series = -17.0 / 315 + y * (62.0 / 2835 + y * (-1382.0 / 155925 + y * (21844.0 / 6081075)))
    series = x + x * y * (-1.0 / 3 + y * (2.0 / 15 + y * series))
    return tl.where(y < 0.0625, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0; from the series of atanh below 1, where 1 + x would lose digits of x."""
    s = x / (2 + x)
    y = s * s
    series = 1 + y * (
        1.0 / 3 + y * (1.0 / 5 + y * (1.0 / 7 + y * (1.0 / 9 + y * (1.0 / 11 + y * (1.0 / 13 + y / 15)))))
    )
    return tl.where(x < 1, 2 * s * series, tl.log(1 + x))


@triton.jit
def one_minus_p(logp):
    """-expm1(logp) of logp <= 0; the series near 0, where 1 - exp would lose every digit."""
    x = logp
    series = -x * (
        1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
    )
    return tl.where(logp > -0.3, series, 1 - tl.exp(logp))
