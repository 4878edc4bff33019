"""Formats of preference data: row -> Preference, two responses to one prompt. formats.py has the table."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from saferlhf_fast.data.files import Row, describe
from saferlhf_fast.data.messages import messages_field
from saferlhf_fast.data.records import (
    SAFE,
    UNSAFE,
    Dropped,
    HarmLabel,
    Message,
    Messages,
    Preference,
    assistant,
    bool_field,
    checked_text,
    choice_field,
    harm_label,
    text_field,
    user,
)
from saferlhf_fast.errors import UserError

FLAGS = (
    "reversed_also_present",
    "safe_response_also_labelled_unsafe",
    "unsafe_response_also_labelled_safe",
)


def pku(row: Row) -> Iterator[Preference]:
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


def pku_labels(row: Row) -> tuple[HarmLabel, ...]:
    """Returns the labels of both responses; v0's 7 fields have neither categories nor severities."""
    return tuple(
        harm_label(
            row, f"is_response_{i}_safe", f"response_{i}_harm_category", f"response_{i}_severity_level", "pku"
        )
        for i in (0, 1)
    )


def pku_single(row: Row) -> Iterator[Preference]:
    """PKU-SafeRLHF-single-dimension: one overall preference."""
    yield Preference(
        (user(text_field(row, "prompt")),),
        _two(row, "response_0", "response_1"),
        row.where,
        choice_field(row, "better_response_id", (0, 1)),
    )


def safe_over_unsafe(row: Row) -> Iterator[Preference]:
    """Pairs with exactly one safe answer; a flag is true when other labels contradict the row's."""
    # A list and no generator: the values of all flags are checked.
    set_flags = [bool_field(row, flag) for flag in FLAGS if flag in row.fields]
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


def alpaca_eval(row: Row) -> Iterator[Preference]:
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
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 1 <= number <= 2:
        raise UserError(
            f"{row.where}, field '{name}preference': expected a number from 1 to 2, "
            f"got {describe(preference)}"
        )
    return number


def auto_j(row: Row) -> Iterator[Preference]:
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


def hh(row: Row) -> Iterator[Preference | Dropped]:
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
    if any(key not in ("role", "content", "weight") for item in (chosen, rejected) for key in item[-1]):
        return Dropped("an answer with tool calls or with thoughts apart from its text", row.where)
    if chosen[:-1] != rejected[:-1]:
        return Dropped("the two dialogues differ before the last answer", row.where)
    return Preference(chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"]), row.where, 0)


def preference(row: Row) -> Iterator[Preference | Dropped]:
    """TRL's preference format: chosen and rejected, as texts with a prompt, or as messages."""
    name = "conversations" if "prompt" not in row.fields and "conversations" in row.fields else "prompt"
    prompt = row.fields.get(name)
    if isinstance(row.fields.get("chosen"), str):
        messages = messages_field(row, name) if isinstance(prompt, list) else (user(text_field(row, name)),)
        yield _last_answers(row, *((*messages, assistant(text)) for text in _two(row, "chosen", "rejected")))
        return
    sides = [messages_field(row, side) for side in ("chosen", "rejected")]
    if isinstance(prompt, list):
        sides = [messages_field(row, name) + side for side in sides]
    elif name in row.fields and len(sides[0]) == len(sides[1]) == 1:
        # Otherwise the dialogues repeat the prompt.
        sides = [(user(text_field(row, name)), *side) for side in sides]
    yield _last_answers(row, *sides)


def alpaca_preference(row: Row) -> Iterator[Preference]:
    """Alpaca's instruction and input with two answers."""
    yield Preference((user(instruction(row)),), _two(row, "chosen", "rejected"), row.where, 0)


def instruction(row: Row) -> str:
    """Returns instruction and input in one text, joined by a space as in safe-rlhf."""
    extra = text_field(row, "input", "")
    return f"{text_field(row, 'instruction')} {extra}" if extra else text_field(row, "instruction")
