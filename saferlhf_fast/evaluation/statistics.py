"""Means and shares with 95 % intervals. Needs numpy alone.

A mean has Student's t interval, mean ± t(n−1)·s/√n with the unbiased s: it holds for the mean of n
independent samples that are not too skewed. A share has Wilson's interval, which stays inside [0, 1] and is
right at shares of 0 and 1. Both are about new prompts drawn like these; they say nothing about another
training seed.

Every interval is {"mean", "low", "high", "n"}; n counts the values used. NaN, inf and None are left out,
never counted as zero. What is undefined is None: all three without a value, low and high of a mean of one
value.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Z = 1.959963984540054  # 97.5 % point of the normal distribution

Values = Sequence[float | None] | npt.NDArray[Any]
"""Numbers, flags or Nones."""


def mean_interval(values: Values) -> dict[str, Any]:
    """Mean with its 95 % t interval: mean ± t(n−1)·s/√n.

    Args:
        values: Independent samples, in any unit; those that are not finite are left out.

    Returns:
        {"mean", "low", "high", "n"} in the same unit; low and high of one value, and all of none, are None.
    """
    x = finite(values)
    if x.size == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    mean = float(x.mean())
    if x.size == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = float(t_quantile(x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": int(x.size)}


def share_interval(flags: Values) -> dict[str, Any]:
    """Share of true flags with its 95 % Wilson interval.

    Args:
        flags: True or false, or 1 and 0; None and NaN are left out.

    Returns:
        {"mean", "low", "high", "n"}, shares in 0..1; all three are None without a flag.

    Raises:
        ValueError: If a value is neither true nor false.

    Source:
        Wilson (1927), Probable inference, the law of succession, and statistical inference.
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
    # At shares of 0 and 1 one end is exact; rounding must not move it.
    low = 0.0 if share == 0 else float(max(0.0, centre - half))
    high = 1.0 if share == 1 else float(min(1.0, centre + half))
    return {"mean": share, "low": low, "high": high, "n": n}


def summarise(
    rewards: Values | None = None,
    costs: Values | None = None,
    kls: Values | None = None,
    lengths: Values | None = None,
) -> dict[str, Any]:
    """The numbers of one evaluation with their intervals, those that were measured.

    Args:
        rewards: Reward of each response, in reward model units.
        costs: Cost of each response, in cost model units.
        kls: KL to the reference, summed over each response, in nats.
        lengths: Tokens of each response.

    Returns:
        {name: interval} with the names reward, cost, unsafe_share (cost > 0), kl, length. `left_out` counts,
        by name, the values that were not finite; it is there only when there are some.
    """
    out: dict[str, Any] = {}
    left_out: dict[str, int] = {}
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


def interval_text(interval: dict[str, Any], digits: int = 3) -> str:
    """An interval for people, as 0.412 (0.388 to 0.436); a dash without a mean.

    Args:
        interval: `mean`, `low` and `high`, each a number or None.
        digits: Digits behind the point.
    """
    if interval["mean"] is None:
        return "–"
    mean = f"{interval['mean']:.{digits}f}"
    if interval["low"] is None:
        return mean
    return f"{mean} ({interval['low']:.{digits}f} to {interval['high']:.{digits}f})"


def finite(values: Values) -> npt.NDArray[np.float64]:
    """The finite values as float64 [n]; None counts as not finite."""
    if not isinstance(values, np.ndarray):
        values = [np.nan if v is None else float(v) for v in values]
    x = np.asarray(values, dtype=np.float64).ravel()
    return x[np.isfinite(x)]


def t_quantile(degrees: int) -> float:
    """97.5 % point of Student's t with `degrees` ≥ 1 degrees of freedom, to about 1e-6 relative.

    With t = √ν·tan θ the density is ∝ cos^(ν−1) θ, which has no tail to cut off. Above 1000 degrees the
    expansion around the normal's point (Abramowitz & Stegun 26.7.5) is closer than the sum.
    """
    if degrees > 1000:
        return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)
    theta = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(theta) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(degrees) * np.tan(np.interp(0.95 * mass[-1], mass, theta)))
