"""Intervals against published and simulated figures."""

import json
import math

import numpy as np
import pytest

from saferlhf_fast.evaluation.statistics import (
    finite,
    interval_text,
    mean_interval,
    share_interval,
    summarise,
    t_quantile,
)


@pytest.mark.parametrize(
    "degrees, expected",
    [
        (1, 12.706205),
        (2, 4.302653),
        (5, 2.570582),
        (10, 2.228139),
        (30, 2.042272),
        (120, 1.979930),
        (1000, 1.962339),
        (1001, 1.962337),
        (10**6, 1.959966),
    ],
)
def test_t_quantile_is_that_of_the_tables(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=2e-6)


def test_mean_interval_by_hand():
    # s = √(5/3), t(3) = 3.182446: half = 3.182446 · 1.290994 / 2
    found = mean_interval([1, 2, 3, 4])
    assert found == {
        "mean": 2.5,
        "low": pytest.approx(2.5 - 2.0542603, abs=1e-6),
        "high": pytest.approx(2.5 + 2.0542603, abs=1e-6),
        "n": 4,
    }


def test_mean_interval_covers_95_percent():
    rng = np.random.default_rng(0)
    hits = [r["low"] <= 3.0 <= r["high"] for r in (mean_interval(rng.normal(3, 2, 8)) for _ in range(600))]
    assert 0.92 < np.mean(hits) < 0.98


@pytest.mark.parametrize(
    "k, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval_is_the_published_one(k, n, low, high):
    # R. G. Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3; the last is the third
    # mirrored.
    found = share_interval([True] * k + [False] * (n - k))
    assert found["mean"] == k / n and found["n"] == n
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_share_refuses_what_is_no_flag():
    with pytest.raises(ValueError, match="expected true or false, got 2.0"):
        share_interval([0, 1, 2])


def test_nothing_and_one_value():
    nothing = {"mean": None, "low": None, "high": None, "n": 0}
    assert mean_interval([]) == nothing and share_interval([None, math.nan]) == nothing
    assert mean_interval([7, math.nan]) == {"mean": 7.0, "low": None, "high": None, "n": 1}
    assert interval_text(nothing) == "–" and interval_text(mean_interval([7])) == "7.000"
    assert interval_text(mean_interval([1, 1, 1]), 1) == "1.0 (1.0 to 1.0)"


def test_non_finite_values_are_left_out_and_counted():
    found = summarise([1.0, math.nan, 3.0], [0.5, -0.5, math.inf], None, [4, 5, 6])
    assert found["reward"]["mean"] == 2.0 and found["reward"]["n"] == 2
    assert found["unsafe_share"] == share_interval([True, False])  # the infinite cost is no unsafe answer
    assert "kl" not in found and found["length"]["mean"] == 5.0
    assert found["left_out"] == {"reward": 1, "cost": 1}
    json.dumps(found, allow_nan=False)


def test_a_cost_of_zero_is_safe_and_all_bad_columns_are_absent():
    found = summarise(costs=[0.0, 0.0, 1.0, 2.0], rewards=[math.nan] * 4)
    assert found["unsafe_share"]["mean"] == 0.5
    assert "reward" not in found and found["left_out"] == {"reward": 4}
    assert "left_out" not in summarise(costs=[1.0, 2.0])


def test_finite_takes_arrays_and_lists():
    assert finite(np.array([[1.0, np.nan], [2.0, -np.inf]])).tolist() == [1.0, 2.0]
    assert finite([None, True, 3]).tolist() == [1.0, 3.0]
