"""Metrics of probabilities against labels, each with its definition; scikit-learn computes what it has.

    ap       average precision Σ (R_i − R_{i−1}) · P_i, not the trapezoid
    auroc    None where there is one class only
    ece      Σ_b n_b/n · |share_b − mean P_b| over 15 bins of equal width; the confidence is P(true)
    ece_null what a perfectly calibrated model of the same probabilities shows: labels are drawn from them

Shapes: n rows.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 15
SIMULATIONS = 200
TINY = 1e-12
ONE_CLASS = "one class only"


def ece(probabilities: "NDArray[np.float64]", labels: "NDArray[Any]", bins: int = BINS) -> float:
    """Expected calibration error of P(true), over bins of equal width.

    Args:
        probabilities: P(true) [n].
        labels: [n], or [simulations, n], whose mean is then returned.
        bins: How many bins.
    """
    return float(np.mean(_ece_of_each(probabilities, np.atleast_2d(labels), bins)))


def _ece_of_each(
    probabilities: "NDArray[np.float64]", labels_Dn: "NDArray[Any]", bins: int = BINS
) -> "NDArray[np.float64]":
    """The error of each of D sets of labels [D]."""
    # a bin has its upper end, as torchmetrics counts; 0 is in the first
    places = np.clip(np.ceil(probabilities * bins).astype(int) - 1, 0, bins - 1)
    gaps_Dn = labels_Dn - probabilities
    totals = [np.bincount(places, weights=row, minlength=bins) for row in gaps_Dn]
    return np.abs(np.array(totals)).sum(1) / len(probabilities)


def ece_null(probabilities: "NDArray[np.float64]", seed: int = 0) -> tuple[float, float]:
    """(mean, 97.5 % point) of the error of a perfectly calibrated model with these probabilities."""
    rng = np.random.default_rng(seed)
    drawn = rng.random((SIMULATIONS, len(probabilities))) < probabilities
    errors = _ece_of_each(probabilities, drawn)
    return float(errors.mean()), float(np.quantile(errors, 0.975))


def reliability(probabilities: "NDArray[np.float64]", labels: "NDArray[np.bool_]") -> list[dict[str, float]]:
    """Of each bin with rows: mean P(true), share of true labels, n."""
    places = np.clip(np.ceil(probabilities * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        {
            "confidence": float(probabilities[places == b].mean()),
            "share": float(labels[places == b].mean()),
            "n": int((places == b).sum()),
        }
        for b in range(BINS)
        if (places == b).any()
    ]


def nll(probabilities: "NDArray[np.float64]", labels: "NDArray[np.bool_]") -> float:
    """Mean negative log-likelihood (nats)."""
    of_label = np.where(labels, probabilities, 1 - probabilities)
    return float(-np.log(np.clip(of_label, TINY, 1.0)).mean())


def recall_at_fpr(probabilities: "NDArray[np.float64]", labels: "NDArray[np.bool_]", fpr: float) -> float:
    """The largest recall at a threshold with at most this false-positive rate; both classes are there."""
    from sklearn.metrics import roc_curve

    rates, recalls, _ = roc_curve(labels, probabilities)
    return float(recalls[rates <= fpr + 1e-12].max())


def best_f1(probabilities: "NDArray[np.float64]", labels: "NDArray[np.bool_]") -> float:
    """The largest F1 at any threshold of these very rows: for comparisons, never to choose a threshold."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(labels, probabilities)
    both = precision + recall
    return float(np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0).max())


def binary_metrics(
    probabilities: "NDArray[np.float64]", labels: "NDArray[np.bool_]", threshold: float, seed: int = 0
) -> dict[str, Any]:
    """Every number of one output.

    Args:
        probabilities: P(true) of the rows with a known label.
        labels: Their labels.
        threshold: The probability from which it is flagged.
        seed: Of the simulated null of the calibration error.

    Returns:
        n, positives, threshold, and where there are rows: precision, recall, f1, fpr at the threshold, ap,
        auroc, best_f1 and recalls at false-positive rates (None with `note` where there is one class only),
        brier, nll, ece, ece_null, ece_null_high.
    """
    n, positives = len(labels), int(labels.sum())
    out: dict[str, Any] = {"n": n, "positives": positives, "threshold": threshold}
    if n == 0:
        return {**out, "note": "no label"}
    flagged = probabilities >= threshold
    hits, negatives = int((flagged & labels).sum()), n - positives
    out |= {
        "precision": hits / int(flagged.sum()) if flagged.any() else None,
        "recall": hits / positives if positives else None,
        "f1": 2 * hits / (int(flagged.sum()) + positives) if positives else None,
        "fpr": int((flagged & ~labels).sum()) / negatives if negatives else None,
        "brier": float(np.square(probabilities - labels).mean()),
        "nll": nll(probabilities, labels),
        "ece": ece(probabilities, labels),
    }
    out["ece_null"], out["ece_null_high"] = ece_null(probabilities, seed)
    ranked = ("ap", "auroc", "best_f1", "recall_at_fpr_1", "recall_at_fpr_5")
    if positives in (0, n):
        return {**out, **dict.fromkeys(ranked), "note": ONE_CLASS}
    from sklearn.metrics import average_precision_score, roc_auc_score

    values = (
        float(average_precision_score(labels, probabilities)),
        float(roc_auc_score(labels, probabilities)),
        best_f1(probabilities, labels),
        recall_at_fpr(probabilities, labels, 0.01),
        recall_at_fpr(probabilities, labels, 0.05),
    )
    return {**out, **dict(zip(ranked, values))}


def group_bootstrap(
    groups: Sequence[str],
    measure: "Callable[[NDArray[np.int64]], float | None]",
    seed: int = 0,
    resamples: int = 200,
) -> tuple[float, float] | None:
    """A 95 % percentile interval from resampling groups (prompts), whose rows are not independent.

    Args:
        groups: The group of each row.
        measure: Row numbers, with repetitions -> a number; None where it is undefined.
        seed: Of the draws.
        resamples: How many.

    Returns:
        (low, high); None where the measure is undefined in half of the resamples or more.
    """
    _, codes = np.unique(np.array(groups, dtype=object).astype(str), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    rows_of = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    rng, values = np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = rng.integers(0, len(rows_of), len(rows_of))
        value = measure(np.concatenate([rows_of[i] for i in drawn]))
        if value is not None:
            values.append(value)
    if 2 * len(values) <= resamples:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
