"""The comparison of a score model with TF-IDF on held-out pairs: prompts are resampled, not pairs."""

import numpy as np

from saferlhf_fast.training.held_out_pairs import Right, _compare, comparison_lines

RNG = np.random.default_rng(0)


def test_intervals_resample_prompts_and_cover():
    """Pairs of one prompt are all right or all wrong: n is the number of prompts, not of pairs."""
    right = RNG.random(100) < 0.6
    prompts = [f"p{i}" for i in range(100) for _ in range(5)]
    ours, theirs = Right(np.repeat(right, 5).astype(float), None), Right(np.zeros(500), None)
    out = _compare(ours, theirs, prompts, np.arange(500))
    found, p = out["accuracy"]["model"], right.mean()
    half = 1.96 * np.sqrt(p * (1 - p) / 100)
    assert (out["pairs"], out["prompts"]) == (500, 100) and "accuracy_sign" not in out
    assert np.allclose([found["low"], found["high"]], [p - half, p + half], atol=0.015), found


def test_the_difference_is_paired():
    """Two models that err on the same pairs but for a few: the difference is known far better than either."""
    right = (RNG.random(400) < 0.6).astype(float)
    better = right.copy()
    better[np.flatnonzero(right == 0)[:20]] = 1
    out = _compare(Right(better, better), Right(right, right), [str(i) for i in range(400)], np.arange(400))
    gain = out["accuracy_sign"]["difference"]
    assert np.isclose(gain["mean"], 0.05) and 0 < gain["low"] < 0.05 < gain["high"] < 0.08, gain
    assert gain["low"] > out["accuracy"]["model"]["low"] - out["accuracy"]["tfidf"]["high"] + 0.05


def test_parts_and_lines():
    out = _compare(Right(np.ones(4), None), Right(np.zeros(4), None), list("aabb"), np.array([0, 1]))
    assert (out["pairs"], out["prompts"]) == (2, 1)
    assert comparison_lines({**out, "consistent": out}) == [
        "held-out pairs (2 of 1 prompts), accuracy: model 1.000 (1.000 to 1.000), "
        "tfidf 0.000 (0.000 to 0.000), "
        "difference 1.000 (1.000 to 1.000)",
        "consistent held-out pairs (2 of 1 prompts), accuracy: model 1.000 (1.000 to 1.000), "
        "tfidf 0.000 (0.000 to 0.000), difference 1.000 (1.000 to 1.000)",
    ]
