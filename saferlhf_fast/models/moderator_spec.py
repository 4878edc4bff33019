"""What a moderator's folder says about it beside its weights: labels, reading, thresholds, temperatures.

    <folder>/moderation.json        what is here
    <folder>/config.json, …         the backbone, as transformers writes it

No torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UserError

FILE = "moderation.json"
FORMAT = 1
LEVELS = 4
"""Severities 0 to 3."""
PRESETS = ("strict", "balanced", "permissive")
"""Sets of thresholds, from the one that flags most to the one that flags least."""
UNSAFE, REFUSAL = "unsafe", "refusal"
SEVERITY = ("severity>0", "severity>1", "severity>2")
"""Names of the outputs P(y > k)."""


@dataclass(frozen=True)
class Calibration:
    """What was tuned on validation data.

    Attributes:
        temperatures: {head: T}: its logits are divided by it.
        level_shifts: Added to the logits of P(y > 0), P(y > 1), P(y > 2) after that: biases learn slowly.
        thresholds: {preset: {output: probability}}; an output that is not named has 0.5.
        per_source: {source: thresholds of its own in that form}.
        tuned_on: What the thresholds were tuned on, in words; "" where they were not.
    """

    temperatures: dict[str, float] = field(default_factory=dict)
    level_shifts: tuple[float, ...] = (0.0, 0.0, 0.0)
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    per_source: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    tuned_on: str = ""

    @property
    def version(self) -> str:
        """Changes with any threshold or temperature; `untuned` where there is none."""
        if not self.thresholds and not self.temperatures:
            return "untuned"
        text = json.dumps(
            [self.temperatures, self.level_shifts, self.thresholds, self.per_source], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def threshold(self, output: str, preset: str = "balanced", source: str | None = None) -> float:
        """The probability from which an output is flagged.

        Args:
            output: A category, `unsafe`, `severity>1`, `severity>2` or `refusal`.
            preset: One of PRESETS.
            source: A source with thresholds of its own; None for those of all.

        Raises:
            UserError: The preset is unknown.
        """
        if preset not in PRESETS:
            raise UserError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        table = self.per_source.get(source or "", self.thresholds)
        return table.get(preset, {}).get(output, 0.5)


@dataclass(frozen=True)
class ModeratorSpec:
    """What a moderator predicts and how it reads.

    Attributes:
        label_set: The name of its categories' label set; "" where it has no categories.
        categories: Their names, in the order of the outputs.
        refusal: Whether it has a head for refusals.
        sources: Sources with a head of their own; () for one head.
        pooling: last, cls or mean.
        pairs: Whether prompt and response are read as a pair of texts.
        template: The conversation template.
        max_length: Longest prompt + response (tokens); of a longer one head and tail are read.
        buckets: Buckets of the hashed n-grams; 0 for none.
        rate: `NgramLayer.rate`.
    """

    label_set: str = ""
    categories: tuple[str, ...] = ()
    refusal: bool = False
    sources: tuple[str, ...] = ()
    pooling: str = "last"
    pairs: bool = False
    template: str = "auto"
    max_length: int = 512
    buckets: int = 0
    rate: float = 1.0

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of a moderator's logits: categories, P(y > 0), P(y > 1), P(y > 2), refusal."""
        return (*self.categories, *SEVERITY, *((REFUSAL,) if self.refusal else ()))

    @property
    def heads(self) -> dict[str, slice]:
        """{head: its places in the outputs}."""
        k = len(self.categories)
        places = {"categories": slice(0, k)} if k else {}
        places["severity"] = slice(k, k + LEVELS - 1)
        return places | ({REFUSAL: slice(k + LEVELS - 1, k + LEVELS)} if self.refusal else {})

    def source_index(self, source: str | None) -> int:
        """The number of a source's head; -1, the mean of all, for None.

        Raises:
            UserError: The moderator has heads of its own for sources, and none for this one.
        """
        if source is None or not self.sources:
            return -1
        if source not in self.sources:
            raise UserError(f"source: expected one of {', '.join(self.sources)}, got {source!r}")
        return self.sources.index(source)


def write_spec(folder: str | Path, spec: ModeratorSpec, calibration: Calibration) -> None:
    """Writes moderation.json."""
    from ..runtime import disk

    values = {"format": FORMAT, **asdict(spec), **asdict(calibration), "version": calibration.version}
    disk.write_text(Path(folder) / FILE, json.dumps(values, indent=1) + "\n")


def read_spec(folder: str | Path, path: str | Path | None = None) -> tuple[ModeratorSpec, Calibration]:
    """Reads moderation.json.

    Args:
        folder: The moderator's local folder.
        path: The moderator as the user named it, for messages.

    Raises:
        UserError: There is none, or it is not what `write_spec` writes.
    """
    path, file = path or folder, Path(folder) / FILE
    if not file.is_file():
        raise UserError(
            f"{path}: expected a moderator (a folder with {FILE}), got a model without one; "
            "`saferlhf-fast moderation train` makes one"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: {FILE} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        got = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{path}: {FILE}: format: expected {FORMAT}, got {got}")
    try:
        spec, calibration = _built(ModeratorSpec, values), _built(Calibration, values)
        numbers = [*calibration.temperatures.values(), *calibration.level_shifts]
        numbers += [v for names in calibration.thresholds.values() for v in names.values()]
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in numbers):
            raise TypeError("temperatures and thresholds: expected numbers")
        if len(calibration.level_shifts) != LEVELS - 1:
            raise TypeError(f"level_shifts: expected {LEVELS - 1} numbers")
        if min(calibration.temperatures.values(), default=1.0) <= 0:
            raise TypeError("temperatures: expected numbers above 0")
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: {FILE}: {error}") from error
    return spec, calibration


def _built(cls: Any, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from those of the values that it has fields for."""
    known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in known.items()})
