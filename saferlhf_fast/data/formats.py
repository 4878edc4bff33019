"""Record formats: row -> Conversation, Preference or Prompt. One parser per format; FORMATS is the table.

docs/data.md shows an example of each. A format is detected from the columns of a source, the most specific
one first; a recipe can name it (`format:`). Parsers are generators: a row may have several records.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saferlhf_fast.data.files import Row, describe, shorten
from saferlhf_fast.data.records import (
    SAFE,
    UNKNOWN,
    UNSAFE,
    Conversation,
    Dropped,
    HarmLabel,
    LabelFault,
    Message,
    Messages,
    Preference,
    Prompt,
    Record,
    assistant,
    bool_field,
    checked_text,
    choice_field,
    harm_label,
    messages_field,
    prompt_of,
    text_field,
    user,
)
from saferlhf_fast.errors import UserError

PROMPT_COLUMNS = ("prompt", "goal", "question", "instruction")
"""Columns that may hold the prompt in the format `prompts`, in this order."""

SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns that may hold a system text, in every format."""


def _pku(row: Row) -> Iterator[Preference]:
    """PKU-SafeRLHF dual record, 16 fields or v0's 7. A cost model needs no better_response_id."""
    better = choice_field(row, "better_response_id", (0, 1)) if "better_response_id" in row.fields else None
    safer = choice_field(row, "safer_response_id", (0, 1))
    is_safe = [bool_field(row, f"is_response_{i}_safe") for i in (0, 1)]
    yield Preference(
        (user(text_field(row, "prompt")),),
        _two(row, "response_0", "response_1"),
        row.where,
        better,
        safer,
        (SAFE if is_safe[0] else UNSAFE, SAFE if is_safe[1] else UNSAFE),
    )


def _pku_labels(row: Row) -> tuple[HarmLabel, ...]:
    """Returns the labels of both responses; v0's 7 fields have neither categories nor severities."""
    return tuple(
        harm_label(
            row, f"is_response_{i}_safe", f"response_{i}_harm_category", f"response_{i}_severity_level", "pku"
        )
        for i in (0, 1)
    )


def _pku_single(row: Row) -> Iterator[Preference]:
    """PKU-SafeRLHF-single-dimension: one overall preference."""
    yield Preference(
        (user(text_field(row, "prompt")),),
        _two(row, "response_0", "response_1"),
        row.where,
        choice_field(row, "better_response_id", (0, 1)),
    )


def _safe_over_unsafe(row: Row) -> Iterator[Preference]:
    """Pairs with exactly one safe answer; a flag is true when other labels contradict the row's."""
    flags = (
        "reversed_also_present",
        "safe_response_also_labelled_unsafe",
        "unsafe_response_also_labelled_safe",
    )
    # A list and no generator: the values of all flags are checked.
    set_flags = [bool_field(row, flag) for flag in flags if flag in row.fields]
    yield Preference(
        (user(text_field(row, "prompt")),),
        _two(row, "safe_response", "unsafe_response"),
        row.where,
        None,
        0,
        (SAFE, UNSAFE),
        flagged=any(set_flags),
    )


def _two(row: Row, first: str, second: str) -> tuple[str, str]:
    return text_field(row, first), text_field(row, second)


def _alpaca_eval(row: Row) -> Iterator[Preference]:
    """AlpacaEval: a reference and models' outputs with a preference from 1 (reference) to 2 (model)."""
    messages, reference = (user(text_field(row, "instruction")),), text_field(row, "reference_output")
    outputs = row.fields.get("outputs", {"": row.fields})  # without `outputs` the row itself is one
    if not isinstance(outputs, dict):
        raise UserError(
            f"{row.where}, field 'outputs': expected an object of models, got {describe(outputs)}"
        )
    for model, item in outputs.items():
        name = f"outputs.{model}." if model else ""
        if item is None and model:
            continue  # a Parquet file has every model's column in every row
        if not isinstance(item, dict):
            raise UserError(
                f"{row.where}, field 'outputs.{model}': expected output and preference, got {describe(item)}"
            )
        output = checked_text(row, f"{name}output", item.get("output"))
        number = _alpaca_eval_preference(row, name, item)
        tie = number == 1.5
        yield Preference(
            messages, (reference, output), row.where, None if tie else int(number > 1.5), tie=tie
        )


def _alpaca_eval_preference(row: Row, name: str, item: Mapping[str, Any]) -> float:
    preference = item.get("preference")
    try:
        is_text = isinstance(preference, (str, bool)) and not row.untyped
        number = math.nan if is_text or preference is None else float(preference)
    except (TypeError, ValueError):
        number = math.nan
    if not 1 <= number <= 2:
        raise UserError(
            f"{row.where}, field '{name}preference': expected a number from 1 to 2, "
            f"got {describe(preference)}"
        )
    return number


def _auto_j(row: Row) -> Iterator[Preference]:
    """Auto-J's pairwise test data: label 0 or 1, or 2 for a tie."""
    label = choice_field(row, "label", (0, 1, 2))
    yield Preference(
        (user(text_field(row, "prompt")),),
        _two(row, "response 1", "response 2"),
        row.where,
        None if label == 2 else label,
        tie=label == 2,
    )


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def _hh(row: Row) -> Iterator[Preference | Dropped]:
    """HH-RLHF: two complete dialogues as text that differ in the last answer."""
    chosen, rejected = (_hh_turns(text_field(row, name)) for name in ("chosen", "rejected"))
    yield _last_answers(row, chosen, rejected)


