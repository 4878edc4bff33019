"""Records for a moderator: a prompt, a response, and what is known about the response.

Read from every form of labelled.py. A label that is missing or null is unknown, never "no".
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

from saferlhf_fast.config.setting_types import Data
from saferlhf_fast.data.files import Row
from saferlhf_fast.data.labelled import (
    LABEL_SETS,
    LABELLED_FORMS,
    OPENAI_LETTERS,
    Answer,
    LabelledRow,
    form_of_columns,
    read_labelled,
)
from saferlhf_fast.data.sources import load_sources
from saferlhf_fast.errors import UserError

__all__ = ["OPENAI_LETTERS", "ModerationRecord", "moderation_records", "read_moderation_records"]


@dataclass(frozen=True, slots=True)
class ModerationRecord:
    """A prompt, a response, and its labels."""

    prompt: str
    response: str
    """The judged text; "" where the prompt alone is judged."""
    unsafe: bool | None = None
    categories: dict[str, bool | None] = field(default_factory=dict)
    """{category: whether it applies}; None: unknown."""
    severity: int | None = None
    """0 to 3; None: unknown."""
    refusal: bool | None = None
    source: str = ""
    """The name of the source: its file's or data set's last name."""
    label_set: str = ""
    """The label set of the categories."""


def read_moderation_records(sources: Data, seed: int = 0) -> list[ModerationRecord]:
    """Reads records of some sources, in their order.

    Args:
        sources: A recipe's `data`.
        seed: Seed of the rows that sources with a count or a proportion draw.

    Raises:
        UserError: A source cannot be read, or a row is in none of the forms.
    """
    records: list[ModerationRecord] = []
    for item in load_sources(sources, seed):
        name = PurePath(item.source.path).name.split(".")[0]
        # a source may hold rows of several forms, as a mixture of files in a folder does
        forms: dict[tuple[str, ...], str | None] = {}
        for row in item.rows:
            columns = tuple(row.fields)
            if columns not in forms:
                forms[columns] = form_of_columns(columns)
            form = forms[columns]
            if form is None or form == "single":
                raise _unlabelled(row)
            found = list(moderation_records(read_labelled(row, form), name))
            if not found:
                raise _unlabelled(row)
            records += found
    return records


def moderation_records(row: LabelledRow, source: str) -> Iterator[ModerationRecord]:
    """Yields a record for each answer of a row, or one for its prompt where that alone is labelled.

    Args:
        row: The row.
        source: The name of its source.
    """
    for answer in row.answers:
        yield _record(row, answer, source)
    if not row.answers and row.prompt_label and row.prompt_label.label_set == "openai-letters":
        yield _record(row, row.prompt_label, source)


def _record(row: LabelledRow, answer: Answer, source: str) -> ModerationRecord:
    return ModerationRecord(
        row.prompt,
        answer.text,
        answer.unsafe,
        dict(zip(LABEL_SETS.get(answer.label_set, ()), answer.categories)),
        answer.severity,
        answer.refusal,
        source,
        answer.label_set,
    )


def _unlabelled(row: Row) -> UserError:
    return UserError(
        f"{row.where}: expected a labelled answer in one of the forms {', '.join(LABELLED_FORMS)}, got "
        f"the columns {', '.join(map(str, row.fields)) or '(none)'}"
    )
