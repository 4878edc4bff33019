"""Temperatures and thresholds, tuned on validation data and never on those that quality is measured on.

    temperature   T > 0 with the smallest NLL of σ(z / T) over the known labels of a head; the severity's
                  three logits also get a shift each, since a bias learns slowly (near 0 on few rows)
    balanced      the threshold with the largest F1, or of a target false-positive rate
    strict        flags at least what balanced flags: false-positive rate strict_fpr, or balanced itself
    permissive    flags at most what balanced flags: false-positive rate permissive_fpr, or balanced itself

Each threshold comes with what it reached and a 95 % interval: of F1 by bootstrap, of the false-positive rate
exactly (Clopper and Pearson). An output with one class alone in the validation data keeps 0.5 and is named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.moderator_spec import PRESETS, SEVERITY, UNSAFE, Calibration, ModeratorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..config.moderation_stages import Thresholds

RESAMPLES = 200


@dataclass(frozen=True)
class Tuned:
    """A threshold and what it reached on the validation data.

    Attributes:
        threshold: The probability from which an output is flagged.
        f1, f1_interval: F1 and its bootstrap interval.
        fpr, fpr_interval: False-positive rate and its exact interval.
        recall: Share of the positives that are flagged.
        positives, negatives: How many labels it was tuned on.
    """

    threshold: float
    f1: float
    f1_interval: tuple[float, float]
    fpr: float
    fpr_interval: tuple[float, float]
    recall: float
    positives: int
    negatives: int


def temperature(logits: "NDArray[np.float64]", labels: "NDArray[np.bool_]") -> float:
    """The temperature of a head: the T > 0 that minimises the NLL of σ(z / T).

    Args:
        logits: Logits of all outputs of the head with known labels, flat.
        labels: Their labels.

    Returns:
        T between 0.05 and 20; 1.0 where there is one class alone.
    """
    if len(labels) == 0 or labels.all() or not labels.any():
        return 1.0
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]  # scipy has no types of its own

    signs = np.where(labels, 1.0, -1.0)

    def nll(log_t: float) -> float:
        return float(np.logaddexp(0.0, -signs * logits / np.exp(log_t)).mean())

    bound = float(np.log(20.0))
    return float(np.exp(minimize_scalar(nll, bounds=(-bound, bound), method="bounded").x))


def best_f1(scores: "NDArray[np.float64]", labels: "NDArray[np.bool_]") -> float:
    """The threshold with the largest F1, in the middle between the two scores that it separates.

    Args:
        scores: Probabilities.
        labels: Their labels, of both classes.
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, scores)
    both = precision[:-1] + recall[:-1]
    f1 = np.divide(2 * precision[:-1] * recall[:-1], both, out=np.zeros_like(both), where=both > 0)
    return _between(scores, float(thresholds[int(f1.argmax())]))


def at_fpr(scores: "NDArray[np.float64]", labels: "NDArray[np.bool_]", target: float) -> float:
    """The lowest threshold at which at most a share of the negatives is flagged.

    Args:
        scores: Probabilities.
        labels: Their labels, of both classes.
        target: The false-positive rate.
    """
    negatives = np.sort(scores[~labels])[::-1]
    allowed = int(np.floor(target * len(negatives) + 1e-9))
    if allowed >= len(negatives):
        return _between(scores, float(negatives[-1]))
    above = scores[scores > negatives[allowed]]
    return _between(scores, float(above.min())) if len(above) else float(np.nextafter(negatives[0], 2.0))


def _between(scores: "NDArray[np.float64]", lowest: float) -> float:
    """The middle between the lowest flagged score and the highest one below it."""
    below = scores[scores < lowest]
    middle = (lowest + float(below.max())) / 2 if len(below) else lowest
    return middle if middle > (float(below.max()) if len(below) else -1.0) else lowest


def tuned(scores: "NDArray[np.float64]", labels: "NDArray[np.bool_]", threshold: float, seed: int) -> Tuned:
    """What a threshold reaches, with intervals."""
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    flagged = scores >= threshold
    false_positives, negatives = int((flagged & ~labels).sum()), int((~labels).sum())
    exact = binomtest(false_positives, negatives).proportion_ci(0.95, method="exact")
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(labels), (RESAMPLES, len(labels)))
    resampled = [_f1(flagged[row], labels[row]) for row in rows]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Tuned(
        threshold,
        _f1(flagged, labels),
        (float(low), float(high)),
        false_positives / negatives,
        (float(exact.low), float(exact.high)),
        float((flagged & labels).sum() / labels.sum()),
        int(labels.sum()),
        negatives,
    )


def _f1(flagged: "NDArray[np.bool_]", labels: "NDArray[np.bool_]") -> float:
    both = flagged.sum() + labels.sum()
    return float(2 * (flagged & labels).sum() / both) if both else 0.0


def presets_of(
    scores: "NDArray[np.float64]", labels: "NDArray[np.bool_]", rules: "Thresholds"
) -> dict[str, float]:
    """{preset: threshold} of one output: strict ≤ balanced ≤ permissive.

    Args:
        scores: Probabilities.
        labels: Their labels, of both classes.
        rules: The settings.
    """
    balanced = best_f1(scores, labels) if rules.by == "f1" else at_fpr(scores, labels, rules.fpr)
    return {
        "strict": min(balanced, at_fpr(scores, labels, rules.strict_fpr)),
        "balanced": balanced,
        "permissive": max(balanced, at_fpr(scores, labels, rules.permissive_fpr)),
    }


