"""Records for a moderator: a prompt, a response, and what is known about the response.

Read by their columns: answers with `is_safe`, categories and a severity (PKU-SafeRLHF-QA, BeaverTails), the
two answers of a dual preference (PKU-SafeRLHF), answers with `label` Safe or Unsafe (CS_RLHF), and texts with
OpenAI's letters (S, H, V …). A label that is missing or null is unknown, never "no".
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

from saferlhf_fast.config.setting_types import Data
from saferlhf_fast.data.files import Row, describe
from saferlhf_fast.data.harm_taxonomy import TAXONOMIES
from saferlhf_fast.data.records import UNKNOWN, UNSAFE, HarmLabel, LabelFault, as_flag, harm_label, text_field
from saferlhf_fast.data.sources import load_sources
from saferlhf_fast.errors import UserError

OPENAI_LETTERS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
"""The labels of OpenAI's moderation data set."""


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
    records = []
    for item in load_sources(sources, seed):
        name = PurePath(item.source.path).name.split(".")[0]
        for row in item.rows:
            try:
                records += list(_records(row, name))
            except LabelFault as error:
                raise UserError(f"{row.where}: {error}") from error
    return records


def _records(row: Row, source: str) -> Iterator[ModerationRecord]:
    fields = row.fields
    if "response_0" in fields:
        for i in ("0", "1"):
            names = (f"is_response_{i}_safe", f"response_{i}_harm_category", f"response_{i}_severity_level")
            yield _judged(row, f"response_{i}", harm_label(row, *names, "pku"), source)
    elif "is_safe" in fields and "category" in fields:
        yield _judged(
            row, "response", harm_label(row, "is_safe", "category", "severity", "beavertails"), source
        )
    elif "is_safe" in fields:
        label = harm_label(row, "is_safe", "harm_category", "severity_level", "pku")
        yield _judged(row, "response", label, source)
    elif "label" in fields:
        yield _safe_or_unsafe(row, source)
    elif set(OPENAI_LETTERS) & set(fields):
        yield _openai(row, source)
    else:
        raise UserError(
            f"{row.where}: expected a labelled answer (is_safe, label, response_0 or OpenAI's letters), got "
            f"the columns {', '.join(map(str, fields)) or '(none)'}"
        )


def _judged(row: Row, response: str, label: HarmLabel, source: str) -> ModerationRecord:
    names = TAXONOMIES[label.taxonomy] if label.taxonomy else ()
    return ModerationRecord(
        text_field(row, "prompt"),
        text_field(row, response),
        None if label.sign == UNKNOWN else label.sign == UNSAFE,
        dict(zip(names, label.categories)),
        label.severity,
        None,
        source,
        label.taxonomy or "",
    )


def _safe_or_unsafe(row: Row, source: str) -> ModerationRecord:
    word = row.fields["label"]
    known = {"safe": False, "unsafe": True}.get(str(word).strip().lower())
    if known is None and word is not None:
        raise UserError(f"{row.where}, field 'label': expected Safe or Unsafe, got {describe(word)}")
    texts = text_field(row, "prompt"), text_field(row, "response")
    return ModerationRecord(*texts, unsafe=known, source=source)


def _openai(row: Row, source: str) -> ModerationRecord:
    flags = {name: as_flag(row, row.fields[name]) for name in OPENAI_LETTERS if name in row.fields}
    categories = {name: flags.get(name) for name in OPENAI_LETTERS}
    return ModerationRecord(
        text_field(row, "prompt"), "", categories=categories, source=source, label_set="openai-letters"
    )
