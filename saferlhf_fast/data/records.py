"""The three kinds of record that everything else works with, and the checks of a row's fields.

Every format (formats.py) turns a row into some of these, or into Dropped with a reason. A mistake in the file
(a field that is missing, of another type, or out of range) is a UserError that names file, row and field. A
row that is correct but of no use (a tie, a dialogue without an answer) is Dropped and counted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saferlhf_fast.data.files import Row, describe, shorten
from saferlhf_fast.data.harm_taxonomy import SEVERITIES, TAXONOMIES
from saferlhf_fast.errors import UserError

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}, and fields that chat templates read.

These are tool_calls (tool_calls.py), reasoning_content …; in the first message also the `tools` of the
dialogue. An assistant's turn that is not learned has `weight` 0.
"""

Messages = tuple[Message, ...]
"""A dialogue."""

UNSAFE, SAFE, UNKNOWN = 1, -1, 0
"""Safety signs, as in the cost loss: C > 0 means unsafe."""


@dataclass(frozen=True, slots=True)
class HarmLabel:
    """The annotators' labels of the harm of one response; a label that is missing does not mean "no harm"."""

    sign: int = UNKNOWN
    """UNSAFE, SAFE or UNKNOWN."""
    severity: int | None = None
    """0 to 3 (harm_taxonomy.SEVERITIES); None: unknown."""
    taxonomy: str | None = None
    """The taxonomy of the categories, a key of harm_taxonomy.TAXONOMIES; None: no category is labelled."""
    categories: tuple[bool | None, ...] = ()
    """One flag for each category of the taxonomy, in its order; None: unknown."""

    @property
    def contradicts_itself(self) -> bool:
        """True when one of safety, severity and categories means harm and another one means no harm."""
        harmful: set[bool] = set()
        if self.sign != UNKNOWN:
            harmful.add(self.sign == UNSAFE)
        if self.severity is not None:
            harmful.add(self.severity > 0)
        if True in self.categories:
            harmful.add(True)
        elif self.categories and None not in self.categories:
            harmful.add(False)
        return len(harmful) > 1


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue to imitate: its assistant turns are learned, except those with the weight 0."""

    messages: Messages
    where: str
    labels: tuple[HarmLabel, ...] = ()
    """(HarmLabel of the last answer,); () when labels were not requested."""
    is_document: bool = False
    """The one message is a text that no template is applied to."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A dialogue that waits for an answer: its last turn is the user's."""

    messages: Messages
    where: str
    meta: dict[str, Any] = field(default_factory=dict)
    """Other short fields of the row, e.g. the category."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two responses to one prompt, and what is known about them."""

    messages: Messages
    """The prompt; its last turn is the user's."""
    responses: tuple[str, str]
    """(text of response 0, text of response 1)."""
    where: str
    better: int | None = None
    """Which response helps more, 0 or 1; None: unknown."""
    safer: int | None = None
    """Which response is safer, 0 or 1; None: unknown."""
    signs: tuple[int, int] = (UNKNOWN, UNKNOWN)
    """UNSAFE or SAFE for each response."""
    tie: bool = False
    """The label says that neither is better."""
    flagged: bool = False
    """The file says that other labels contradict those of this row."""
    labels: tuple[HarmLabel, ...] = ()
    """(HarmLabel of response 0, HarmLabel of response 1); () when labels were not requested."""


class LabelFault(Exception):
    """A label with an impossible value.

    Its text is the reason for which the record is dropped; equal faults have equal texts.
    """


@dataclass(frozen=True, slots=True)
class Dropped:
    """A correct row of no use, and the reason. It gives no prompt either."""

    reason: str
    where: str


Record = Conversation | Preference | Prompt


def user(text: str) -> Message:
    """Returns a user turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Returns an assistant turn."""
    return {"role": "assistant", "content": text}


def text_field(row: Row, name: str, default: str | None = None) -> str:
    """Returns a field that is text; where it is missing or null, the default.

    Raises:
        UserError: The field is not text, or is missing and has no default.
    """
    value = row.fields.get(name)
    if value is None and default is not None:
        return default
    if name not in row.fields:
        raise UserError(
            f"{row.where}: no field '{name}'; the row has {', '.join(map(str, row.fields)) or 'no fields'}"
        )
    return checked_text(row, name, value)


