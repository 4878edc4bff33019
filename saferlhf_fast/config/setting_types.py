"""Types of the values of settings: numbers with limits, models, data sources and scorers.

Also the decorator of all settings classes. Nothing here imports torch.
"""

import functools
from typing import TYPE_CHECKING, Annotated, Literal, get_args, overload

import pydantic.dataclasses
from pydantic import ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]

if TYPE_CHECKING:
    # Type checkers accept only classes of this decorator in dataclasses.fields and asdict.
    from dataclasses import dataclass as settings_class
else:
    settings_class = functools.partial(
        pydantic.dataclasses.dataclass,
        config=ConfigDict(extra="forbid", use_attribute_docstrings=True, strict=False, allow_inf_nan=False),
    )

ModelPath = Annotated[str, Field(json_schema_extra={"input": "model"})]
"""A model's folder or Hub name; inputs.py recognises models by this type, by Scorer and by ScorerSpec."""


@settings_class(frozen=True)
class Source:
    """One data source of a mixture."""

    path: str
    """A file (.json, .jsonl, .jsonl.gz, .csv, .parquet), a folder of such files, or a Hub data set name."""
    format: str = "auto"
    """Record format: auto (detected from the columns), or a name from docs/data.md (pku, alpaca, hh …)."""
    split: str = "train"
    """Split of a Hub data set or of a folder that has splits."""
    name: str | None = None
    """Configuration of a Hub data set (e.g. alpaca-7b)."""
    count: PositiveInt | None = None
    """Take this many rows, drawn with the stage's seed; all when not given (rows)."""
    proportion: Positive | None = None
    """Weight of this source in the mixture, relative to the others; without any weight all rows are used."""
    columns: dict[str, str] | None = None
    """Columns to rename before the format is detected: {"name in the file": "expected name"}."""


Data = str | Source | list[str | Source]

REWARD, COST = PAIR = ("reward", "cost")
"""The scores of a response: how helpful and how harmful it is. In this order wherever both are named."""

ScorerKind = Literal["score_model", "moderator"]
SCORER_KINDS: tuple[str, ...] = get_args(ScorerKind)
"""What can score a response; rollout/scorers.py loads each."""


@settings_class(frozen=True)
class ScorerSpec:
    """What scores a response."""

    path: str
    """A score model or a moderator: a folder or a Hub name."""
    kind: ScorerKind = "score_model"
    """What scores: score_model, a model with a scalar head that reads prompt and response; or moderator."""
    signal: Literal["expected_severity", "unsafe_logit"] | None = None
    """Of a moderator: expected_severity, 0 to 3 (when not given), or unsafe_logit, above 0 where the answer
    is flagged."""
    categories: list[str] | None = None
    """Of a moderator: harm counts only as far as one of these categories applies; all harm when not given."""
    refusal: NonNegative = 0.0
    """Of a moderator: added to the score times P(refusal), so that refusing is not free."""
    source: str | None = None
    """Of a moderator: the source whose heads and thresholds judge, where it has such."""


Scorer = str | ScorerSpec
"""A plain path is the path of a score model."""


@overload
def scorer_spec(scorer: Scorer) -> ScorerSpec: ...
@overload
def scorer_spec(scorer: None) -> None: ...
def scorer_spec(scorer: Scorer | None) -> ScorerSpec | None:
    """Returns the ScorerSpec of a setting of the type Scorer; None where it is not given."""
    return ScorerSpec(path=scorer) if isinstance(scorer, str) else scorer


# Settings that several stages have: their documentation is here, once.
PreferenceData = Annotated[
    Data, Field(description="Preference data: a path, a Hub name, or a list of sources.")
]
Output = Annotated[str, Field(description="Folder of the run; the trained model is in <output>/model.")]