def name_of(output: str) -> str:
    """What thresholds call an output: P(severity > 0) is `unsafe`."""
    return UNSAFE if output == SEVERITY[0] else output


def thresholds_of(
    probabilities_SX: "NDArray[np.float64]",
    true_SX: "NDArray[np.bool_]",
    known_SX: "NDArray[np.bool_]",
    spec: ModeratorSpec,
    rules: "Thresholds",
    seed: int = 0,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Tuned]], list[str]]:
    """Tunes all outputs.

    Args:
        probabilities_SX: Probabilities of the validation rows.
        true_SX: Their labels.
        known_SX: Which of these are known.
        spec: The moderator's.
        rules: The settings.
        seed: Of the bootstrap.

    Returns:
        ({preset: {output: threshold}}, {output: {preset: what it reached}}, outputs that were not tuned).
    """
    table: dict[str, dict[str, float]] = {preset: {} for preset in PRESETS}
    reached: dict[str, dict[str, Tuned]] = {}
    untuned = []
    for column, output in enumerate(map(name_of, spec.outputs)):
        known = known_SX[:, column]
        scores, labels = probabilities_SX[known, column], true_SX[known, column]
        if not len(labels) or labels.all() or not labels.any():
            untuned.append(output)
            continue
        for preset, value in presets_of(scores, labels, rules).items():
            table[preset][output] = value
            reached.setdefault(output, {})[preset] = tuned(scores, labels, value, seed)
    return table, reached, untuned


def temperatures_of(
    logits_SX: "NDArray[np.float64]",
    true_SX: "NDArray[np.bool_]",
    known_SX: "NDArray[np.bool_]",
    spec: ModeratorSpec,
) -> tuple[dict[str, float], tuple[float, ...]]:
    """({head: temperature}, shifts of the severity's logits); arguments as `thresholds_of`, with logits."""
    out, shifts = {}, (0.0,) * len(SEVERITY)
    for head, place in spec.heads.items():
        known = known_SX[:, place]
        if head == "severity":
            out[head], shifts = severity_scale(logits_SX[:, place], true_SX[:, place], known)
        else:
            out[head] = temperature(logits_SX[:, place][known], true_SX[:, place][known])
    return out, shifts


def severity_scale(
    logits_SG: "NDArray[np.float64]", true_SG: "NDArray[np.bool_]", known_SG: "NDArray[np.bool_]"
) -> tuple[float, tuple[float, ...]]:
    """T and shifts c with the smallest NLL of σ(z / T + c), and a normal prior on log T and c.

    Args:
        logits_SG: Logits of P(y > 0), P(y > 1), P(y > 2).
        true_SG: Their labels.
        known_SG: Which of these are known.

    Returns:
        T and c; 1.0 and zeros where there is one class alone in every column.
    """
    from scipy.optimize import minimize

    levels = logits_SG.shape[1]
    labels = true_SG[known_SG]
    if len(labels) == 0 or labels.all() or not labels.any():
        return 1.0, (0.0,) * levels
    signs_SG = np.where(true_SG, 1.0, -1.0)

    def objective(x: "NDArray[np.float64]") -> float:
        losses_SG = np.logaddexp(0.0, -signs_SG * (logits_SG / np.exp(x[0]) + x[1:]))
        return float(losses_SG[known_SG].sum() + 0.5 * np.square(x).sum())

    best = minimize(objective, np.zeros(1 + levels), method="L-BFGS-B", bounds=[(-3, 3)] + [(-5, 5)] * levels)
    return float(np.exp(best.x[0])), tuple(float(shift) for shift in best.x[1:])


def source_thresholds(
    sources: Sequence[str],
    probabilities_SX: "NDArray[np.float64]",
    labels: "tuple[NDArray[np.bool_], NDArray[np.bool_]]",
    spec: ModeratorSpec,
    rules: "Thresholds",
) -> dict[str, dict[str, dict[str, float]]]:
    """{source: thresholds of its own}; an output without both classes there has those of all.

    Args:
        sources: The source of each row.
        probabilities_SX: Probabilities of the validation rows.
        labels: (true_SX, known_SX).
        spec: The moderator's.
        rules: The settings.
    """
    together = thresholds_of(probabilities_SX, *labels, spec, rules)[0]
    out: dict[str, dict[str, dict[str, float]]] = {}
    for source in sorted(set(sources)):
        rows = np.array([item == source for item in sources])
        own = thresholds_of(probabilities_SX[rows], labels[0][rows], labels[1][rows], spec, rules)[0]
        out[source] = {preset: {**together[preset], **own[preset]} for preset in PRESETS}
    return out


def calibration_as_text(
    calibration: Calibration, reached: Mapping[str, Mapping[str, Tuned]]
) -> list[list[Any]]:
    """Rows of a table: output, preset, threshold, F1 with interval, false-positive rate with interval, n."""
    return [
        [
            output,
            preset,
            f"{item.threshold:.3f}",
            f"{item.f1:.3f} [{item.f1_interval[0]:.3f}, {item.f1_interval[1]:.3f}]",
            f"{item.fpr:.3f} [{item.fpr_interval[0]:.3f}, {item.fpr_interval[1]:.3f}]",
            f"{item.positives}/{item.positives + item.negatives}",
        ]
        for output, presets in reached.items()
        for preset, item in presets.items()
    ]