def checked_text(row: Row, name: str, value: object) -> str:
    """Returns `value`, which must be text that a tokenizer can take.

    Args:
        row: The row that it is from.
        name: The field, for messages.
        value: The value of the field.

    Raises:
        UserError: It is not text, or has half a surrogate pair.
    """
    if not isinstance(value, str):
        raise UserError(f"{row.where}, field '{name}': expected text, got {describe(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
            raise UserError(
                f"{row.where}, field '{name}': expected Unicode text, got the lone surrogate "
                f"{ascii(value[error.start])[1:-1]}"
            ) from error
    return value


def choice_field(row: Row, name: str, options: Sequence[int]) -> int:
    """Returns a field that is one of a few integers: 1, 1.0 (as pandas writes a column with gaps), CSV's "1".

    Raises:
        UserError: The field is missing or none of them.
    """
    expected = " or ".join(map(str, options))
    value = present(row, name, expected)
    value = _whole_number(row, value)
    if isinstance(value, bool) or not isinstance(value, int) or value not in options:
        raise UserError(f"{row.where}, field '{name}': expected {expected}, got {describe(value)}")
    return value


def bool_field(row: Row, name: str) -> bool:
    """Returns a field that is true or false: also 1, 1.0, 0, 0.0, and in CSV their texts.

    Raises:
        UserError: The field is missing or neither.
    """
    value = present(row, name, "true or false")
    flag = as_flag(row, value)
    if flag is None:
        raise UserError(f"{row.where}, field '{name}': expected true or false, got {describe(value)}")
    return flag


def as_flag(row: Row, value: object) -> bool | None:
    """Returns what a value of a row means as true or false; None where it is neither."""
    if row.untyped and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    value = _whole_number(row, value)
    return {0: False, 1: True}.get(value) if isinstance(value, int) else None


def _whole_number(row: Row, value: object) -> object:
    """Returns the integer that a value means, such as 1 for 1.0 and CSV's "1.0"; other values as they are."""
    if row.untyped and isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,15}(\.0*)?", value.strip()):
        return int(float(value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def harm_label(row: Row, safe: str, categories: str, severity: str, taxonomy: str) -> HarmLabel:
    """Returns the label of one response.

    Args:
        row: The row.
        safe: The field that is true when the response is safe.
        categories: The field with an object {category: true or false}; categories that it does not name are
            unknown.
        severity: The field with the severity.
        taxonomy: The taxonomy of the categories, a key of harm_taxonomy.TAXONOMIES.

    Returns:
        What is known; a field that is missing or null is unknown.

    Raises:
        LabelFault: A severity out of 0 to 3, a category that is not in the taxonomy, a flag that is not true
            or false.
    """
    is_safe, level, flags = (_label_field(row, name) for name in (safe, severity, categories))
    level = _whole_number(row, level)
    flag = as_flag(row, is_safe)
    if is_safe is not None and flag is None:
        raise LabelFault(f"field '{safe}' is not true or false")
    if level is not None and (
        isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < len(SEVERITIES)
    ):
        raise LabelFault(f"field '{severity}' is not a severity of 0 to {len(SEVERITIES) - 1}")
    sign = UNKNOWN if flag is None else SAFE if flag else UNSAFE
    if flags is None:
        return HarmLabel(sign, level)
    return HarmLabel(sign, level, taxonomy, _category_flags(flags, categories, taxonomy))


def _category_flags(flags: object, name: str, taxonomy: str) -> tuple[bool | None, ...]:
    """Returns a field's flags in the order of the taxonomy."""
    if not isinstance(flags, Mapping):
        raise LabelFault(f"field '{name}' is not an object of categories with true or false")
    names = TAXONOMIES[taxonomy]
    for category, flag in flags.items():
        if category not in names:
            raise LabelFault(f"field '{name}' has a category that {taxonomy} has not: {shorten(category)}")
        if flag is not None and not isinstance(flag, bool):
            raise LabelFault(f"field '{name}.{category}' is not true or false")
    return tuple(flags.get(category) for category in names)


def _label_field(row: Row, name: str) -> Any:
    """Returns the value of a label; None where it is unknown. CSV has no null, only empty text."""
    value = row.fields.get(name)
    return None if row.untyped and isinstance(value, str) and not value.strip() else value


def present(row: Row, name: str, expected: str) -> Any:
    """Returns the value of a field; UserError names `expected` where the row does not have it."""
    if name not in row.fields:
        raise UserError(
            f"{row.where}: no field '{name}' (expected {expected}); "
            f"the row has {', '.join(map(str, row.fields)) or 'no fields'}"
        )
    return row.fields[name]


def prompt_of(messages: Sequence[Message]) -> Messages:
    """Returns the messages up to the last user turn; () when there is none."""
    last = max((i for i, item in enumerate(messages) if item["role"] == "user"), default=-1)
    return tuple(messages[: last + 1])


def prompt_text(messages: Sequence[Message]) -> str:
    """Returns a prompt as one text, which is equal for equal prompts.

    A single turn is its content; a dialogue has the names of the roles.
    """
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{item['role']}: {item['content']}" for item in messages)
