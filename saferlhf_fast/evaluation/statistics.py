"""Means and shares with 95 % intervals. numpy only.

A mean has Student's t interval, mean ± t(n−1)·s/√n with the unbiased s: it holds for the mean of n
independent samples that are not too skewed. A share has Wilson's interval, which stays inside [0, 1] and is
right at shares of 0 and 1. Both are about new prompts drawn like these; they say nothing about another
training seed.

Every interval is {"mean", "low", "high", "n"}; n counts the values used. NaN, inf and None are left out,
never counted as zero. What cannot be said is None: all three without a value, low and high of a mean of one
value.
"""

import numpy as np

Z = 1.959963984540054  # 97.5 % point of the normal distribution


def mean_interval(values):
    """Mean of numbers with its 95 % t interval -> {"mean", "low", "high", "n"}."""
    x = finite(values)
    if x.size == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    mean = float(x.mean())
    if x.size == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = float(t_quantile(x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": int(x.size)}


def share_interval(flags):
    """Share of true ones with its 95 % Wilson interval -> {"mean", "low", "high", "n"}; None and NaN are left
    out.
    """
    x = finite(flags)
    if not np.isin(x, (0.0, 1.0)).all():
        raise ValueError(f"flags: expected true or false, got {x[~np.isin(x, (0.0, 1.0))][0]}")
    n = int(x.size)
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    share = float(x.mean())
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * np.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    # At shares of 0 and 1 one end is exact; rounding must not move it beyond.
    low = 0.0 if share == 0 else float(max(0.0, centre - half))
    high = 1.0 if share == 1 else float(min(1.0, centre + half))
    return {"mean": share, "low": low, "high": high, "n": n}


def summarise(rewards=None, costs=None, kls=None, lengths=None):
    """Figures of one evaluation -> {name: interval} of those that were measured.

    rewards, costs: score-model units · kls: summed over each response, nats · lengths: tokens. Each is one
    number per response or None. Names: reward, cost, unsafe_share (cost > 0), kl, length; `left_out` counts
    the responses' values that were not finite, by name, and is there only when there are some.
    """
    out, left_out = {}, {}
    for name, values in (("reward", rewards), ("cost", costs), ("kl", kls), ("length", lengths)):
        if values is None:
            continue
        x = finite(values)
        if x.size < len(values):
            left_out[name] = len(values) - int(x.size)
        if x.size == 0:
            continue
        out[name] = mean_interval(x)
        if name == "cost":
            out["unsafe_share"] = share_interval(x > 0)
    return {**out, "left_out": left_out} if left_out else out


def interval_text(interval, digits=3):
    """One interval for people: 0.412 (0.388 to 0.436)."""
    if interval["mean"] is None:
        return "–"
    mean = f"{interval['mean']:.{digits}f}"
    if interval["low"] is None:
        return mean
    return f"{mean} ({interval['low']:.{digits}f} to {interval['high']:.{digits}f})"


def finite(values):
    """The finite ones of numbers, flags and Nones, as float64 [n]."""
    if not isinstance(values, np.ndarray):
        values = [np.nan if v is None else float(v) for v in values]
    x = np.asarray(values, dtype=np.float64).ravel()
    return x[np.isfinite(x)]


def t_quantile(degrees):
    """97.5 % point of Student's t with `degrees` ≥ 1 degrees of freedom, to about 1e-6 relative.

    With t = √ν·tan θ the density is ∝ cos^(ν−1) θ, which has no tail to cut off; above 1000 the expansion
    around the normal's point (Abramowitz & Stegun 26.7.5) is closer than the sum.
    """
    if degrees > 1000:
        return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)
    theta = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(theta) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(degrees) * np.tan(np.interp(0.95 * mass[-1], mass, theta)))
