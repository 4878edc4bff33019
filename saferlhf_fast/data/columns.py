"""Columns that change what a record means, beside those of its format; and columns that nobody reads.

A `system` column becomes the dialogue's system message, a `history` its first turns, `tools` what its chat
template shows, and a `label` (as in KTO
data) tells which answers are not learned. The columns of a source that neither its format nor this file reads
are reported once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saferlhf_fast.data import messages
from saferlhf_fast.data.files import Row, describe
from saferlhf_fast.data.formats import FORMATS, Format, is_meta
from saferlhf_fast.data.records import (
    Conversation,
    Dropped,
    Message,
    Messages,
    Prompt,
    Record,
    as_flag,
    assistant,
    checked_text,
    user,
)
from saferlhf_fast.data.tool_calls import tools_of
from saferlhf_fast.errors import UserError

SYSTEM = ("system", "system_prompt")
HISTORY = "history"
TOOLS = "tools"
LABELS = ("label", "kto_tag")
"""Columns that say whether a conversation's answer is wanted."""

UNWANTED = "the label says that the answer is not wanted"


@dataclass(frozen=True)
class ExtraColumns:
    """What the columns of one source mean beyond its format."""

    system: tuple[str, ...] = ()
    """Columns with a system message."""
    history: str | None = None
    """The column with earlier turns."""
    label: str | None = None
    """The column that is false where the answer is not wanted."""
    tools: str | None = None
    """The column with the tools that the template shows."""
    unread: tuple[str, ...] = ()
    """Columns that nothing reads; of messages also their keys ("messages[].mood")."""

    def apply(self, row: Row, record: Record | Dropped) -> Record | Dropped:
        """Returns the record of a row with what these columns say about it.

        Raises:
            UserError: One of the columns holds something else than it should.
        """
        if isinstance(record, Dropped):
            return record
        if self.label and isinstance(record, Conversation) and as_flag(row, _value(row, self.label)) is False:
            return Dropped(f"{UNWANTED} ({self.label})", record.where)
        before = _history(row, self.history) if self.history else ()
        system = self._system(row)
        tools = tools_of(row) if self.tools else []
        if not before and not system and not tools:
            return record
        own, rest = _split_system(record.messages)
        if system and any(item["content"].strip() != system.strip() for item in own):
            raise UserError(
                f"{row.where}: the column '{self.system[0]}' and the dialogue have two different system "
                f"messages; expected one"
            )
        if system:
            own = ({"role": "system", "content": system},)
        first, *others = (*own, *before, *rest)
        first = {**first, "tools": tools} if tools else first
        record = replace(record, messages=(first, *others))
        if isinstance(record, Prompt):
            used = (*self.system, self.history, self.tools)
            return replace(record, meta={k: v for k, v in record.meta.items() if k not in used})
        return record

    def _system(self, row: Row) -> str:
        texts = {
            name: checked_text(row, name, value)
            for name in self.system
            if (value := _value(row, name)) is not None
        }
        different = {text.strip() for text in texts.values() if text.strip()}
        if len(different) > 1:
            raise UserError(
                f"{row.where}: the columns {', '.join(texts)} differ; expected one system message"
            )
        return next((text for text in texts.values() if text.strip()), "")


def extra_columns(rows: Sequence[Row], form: Format, labels: bool = False) -> ExtraColumns:
    """Returns what the columns of a source mean beyond its format.

    Args:
        rows: All rows of the source, with messages as lists.
        form: Their format.
        labels: The harm labels are read too.
    """
    columns = dict.fromkeys(str(column) for row in rows for column in row.fields)
    read = {*form.columns, *form.read_columns(columns), *(form.label_columns if labels else ())}
    system: tuple[str, ...] = ()
    history = tools = None
    if form is not FORMATS["text"]:  # a document is no dialogue
        tools = TOOLS
        system = tuple(name for name in SYSTEM if name in columns and name not in read)
        if HISTORY not in read and _has_turns(row.fields.get(HISTORY) for row in rows):
            history = HISTORY
    label = None
    if form.record is Conversation:
        label = next((name for name in LABELS if name not in read and _are_flags(rows, name)), None)
    read.update(system, filter(None, (history, label, tools)))
    if form.record is Prompt:
        read.update(name for name in columns if any(is_meta(row.fields.get(name)) for row in rows))
    unread = [name for name in columns if name not in read and not _is_empty(rows, name)]
    for name in messages.COLUMNS:
        if name in read:
            unread += messages.unread_keys(name, (row.fields.get(name) for row in rows))
    return ExtraColumns(system, history, label, tools, tuple(unread))


def _value(row: Row, name: str) -> Any:
    """Returns a value; None where it is missing, NaN (a gap of pandas) or, in CSV, empty."""
    value = row.fields.get(name)
    is_gap = value != value or row.untyped and isinstance(value, str) and not value.strip()
    return None if is_gap else value


def _is_empty(rows: Iterable[Row], name: str) -> bool:
    """Tells whether a column has no value in any row."""
    return all(_value(row, name) is None for row in rows)


def _are_flags(rows: Iterable[Row], name: str) -> bool:
    """Tells whether a column has values, and all of them are true or false."""
    values = [(row, value) for row in rows if (value := _value(row, name)) is not None]
    return bool(values) and all(as_flag(row, value) is not None for row, value in values)


def _has_turns(values: Iterable[Any]) -> bool:
    """Tells whether a column holds dialogues: other columns have this name too."""
    return any(isinstance(messages.from_text(v) if isinstance(v, str) else v, list) for v in values)


def _history(row: Row, name: str) -> Messages:
    """Returns the earlier turns of a row: [[question, answer], …] or messages."""
    value = _value(row, name)
    turns = messages.from_text(value) if isinstance(value, str) else value
    if not turns:
        return ()
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return messages.messages_field(replace(row, fields={name: turns}), name)
    earlier: list[Message] = []
    for i, turn in enumerate(turns if isinstance(turns, list) else [turns]):
        if (
            not isinstance(turn, (list, tuple))
            or len(turn) != 2
            or not all(isinstance(text, str) for text in turn)
        ):
            raise UserError(
                f"{row.where}, field '{name}[{i}]': expected [question, answer], got {describe(turn)}"
            )
        question, answer = (checked_text(row, f"{name}[{i}]", text) for text in turn)
        earlier += [user(question), assistant(answer)]
    return tuple(earlier)


def _split_system(dialogue: Messages) -> tuple[Messages, Messages]:
    """Returns (system messages at the beginning, the rest)."""
    n = next((i for i, item in enumerate(dialogue) if item["role"] != "system"), len(dialogue))
    return dialogue[:n], dialogue[n:]
