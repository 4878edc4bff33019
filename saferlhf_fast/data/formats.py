"""Record formats: row -> Conversation, Preference or Prompt. One parser per format; FORMATS is the table.

docs/data.md shows an example of each. A format is detected from the columns of a source, the most specific
one first; a recipe can name it (`format:`). Parsers are generators: a row may have several records. Columns
that any format may have (system, history, label) are read in columns.py.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from saferlhf_fast.data.files import Row, describe, shorten
from saferlhf_fast.data.messages import messages_field
from saferlhf_fast.data.preference_formats import (
    FLAGS,
    alpaca_eval,
    alpaca_preference,
    auto_j,
    hh,
    instruction,
    pku,
    pku_labels,
    pku_single,
    preference,
    safe_over_unsafe,
)
from saferlhf_fast.data.records import (
    UNKNOWN,
    Conversation,
    Dropped,
    HarmLabel,
    LabelFault,
    Messages,
    Preference,
    Prompt,
    Record,
    assistant,
    harm_label,
    prompt_of,
    text_field,
    user,
)
from saferlhf_fast.errors import UserError

PROMPT_COLUMNS = ("prompt", "goal", "question", "instruction")
"""Columns that may hold the prompt in the format `prompts`, in this order."""


def _alpaca(row: Row) -> Iterator[Conversation]:
    yield Conversation((user(instruction(row)), assistant(text_field(row, "output"))), row.where)


def _alpaca_seed(row: Row) -> Iterator[Conversation]:
    """Alpaca's seed tasks: one instruction with several instances."""
    instances = row.fields.get("instances")
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances):
        raise UserError(
            f"{row.where}, field 'instances': expected a list of objects, got {describe(instances)}"
        )
    for item in instances:
        fields = {"instruction": row.fields.get("instruction"), **item}
        yield from _alpaca(Row(fields, row.where, row.untyped))


def _messages(row: Row) -> Iterator[Conversation | Dropped]:
    yield _dialogue(row, messages_field(row, "messages"))


def _sharegpt(row: Row) -> Iterator[Conversation | Dropped]:
    yield _dialogue(row, messages_field(row, "conversations"))


def _dialogue(row: Row, messages: Messages) -> Conversation | Dropped:
    turns = [item for item in messages if item["role"] == "assistant"]
    if not turns:
        return Dropped("no assistant turn", row.where)
    if all(item.get("weight") == 0 for item in turns):
        return Dropped("all assistant turns have the weight 0", row.where)
    return Conversation(messages, row.where)


def _prompt_completion(row: Row) -> Iterator[Conversation | Dropped]:
    """TRL's prompt and completion, as texts or as messages."""
    sides = [
        messages_field(row, name)
        if isinstance(row.fields.get(name), (list, dict))
        else (as_message(text_field(row, name)),)
        for name, as_message in (("prompt", user), ("completion", assistant))
    ]
    yield _dialogue(row, sides[0] + sides[1])


def _qa(row: Row) -> Iterator[Conversation]:
    yield Conversation((user(text_field(row, "prompt")), assistant(text_field(row, "response"))), row.where)


def _qa_labels(row: Row) -> tuple[HarmLabel, ...]:
    """Reads PKU-SafeRLHF-QA's `harm_category` and `severity_level`, or BeaverTails' `category` of flags.

    A `category` that is no object is another data set's column and is not read.
    """
    if "harm_category" not in row.fields and isinstance(row.fields.get("category"), dict):
        return (harm_label(row, "is_safe", "category", "severity_level", "beavertails"),)
    return (harm_label(row, "is_safe", "harm_category", "severity_level", "pku"),)


def _text(row: Row) -> Iterator[Conversation]:
    """TRL's language modelling: a text to learn as it is, from its first token to its last."""
    yield Conversation((assistant(text_field(row, "text")),), row.where, is_document=True)


def is_meta(value: object) -> bool:
    """Tells whether a prompt keeps the value of another column."""
    is_short = isinstance(value, str) and len(value) <= 200
    return is_short or isinstance(value, (int, float)) and abs(value) < 10**100


def _prompts(row: Row) -> Iterator[Prompt | Dropped]:
    """A list of prompts; other short fields (category, label, type …) become their `meta`."""
    name = next((name for name in PROMPT_COLUMNS if name in row.fields), "prompt")
    read, texts = {name}, row.fields.get(name)
    if isinstance(texts, list):
        messages = messages_field(row, name)
    elif name == "instruction":  # Alpaca's, whose input belongs to the prompt
        messages = (user(instruction(row)),)
        read.add("input")
    else:
        messages = (user(text_field(row, name)),)
    meta = {key: value for key, value in row.fields.items() if key not in read and is_meta(value)}
    prompt = prompt_of(messages)
    yield Prompt(prompt, row.where, meta) if prompt else Dropped("no user turn", row.where)


