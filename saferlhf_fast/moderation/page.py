"""The page of a moderator's quality: one HTML file without anything from elsewhere (page.html fills it).

Texts of the worst errors are in it, folded until asked for: the page is as harmful as the data are.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.moderation_examples import ModerationExample
from ..models.moderator_spec import ModeratorSpec
from ..runtime import disk
from .quality import Predictions
from .thresholds import name_of

TEMPLATE = Path(__file__).with_name("page.html")
ROWS = 5000
"""Most rows of an output that its slider has."""
WORST = 20
LONGEST = 2000  # characters of a shown text


def write_page(
    path: Path,
    quality: dict[str, Any],
    examples: Sequence[ModerationExample],
    predictions: Predictions,
    spec: ModeratorSpec,
) -> None:
    """Writes the page.

    Args:
        path: The file.
        quality: What `quality.quality` returned.
        examples: The labelled examples, for the texts of errors.
        predictions: Their probabilities.
        spec: The moderator's.
    """
    data = {
        "quality": quality,
        "categories": list(spec.categories),
        "scores": _scores(predictions, spec),
        "errors": _errors(examples, predictions, len(spec.categories)),
    }
    # "<" as an escape: a text may hold </script>
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    disk.write_text(path, TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text))


def _scores(predictions: Predictions, spec: ModeratorSpec) -> dict[str, dict[str, list[Any]]]:
    """{output: its probabilities and labels}, of evenly spaced rows where there are many."""
    out = {}
    for column, name in enumerate(spec.outputs):
        rows = np.flatnonzero(predictions.known_SX[:, column])
        if not len(rows):
            continue
        rows = rows[:: -(-len(rows) // ROWS)]
        out[name_of(name)] = {
            "p": np.round(predictions.probabilities_SX[rows, column], 4).tolist(),
            "y": predictions.true_SX[rows, column].astype(int).tolist(),
        }
    return out


def _errors(
    examples: Sequence[ModerationExample], predictions: Predictions, column: int
) -> list[dict[str, Any]]:
    """The rows on the wrong side of the threshold of unsafe, farthest from their label first."""
    p, labels = predictions.probabilities_SX[:, column], predictions.true_SX[:, column]
    flagged = p >= predictions.cuts_SX[:, column]
    wrong = np.flatnonzero(predictions.known_SX[:, column] & (flagged != labels))
    order = wrong[np.argsort(-np.abs(p[wrong] - labels[wrong]), kind="stable")][:WORST]
    return [
        {
            "row": int(i),
            "p": float(p[i]),
            "label": bool(labels[i]),
            "prompt": examples[i].prompt_text[:LONGEST],
            "response": examples[i].response_text[:LONGEST],
        }
        for i in order
    ]
