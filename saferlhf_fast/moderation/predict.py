"""A moderator's probabilities of labelled examples, with the labels beside them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..data.moderation_examples import Encoded, ModerationExample
from .labels import labels_of
from .moderator import Moderator
from .quality import Predictions, cuts_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


def known_sources(moderator: Moderator, examples: Sequence[ModerationExample]) -> list[str | None]:
    """The source of each example, where the moderator has a head for it; else None."""
    return [e.source if e.source in moderator.model.spec.sources else None for e in examples]


def logits_of(moderator: Moderator, examples: Sequence[ModerationExample]) -> "NDArray[np.float64]":
    """logits_SX of examples, which are tokenised already."""
    encoded = [Encoded(e.ids, 0, e.second_at, e.truncated) for e in examples]
    return moderator.logits(
        encoded,
        [e.prompt_text for e in examples],
        [e.response_text for e in examples],
        known_sources(moderator, examples),
    )


def predictions_of(
    moderator: Moderator,
    examples: Sequence[ModerationExample],
    logits_SX: "NDArray[np.float64]",
    preset: str = "balanced",
    threshold: float | None = None,
) -> Predictions:
    """Probabilities, labels and thresholds of examples.

    Args:
        moderator: The moderator, with its temperatures.
        examples: The examples.
        logits_SX: What `logits_of` returned for them.
        preset: Thresholds.
        threshold: One for every output, in place of the preset.
    """
    spec = moderator.model.spec
    labels = labels_of(examples, spec)
    cuts_SX = cuts_of(moderator.calibration, spec, [e.source for e in examples], preset)
    if threshold is not None:
        cuts_SX = np.full_like(cuts_SX, threshold)
    return Predictions(
        moderator.scaled(logits_SX),
        labels.true_SX.numpy().astype(bool),
        labels.known_SX.numpy(),
        [e.prompt_text for e in examples],
        cuts_SX,
    )
