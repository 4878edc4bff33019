"""How good a moderator is on labelled rows: every output, the categories together, severity, consistency.

Absent categories, without a positive, are left out of means and named. Intervals are of prompts, since
answers to one prompt are not independent. `prompt_only` is a control: what the prompt's topic alone predicts.

Shapes: S rows, X outputs of `ModeratorSpec.outputs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.moderator_spec import LEVELS, UNSAFE, Calibration, ModeratorSpec
from .metrics import binary_metrics, group_bootstrap, reliability
from .thresholds import name_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDS = 5


@dataclass(frozen=True)
class Predictions:
    """A moderator's probabilities of labelled rows.

    Attributes:
        probabilities_SX: Probabilities.
        true_SX, known_SX: Labels, and which are known.
        prompts: The prompt of each row.
        cuts_SX: The probability from which each output is flagged, of each row's source.
    """

    probabilities_SX: "NDArray[np.float64]"
    true_SX: "NDArray[np.bool_]"
    known_SX: "NDArray[np.bool_]"
    prompts: Sequence[str]
    cuts_SX: "NDArray[np.float64]"


def cuts_of(
    calibration: Calibration, spec: ModeratorSpec, sources: Sequence[str], preset: str
) -> "NDArray[np.float64]":
    """cuts_SX: the threshold of each output for each row."""
    table = {
        source: [calibration.threshold(name_of(name), preset, source) for name in spec.outputs]
        for source in set(sources)
    }
    return np.array([table[source] for source in sources]).reshape(len(sources), len(spec.outputs))


def quality(predictions: Predictions, spec: ModeratorSpec, seed: int = 0) -> dict[str, Any]:
    """Every number of a moderator on labelled rows.

    Args:
        predictions: Probabilities and labels.
        spec: The moderator's.
        seed: Of simulations and resamples.

    Returns:
        n, outputs {name: binary_metrics}, categories (macro and micro F1, macro AP and AUROC, absent),
        severity (quadratic kappa, accuracy, confusion, mean error of the expected severity), consistency,
        reliability of unsafe; plain types.
    """
    outputs = {}
    for column, name in enumerate(spec.outputs):
        known = predictions.known_SX[:, column]
        # rows of several sources may have several thresholds: relative to them one threshold is left
        scores, labels = predictions.probabilities_SX[known, column], predictions.true_SX[known, column]
        cuts = predictions.cuts_SX[known, column]
        values = binary_metrics(scores, labels, float(cuts[0]) if len(cuts) else 0.5, seed)
        if len(set(cuts.tolist())) > 1:
            values |= _at_cuts(scores >= cuts, labels)
        outputs[name_of(name)] = values
    out: dict[str, Any] = {"n": len(predictions.prompts), "outputs": outputs}
    out["intervals"] = _intervals(predictions, len(spec.categories), seed)
    if spec.categories:
        out["categories"] = _categories(predictions, spec, outputs)
    out["severity"] = severity_quality(predictions, spec)
    out["consistency"] = consistency(predictions, spec)
    known = predictions.known_SX[:, len(spec.categories)]
    column = len(spec.categories)
    out["reliability"] = reliability(
        predictions.probabilities_SX[known, column], predictions.true_SX[known, column]
    )
    return out


def _at_cuts(flagged: "NDArray[np.bool_]", labels: "NDArray[np.bool_]") -> dict[str, Any]:
    hits, positives = int((flagged & labels).sum()), int(labels.sum())
    negatives = len(labels) - positives
    return {
        "threshold": None,
        "precision": hits / int(flagged.sum()) if flagged.any() else None,
        "recall": hits / positives if positives else None,
        "f1": 2 * hits / (int(flagged.sum()) + positives) if positives else None,
        "fpr": int((flagged & ~labels).sum()) / negatives if negatives else None,
    }


def _intervals(predictions: Predictions, column: int, seed: int) -> dict[str, Any]:
    """95 % intervals of unsafe's AUROC, AP and F1, over prompts."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    known = np.flatnonzero(predictions.known_SX[:, column])
    scores, labels = predictions.probabilities_SX[known, column], predictions.true_SX[known, column]
    flagged = scores >= predictions.cuts_SX[known, column]
    groups = [predictions.prompts[i] for i in known.tolist()]
    if len(labels) == 0 or labels.all() or not labels.any():
        return {}

    def ranked(function: Any) -> Any:
        return lambda rows: (
            float(function(labels[rows], scores[rows])) if 0 < labels[rows].sum() < len(rows) else None
        )

    def f1(rows: "NDArray[np.int64]") -> float | None:
        both = flagged[rows].sum() + labels[rows].sum()
        return float(2 * (flagged[rows] & labels[rows]).sum() / both) if both else None

    measures = {"auroc": ranked(roc_auc_score), "ap": ranked(average_precision_score), "f1": f1}
    return {f"{UNSAFE} {name}": group_bootstrap(groups, m, seed) for name, m in measures.items()}


