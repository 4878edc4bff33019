"""Labels of examples as tensors over a moderator's outputs, and which of them are known.

A severity makes all of P(y > 0), P(y > 1), P(y > 2) known, and a safety label P(y > 0) alone: that a safe
answer is not severe would be true too, but rows without severities have no severe ones beside it, and
P(y > 1) would fall for all. Where no safety is labelled, categories give it: one that applies means unsafe,
and all of the label set known not to apply means safe. A category that is missing is unknown, not absent.

Shapes: S examples, X outputs of `ModeratorSpec.outputs`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..data.harm_taxonomy import TAXONOMIES
from ..data.moderation_examples import ModerationExample
from ..errors import UserError
from ..models.moderator_spec import LEVELS, REFUSAL, SEVERITY, UNSAFE, ModeratorSpec

RESERVED = {UNSAFE, REFUSAL, *SEVERITY}
"""Names of other outputs, which no category may have."""


class Labels(NamedTuple):
    """Labels of S examples over X outputs."""

    true_SX: torch.Tensor  # fp32, 0 or 1; 0 where it is unknown
    known_SX: torch.Tensor  # bool

    @property
    def positive_X(self) -> torch.Tensor:
        """How many examples have each output true."""
        return (self.true_SX * self.known_SX).sum(0)

    @property
    def negative_X(self) -> torch.Tensor:
        """How many examples have each output false."""
        return ((1 - self.true_SX) * self.known_SX).sum(0)


def labels_of(examples: Sequence[ModerationExample], spec: ModeratorSpec) -> Labels:
    """The labels of examples in the order of a moderator's outputs.

    Categories of another label set than the moderator's are unknown to it.
    """
    rows = [_row(example, spec) for example in examples]
    shape = (len(rows), len(spec.outputs))
    return Labels(
        torch.tensor([[value is True for value in row] for row in rows], dtype=torch.float32).view(shape),
        torch.tensor([[value is not None for value in row] for row in rows], dtype=torch.bool).view(shape),
    )


def _row(example: ModerationExample, spec: ModeratorSpec) -> list[bool | None]:
    own = not example.label_set or example.label_set == spec.label_set
    flags = [example.categories.get(name) if own else None for name in spec.categories]
    row = [*flags, *levels_of(example, spec)]
    return [*row, example.refusal] if spec.refusal else row


def unsafe_of(example: ModerationExample, names: Sequence[str] = ()) -> bool | None:
    """Whether a response is unsafe: its label, else its severity, else its categories; None: unknown.

    Args:
        example: The example.
        names: All categories of its label set.
    """
    if example.unsafe is not None:
        return example.unsafe
    if example.severity is not None:
        return example.severity > 0
    if any(flag is True for flag in example.categories.values()):
        return True
    known = bool(names) and all(example.categories.get(name) is False for name in names)
    return False if known else None


def levels_of(example: ModerationExample, spec: ModeratorSpec) -> list[bool | None]:
    """Whether the severity is above 0, 1 and 2; None: unknown."""
    names = spec.categories if example.label_set in ("", spec.label_set) else ()
    unsafe = unsafe_of(example, names)
    # safety and severity may contradict each other: how severe it is stays unknown then
    if example.severity is None or (example.severity > 0) != unsafe:
        return [unsafe, None, None]
    return [example.severity > level for level in range(LEVELS - 1)]


def label_set_of(examples: Sequence[ModerationExample], wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """The label set of a moderator and its categories.

    Args:
        examples: Training examples.
        wanted: The label set that the settings name; None: the one of the data.

    Returns:
        (name, categories): those of the taxonomy of that name, else those that the data have, sorted; ("",
        ()) where no category is labelled.

    Raises:
        UserError: The data have several label sets and the settings choose none, or not the one wanted, or a
            category has the name of another output.
    """
    found: dict[str, set[str]] = {}
    for example in examples:
        if example.categories:
            found.setdefault(example.label_set, set()).update(example.categories)
    if wanted is None and len(found) > 1:
        raise UserError(
            f"label_set: expected data of one label set, got {', '.join(sorted(found))}; label_set= chooses "
            "one, and the categories of the others are then unknown"
        )
    if not found and wanted is None:
        return "", ()
    name = next(iter(found)) if wanted is None else wanted
    if name not in found:
        got = ", ".join(sorted(found)) or "none with categories"
        raise UserError(f"label_set: expected {name} in the data, got {got}")
    categories = TAXONOMIES.get(name) or tuple(sorted(found[name]))
    unknown = sorted(found[name] - set(categories))
    if unknown:
        raise UserError(f"label_set: expected categories of {name}, got {unknown[0]!r} in the data")
    clash = RESERVED & set(categories)
    if clash:
        raise UserError(f"label_set: expected other category names than {', '.join(sorted(clash))}")
    return name, categories


def require_label_set(examples: Sequence[ModerationExample], spec: ModeratorSpec, what: str) -> None:
    """Checks that data have labels that a moderator predicts.

    Args:
        examples: The examples.
        spec: The moderator's.
        what: The setting that names the data, for the message.

    Raises:
        UserError: Their categories are all of another label set and they have no safety label, or they name
            categories that the moderator's label set has not.
    """
    sets = Counter(e.label_set for e in examples if e.categories)
    own = [e for e in examples if e.categories and e.label_set in ("", spec.label_set)]
    unknown = {name for e in own for name in e.categories} - set(spec.categories)
    if unknown and spec.categories:
        raise UserError(
            f"{what}: expected categories of the model's label set {spec.label_set or 'without a name'}, got "
            f"{sorted(unknown)[0]!r}"
        )
    if sets and not own and not any(unsafe_of(e) is not None for e in examples):
        raise UserError(
            f"{what}: expected labels of the model's label set {spec.label_set or '(none)'}, got those of "
            f"{', '.join(sorted(sets))}"
        )