def _hh_turns(text: str) -> Messages:
    """Returns the messages in HH-RLHF's text; () when it is no dialogue."""
    before, *turns = _TURN.split(text.lstrip("\n"))
    if before.strip() or len(turns) < 2:
        return ()
    messages: list[Message] = []
    for speaker, content in zip(turns[::2], turns[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:  # a turn in two pieces
            messages[-1] = {"role": role, "content": messages[-1]["content"] + "\n\n" + content}
        else:
            messages.append({"role": role, "content": content})
    return tuple(messages)


def _last_answers(row: Row, chosen: Messages, rejected: Messages) -> Preference | Dropped:
    """Returns the preference between the last answers of two dialogues."""
    if any(
        len(item) < 2 or item[-1]["role"] != "assistant" or item[-2]["role"] not in ("user", "tool")
        for item in (chosen, rejected)
    ):
        return Dropped("not a dialogue that ends with an answer", row.where)
    if any(key not in ("role", "content") for item in (chosen, rejected) for key in item[-1]):
        return Dropped("an answer with tool calls or with thoughts apart from its text", row.where)
    if chosen[:-1] != rejected[:-1]:
        return Dropped("the two dialogues differ before the last answer", row.where)
    return Preference(chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"]), row.where, 0)


def _preference(row: Row) -> Iterator[Preference | Dropped]:
    """TRL's preference format: chosen and rejected, as texts with a prompt, or as messages."""
    if isinstance(row.fields.get("chosen"), str):
        prompt = row.fields.get("prompt")
        messages = (
            messages_field(row, "prompt") if isinstance(prompt, list) else (user(text_field(row, "prompt")),)
        )
        yield _last_answers(row, *((*messages, assistant(text)) for text in _two(row, "chosen", "rejected")))
        return
    sides = [messages_field(row, name) for name in ("chosen", "rejected")]
    name = "prompt" if "prompt" in row.fields else "conversations"
    if isinstance(row.fields.get(name), list):
        sides = [messages_field(row, name) + side for side in sides]
    elif name in row.fields and len(sides[0]) == len(sides[1]) == 1:
        # Otherwise the dialogues repeat the prompt.
        sides = [(user(text_field(row, name)), *side) for side in sides]
    yield _last_answers(row, *sides)


def _alpaca_preference(row: Row) -> Iterator[Preference]:
    """Alpaca's instruction and input with two answers."""
    yield Preference((user(_instruction(row)),), _two(row, "chosen", "rejected"), row.where, 0)


def _instruction(row: Row) -> str:
    """Returns instruction and input in one text, joined by a space as in safe-rlhf."""
    extra = text_field(row, "input", "")
    return f"{text_field(row, 'instruction')} {extra}" if extra else text_field(row, "instruction")


def _alpaca(row: Row) -> Iterator[Conversation]:
    history = row.fields.get("history") or []
    messages: list[Message] = []
    for i, turn in enumerate(history if isinstance(history, list) else [None]):
        if (
            not isinstance(turn, (list, tuple))
            or len(turn) != 2
            or not all(isinstance(text, str) for text in turn)
        ):
            raise UserError(
                f"{row.where}, field 'history[{i}]': expected [question, answer], got {describe(turn)}"
            )
        messages += [user(turn[0]), assistant(turn[1])]
    yield Conversation((*messages, user(_instruction(row)), assistant(text_field(row, "output"))), row.where)


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
    if not any(item["role"] == "assistant" for item in messages):
        return Dropped("no assistant turn", row.where)
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


def _prompts(row: Row) -> Iterator[Prompt | Dropped]:
    """A list of prompts; other short fields (category, label, type …) become their `meta`."""
    name = next((name for name in PROMPT_COLUMNS if name in row.fields), "prompt")
    messages = (
        messages_field(row, name)
        if isinstance(row.fields.get(name), list)
        else (user(text_field(row, name)),)
    )
    meta = {
        key: value
        for key, value in row.fields.items()
        if key not in (name, *SYSTEM_COLUMNS, "tools")
        and isinstance(value, (str, int, float, bool))
        and len(str(value)) <= 200
    }
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
    labels: Callable[[Row], tuple[HarmLabel, ...]] | None = None
    """Row -> a HarmLabel for each response, or LabelFault; None where the record's signs are all there is."""


FORMATS: dict[str, Format] = {
    "pku": Format(
        ("prompt", "response_0", "response_1", "is_response_0_safe"), _pku, Preference, _pku_labels
    ),
    "pku-single": Format(("prompt", "response_0", "response_1"), _pku_single, Preference),
    "safe-over-unsafe": Format(("prompt", "safe_response", "unsafe_response"), _safe_over_unsafe, Preference),
    "alpaca-eval": Format(("instruction", "reference_output"), _alpaca_eval, Preference),
    "auto-j": Format(("prompt", "response 1", "response 2"), _auto_j, Preference),
    "alpaca-preference": Format(("instruction", "chosen", "rejected"), _alpaca_preference, Preference),
    "hh": Format(("chosen", "rejected"), _hh, Preference),
    "preference": Format(("chosen", "rejected"), _preference, Preference),
    "messages": Format(("messages",), _messages, Conversation),
    "sharegpt": Format(("conversations",), _sharegpt, Conversation),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion, Conversation),
    "alpaca": Format(("instruction", "output"), _alpaca, Conversation),
    "alpaca-seed": Format(("instruction", "instances"), _alpaca_seed, Conversation),
    "qa": Format(("prompt", "response"), _qa, Conversation, _qa_labels),
    "prompts": Format((), _prompts, Prompt),
}
"""Name -> format, in the order in which they are tried."""


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
        if not item.columns or not all(column in columns for column in item.columns):
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
    raise UserError(
        f"{label}: no known format has the columns {shorten(', '.join(map(str, columns)), 160)}; "
        f"rename them (columns:) or see docs/data.md"
    )
