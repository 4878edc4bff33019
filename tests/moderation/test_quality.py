"""Thresholds and metrics: definitions against scikit-learn, and what happens at the edges of each."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from saferlhf_fast.config.moderation_stages import Thresholds
from saferlhf_fast.data.moderation_examples import ModerationExample
from saferlhf_fast.models.moderator_spec import Calibration, ModeratorSpec
from saferlhf_fast.moderation import metrics, thresholds
from saferlhf_fast.moderation.page import write_page
from saferlhf_fast.moderation.quality import Predictions, cuts_of, prompt_only, quality

RNG = np.random.default_rng(0)
SPEC = ModeratorSpec("toy", ("a", "b", "never"), refusal=True)


def sample(n=2000, slope=2.0, share=0.0):
    """(probabilities, labels) of a calibrated model."""
    p = 1 / (1 + np.exp(-RNG.normal(share, slope, n)))
    return p, RNG.random(n) < p


@pytest.mark.parametrize("n, expected", [(200, 0.077), (1000, 0.034), (5000, 0.016)])
def test_calibration_error_of_a_perfect_model_is_the_null(n, expected):
    p = RNG.uniform(0, 1, n)
    mean, high = metrics.ece_null(p)
    assert mean == pytest.approx(expected, rel=0.25) and high > mean
    assert metrics.ece(p, RNG.random(n) < p) < high * 1.4
    assert metrics.ece(np.full(n, 0.9), np.zeros(n, bool)) == pytest.approx(0.9)
    # a bin has its upper end: 1/15 is in the first bin, as torchmetrics has it
    assert metrics.ece(np.array([1 / 15, 0.01]), np.array([True, False])) == pytest.approx(
        abs(0.5 - (1 / 15 + 0.01) / 2)
    )


def test_metrics_are_those_of_their_definitions():
    p, y = sample()
    got = metrics.binary_metrics(p, y, 0.4)
    order = np.argsort(-p)
    precision = np.cumsum(y[order]) / np.arange(1, len(y) + 1)
    assert got["ap"] == pytest.approx(float(precision[y[order]].mean()))
    assert got["auroc"] == pytest.approx(float((p[y][:, None] > p[~y]).mean()))
    assert got["brier"] == pytest.approx(float(((p - y) ** 2).mean()))
    assert got["nll"] == pytest.approx(float(-np.log(np.where(y, p, 1 - p)).mean()))
    tp, fp, fn = (p >= 0.4) & y, (p >= 0.4) & ~y, (p < 0.4) & y
    assert got["f1"] == pytest.approx(2 * tp.sum() / (2 * tp.sum() + fp.sum() + fn.sum()))
    assert got["fpr"] == pytest.approx(fp.sum() / (~y).sum())
    assert got["recall_at_fpr_1"] <= got["recall_at_fpr_5"] <= 1 and got["best_f1"] >= got["f1"]


@pytest.mark.parametrize(
    "labels, note", [([0, 0, 0], "one class only"), ([1, 1], "one class only"), ([], "no label")]
)
def test_one_class_and_no_label_are_said_and_not_measured(labels, note):
    got = metrics.binary_metrics(np.linspace(0.2, 0.8, len(labels)), np.array(labels, bool), 0.5)
    assert got["note"] == note and got.get("auroc") is None and got.get("ap") is None
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize("true_t", [0.25, 1.0, 4.0])
def test_temperature_is_found_and_leaves_the_order(true_t):
    z = RNG.normal(0, 2, 6000)
    y = RNG.random(6000) < 1 / (1 + np.exp(-z / true_t))
    assert thresholds.temperature(z, y) == pytest.approx(true_t, rel=0.15)
    assert thresholds.temperature(z, np.ones(6000, bool)) == 1.0
    levels = np.stack([z, z - 0.01, z - 0.02], 1)  # biases that have not been learned
    true = RNG.random((6000, 1)) < 1 / (1 + np.exp(-levels / true_t - np.array([1.0, -0.5, -2.0])))
    t, shifts = thresholds.severity_scale(levels, true, np.ones_like(true))
    assert t == pytest.approx(true_t, rel=0.3) and shifts == pytest.approx((1.0, -0.5, -2.0), abs=0.25)
    assert thresholds.severity_scale(levels, true & False, np.ones_like(true)) == (1.0, (0.0, 0.0, 0.0))


@pytest.mark.parametrize("by", ["f1", "fpr"])
@pytest.mark.parametrize("seed", range(6))
def test_presets_are_ordered_and_keep_their_rates(by, seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 400))
    p = np.round(rng.random(n), int(rng.integers(1, 4)))  # with ties
    y = rng.random(n) < p
    y[:2] = True, False
    rules = Thresholds(by=by, fpr=0.05, strict_fpr=0.2, permissive_fpr=0.01)
    table = thresholds.presets_of(p, y, rules)
    assert table["strict"] <= table["balanced"] <= table["permissive"]
    rate = {name: ((p >= cut) & ~y).sum() / (~y).sum() for name, cut in table.items()}
    assert rate["permissive"] <= max(0.01, rate["balanced"])
    if by == "fpr":
        assert rate["balanced"] <= 0.05 and rate["strict"] <= 0.2 and rate["permissive"] <= 0.01
        lower = p[(p < table["balanced"]) & ~y]
        if len(lower):  # the lowest such threshold: the next one would flag too many
            assert ((p >= lower.max()) & ~y).sum() / (~y).sum() > 0.05
    else:
        best = thresholds._f1(p >= table["balanced"], y)
        assert best == pytest.approx(max(thresholds._f1(p >= cut, y) for cut in p))


def test_intervals_of_thresholds_contain_what_new_rows_give():
    p, y = sample(400)
    item = thresholds.tuned(p, y, 0.5, 0)
    new_p, new_y = sample(20_000)
    assert item.fpr_interval[0] < ((new_p >= 0.5) & ~new_y).sum() / (~new_y).sum() < item.fpr_interval[1]
    assert item.f1_interval[0] < item.f1 < item.f1_interval[1]


def predictions(n=300, spec=SPEC, known=True):
    rng = np.random.default_rng(3)
    p = np.sort(rng.random((n, len(spec.outputs))), axis=1)[:, ::-1].copy()
    true = rng.random(p.shape) < p
    true[:, 2] = False  # the category `never`
    k = len(spec.categories)
    levels = np.cumprod(true[:, k : k + 3], axis=1).astype(bool)
    true[:, k : k + 3] = levels
    cuts = np.full(p.shape, 0.5)
    return Predictions(p, true, np.full(p.shape, known), [f"p{i // 2}" for i in range(n)], cuts)


def test_absent_categories_are_left_out_and_named():
    got = quality(predictions(), SPEC)
    outputs, means = got["outputs"], got["categories"]
    assert means["absent"] == ["never"] and means["present"] == 2 and outputs["never"]["f1"] is None
    assert means["macro_f1"] == pytest.approx((outputs["a"]["f1"] + outputs["b"]["f1"]) / 2)
    assert set(got["intervals"]) == {"unsafe auroc", "unsafe ap", "unsafe f1"}
    low, high = got["intervals"]["unsafe auroc"]
    assert low < outputs["unsafe"]["auroc"] < high
    json.dumps(got, allow_nan=False)


def test_unknown_labels_count_nowhere():
    whole = predictions()
    known = np.random.default_rng(1).random(whole.known_SX.shape) < 0.5
    other = whole.true_SX.copy()
    other[~known] = ~other[~known]
    a, b = (
        quality(Predictions(whole.probabilities_SX, t, known, whole.prompts, whole.cuts_SX), SPEC)
        for t in (whole.true_SX, other)
    )
    assert a == b and a["outputs"]["a"]["n"] == int(known[:, 0].sum())
    nothing = quality(predictions(known=False), SPEC)
    assert nothing["severity"] == {"n": 0, "note": "no label"} and nothing["intervals"] == {}
    assert len(nothing["categories"]["absent"]) == 3


def test_kappa_has_all_four_levels_where_one_is_absent():
    """Without labels= scikit-learn takes the levels that occur, and other weights with them."""
    spec = ModeratorSpec()
    truth, level = np.array([0, 1, 1, 3, 3, 0, 0, 3]), np.array([0, 0, 1, 3, 3, 0, 1, 3])
    above = np.stack([np.where(level > k, 0.99, 0.01) for k in range(3)], 1)
    true = truth[:, None] > np.arange(3)
    got = quality(Predictions(above, true, true | True, ["x"] * 8, np.full((8, 3), 0.5)), spec)["severity"]
    observed = np.zeros((4, 4))
    for i, j in zip(truth, level):
        observed[i, j] += 1
    weights = (np.arange(4)[:, None] - np.arange(4)) ** 2 / 9
    expected = np.outer(observed.sum(1), observed.sum(0)) / 8
    assert got["kappa"] == pytest.approx(1 - (weights * observed).sum() / (weights * expected).sum())
    assert got["confusion"] == observed.astype(int).tolist()
    constant = Predictions(np.full((8, 3), 0.01), true & False, true | True, ["x"] * 8, np.full((8, 3), 0.5))
    assert quality(constant, spec)["severity"]["kappa"] is None


def test_level_and_flag_cannot_contradict_each_other():
    made = predictions()
    got = quality(made, SPEC)
    assert 0 <= got["consistency"]["safe_with_category"] <= 1
    strict = Predictions(made.probabilities_SX, made.true_SX, made.known_SX, made.prompts, made.cuts_SX * 0)
    assert (
        quality(strict, SPEC)["severity"]["confusion"][0][0] == 0
    )  # every row is flagged, so none has level 0


def test_thresholds_of_a_source_hold_for_its_rows():
    calibration = Calibration(
        thresholds={"balanced": {"a": 0.2, "unsafe": 0.9}}, per_source={"x": {"balanced": {"unsafe": 0.1}}}
    )
    cuts = cuts_of(calibration, SPEC, ["x", "y"], "balanced")
    assert cuts[:, 3].tolist() == [0.1, 0.9] and cuts[1, 0] == 0.2 and cuts[0, 1] == 0.5
    assert calibration.version != Calibration().version == "untuned"


def test_prompt_only_finds_a_topic_and_nothing_in_noise():
    topics = [f"{'bomb' if i % 2 else 'cake'} number {i}" for i in range(200)]
    labels = np.arange(200) % 2 == 1
    assert prompt_only(topics, labels)["auroc"] > 0.99
    assert abs(prompt_only(topics, RNG.permutation(labels))["auroc"] - 0.5) < 0.15
    assert "one class" in prompt_only(topics, labels | True)["note"]
    assert "2 different prompts" in prompt_only(["a", "b"] * 100, labels)["note"]


def test_the_page_loads_nothing_and_cannot_be_left_by_a_text(tmp_path):
    made = predictions(40)
    hostile = "</script><img src=x onerror=alert(1)>"
    examples = [ModerationExample([1], hostile, hostile) for _ in range(40)]
    write_page(tmp_path / "q.html", {**quality(made, SPEC), "threshold_version": "v"}, examples, made, SPEC)
    text = (tmp_path / "q.html").read_text()
    assert text.count("</script>") == 2 and "<img" not in text and "onerror" in text
    assert not re.search(
        r"(src|href)=|https?://|@import", text.replace(json.dumps(hostile)[1:-1], "").replace("src=x", "")
    )
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["errors"] and data["errors"][0]["prompt"] == hostile
    assert set(data["scores"]) == {"a", "b", "never", "unsafe", "severity>1", "severity>2", "refusal"}