def _categories(
    predictions: Predictions, spec: ModeratorSpec, outputs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Means over the categories that are present, and the micro F1 over all known labels of these."""
    present = [name for name in spec.categories if outputs[name]["positives"]]
    place = np.array([spec.categories.index(name) for name in present], dtype=int)
    known = predictions.known_SX[:, place]
    flagged = (predictions.probabilities_SX >= predictions.cuts_SX)[:, place] & known
    labels = predictions.true_SX[:, place] & known
    both = int(flagged.sum() + labels.sum())

    def mean(key: str) -> float | None:
        values = [outputs[name][key] for name in present if outputs[name].get(key) is not None]
        return float(np.mean(values)) if values else None

    return {
        "macro_f1": mean("f1"),
        "micro_f1": 2 * int((flagged & labels).sum()) / both if both else None,
        "macro_ap": mean("ap"),
        "macro_auroc": mean("auroc"),
        "present": len(present),
        "absent": [name for name in spec.categories if name not in present],
    }


def levels(predictions: Predictions, spec: ModeratorSpec) -> "NDArray[np.int64]":
    """The level of each row, as `Moderator.verdict` decides it: 0 below the threshold, else the likeliest."""
    place = spec.heads["severity"]
    above_SG = predictions.probabilities_SX[:, place]
    distribution_SG = above_SG - np.hstack([above_SG[:, 1:], np.zeros((len(above_SG), 1))])
    flagged = above_SG[:, 0] >= predictions.cuts_SX[:, place.start]
    return np.where(flagged, 1 + distribution_SG.argmax(1), 0)


def severity_quality(predictions: Predictions, spec: ModeratorSpec) -> dict[str, Any]:
    """Of the rows with a known severity: kappa, accuracy, confusion (rows: label, columns: level)."""
    from sklearn.metrics import cohen_kappa_score, confusion_matrix

    place = spec.heads["severity"]
    known = predictions.known_SX[:, place].all(1)
    names = list(range(LEVELS))
    truth = predictions.true_SX[known, place].sum(1)
    level = levels(predictions, spec)[known]
    if not known.any():
        return {"n": 0, "note": "no label"}
    expected = predictions.probabilities_SX[known, place].sum(1)
    out: dict[str, Any] = {
        "n": int(known.sum()),
        "accuracy": float((truth == level).mean()),
        "mean_error": float(np.abs(expected - truth).mean()),
        "confusion": confusion_matrix(truth, level, labels=names).tolist(),
    }
    if len(set(truth.tolist())) == 1 and len(set(level.tolist())) == 1:
        return {**out, "kappa": None, "note": "one level only"}
    # labels= : a level that is absent on both sides would change the weights of the others
    return {**out, "kappa": float(cohen_kappa_score(truth, level, labels=names, weights="quadratic"))}


def consistency(predictions: Predictions, spec: ModeratorSpec) -> dict[str, Any]:
    """How often level 0 meets a flagged category, and a level above 0 none."""
    if not spec.categories:
        return {}
    flags = (predictions.probabilities_SX >= predictions.cuts_SX)[:, : len(spec.categories)].any(1)
    level = levels(predictions, spec)
    return {
        "safe_with_category": float(((level == 0) & flags).mean()) if len(level) else None,
        "unsafe_without_category": float(((level > 0) & ~flags).mean()) if len(level) else None,
    }


def prompt_only(prompts: Sequence[str], labels: "NDArray[np.bool_]", seed: int = 0) -> dict[str, Any]:
    """AUROC and AP of TF-IDF with logistic regression on prompts alone, out of fold by prompt.

    Args:
        prompts: The prompt of each row.
        labels: Whether its answer is unsafe.
        seed: Of the folds.

    Returns:
        auroc and ap; or `note`, why there is none.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, roc_auc_score
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline

    if len(labels) == 0 or labels.all() or not labels.any():
        return {"note": "one class only"}
    if len(set(prompts)) < 2 * FOLDS:
        return {"note": f"{len(set(prompts))} different prompts; expected at least {2 * FOLDS}"}
    scores = np.full(len(labels), np.nan)
    texts = np.array(prompts, dtype=object)
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(texts, labels, groups=list(prompts)):
        if labels[train].all() or not labels[train].any():
            return {"note": "one class only in a fold"}
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|\S"),
            LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"),
        )
        try:
            model.fit(texts[train], labels[train])
        except ValueError:  # prompts without a single word
            return {"note": "no words in the prompts"}
        scores[test] = model.predict_proba(texts[test])[:, 1]
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "ap": float(average_precision_score(labels, scores)),
        "share": float(labels.mean()),
    }