@dataclass(frozen=True)
class Format:
    """How a format is detected and read."""

    columns: tuple[str, ...]
    """It is this format when a source has all of these columns."""
    parse: Callable[[Row], Iterator[Record | Dropped]]
    """Row -> its records."""
    record: type[Record]
    optional: tuple[str, ...] = ()
    """Other columns that `parse` reads where they are there."""
    labels: Callable[[Row], tuple[HarmLabel, ...]] | None = None
    """Row -> a HarmLabel for each response, or LabelFault; None where the record's signs are all there is."""
    label_columns: tuple[str, ...] = ()
    """The columns that `labels` reads."""

    def read_columns(self, columns: Collection[str]) -> tuple[str, ...]:
        """Returns the optional columns that are read where a source has `columns`."""
        if self.parse is _prompts:
            name = next((name for name in PROMPT_COLUMNS if name in columns), "prompt")
            return (name, "input") if name == "instruction" else (name,)
        if self.parse is preference and "prompt" in columns:
            return ("prompt",)
        if self.parse is alpaca_eval and "outputs" in columns:
            return ("outputs",)
        return self.optional


_PKU_LABELS = tuple(f"response_{i}_{name}" for i in (0, 1) for name in ("harm_category", "severity_level"))
FORMATS: dict[str, Format] = {
    "pku": Format(
        ("prompt", "response_0", "response_1", "is_response_0_safe"),
        pku,
        Preference,
        ("is_response_1_safe", "safer_response_id", "better_response_id"),
        pku_labels,
        _PKU_LABELS,
    ),
    "pku-single": Format(
        ("prompt", "response_0", "response_1"), pku_single, Preference, ("better_response_id",)
    ),
    "safe-over-unsafe": Format(
        ("prompt", "safe_response", "unsafe_response"), safe_over_unsafe, Preference, FLAGS
    ),
    "alpaca-eval": Format(
        ("instruction", "reference_output"), alpaca_eval, Preference, ("output", "preference")
    ),
    "auto-j": Format(("prompt", "response 1", "response 2"), auto_j, Preference, ("label",)),
    "alpaca-preference": Format(
        ("instruction", "chosen", "rejected"), alpaca_preference, Preference, ("input",)
    ),
    "hh": Format(("chosen", "rejected"), hh, Preference),
    "preference": Format(("chosen", "rejected"), preference, Preference, ("conversations",)),
    "messages": Format(("messages",), _messages, Conversation),
    "sharegpt": Format(("conversations",), _sharegpt, Conversation),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion, Conversation),
    "alpaca": Format(("instruction", "output"), _alpaca, Conversation, ("input",)),
    "alpaca-seed": Format(("instruction", "instances"), _alpaca_seed, Conversation),
    "qa": Format(
        ("prompt", "response"),
        _qa,
        Conversation,
        (),
        _qa_labels,
        ("is_safe", "category", "harm_category", "severity_level"),
    ),
    "prompts": Format((), _prompts, Prompt),
    "text": Format(("text",), _text, Conversation),
}
"""Name -> format, in the order in which they are tried; `text` is the last, after `prompts`."""


def with_labels(
    form: Format, row: Row, record: Conversation | Preference
) -> Conversation | Preference | Dropped:
    """Returns a record with the harm labels of its responses, or Dropped when one of them is impossible.

    Args:
        form: The format of the row.
        row: The row.
        record: The record that the format read from it.
    """
    try:
        labels = (
            form.labels(row) if form.labels else tuple(map(HarmLabel, getattr(record, "signs", (UNKNOWN,))))
        )
    except LabelFault as fault:
        return Dropped(str(fault), record.where)
    return replace(record, labels=labels)


def format_of(rows: Sequence[Row], name: str, label: str) -> tuple[str, Format]:
    """Returns the name of a source's format, and the format.

    Args:
        rows: All rows of the source.
        name: The name that the recipe gives, or auto.
        label: The source, for messages.

    Raises:
        UserError: There is no format of that name, or none with these columns.
    """
    if name != "auto":
        if name not in FORMATS:
            raise UserError(f"{label}: expected a format among auto, {', '.join(FORMATS)}, got '{name}'")
        return name, FORMATS[name]
    # The columns of all rows, not of the first one: a row that lacks a field is an error of that row, not
    # another format.
    columns = dict.fromkeys(column for row in rows for column in row.fields)
    for known, item in FORMATS.items():
        if not item.columns or known == "text" or not all(column in columns for column in item.columns):
            continue
        if known == "hh" and (
            "prompt" in columns
            or "conversations" in columns
            or not any(
                isinstance(row.fields.get("chosen"), str) and "Assistant:" in row.fields["chosen"]
                for row in rows
            )
        ):
            continue
        return known, item
    if any(column in columns for column in PROMPT_COLUMNS):
        return "prompts", FORMATS["prompts"]
    if "text" in columns:
        return "text", FORMATS["text"]
    raise UserError(
        f"{label}: no known format has the columns {shorten(', '.join(map(str, columns)), 160)}; "
        f"rename them (columns:) or see docs/data.md"
    )
