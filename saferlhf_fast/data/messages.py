"""Lists of messages in the shapes in which tools write them -> messages with role and content.

A list of messages may be a list of objects, one object, an object of lists (how `datasets` and Parquet store
a sequence of objects) or the text of one of these (how CSV files and some tools store it). A message may be
{"role", "content"} or ShareGPT's {"from", "value"}, and has one of the names below as its role.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from saferlhf_fast.data.files import Repeating, Row, describe, shorten
from saferlhf_fast.data.records import Message, Messages, as_flag, checked_text, present
from saferlhf_fast.data.tool_calls import KEPT, tool_calls_of
from saferlhf_fast.errors import UserError

COLUMNS = ("messages", "conversations", "prompt", "chosen", "rejected", "completion")
"""Columns that may hold messages; all but the first two may hold a plain text too."""

KEYS = ("role", "from", "content", "value", "weight", "train", "tool_calls", "function_call", *KEPT)
"""The keys of a message that are read."""

ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": (
        *("assistant", "gpt", "model", "bot", "chatbot", "ai", "llm", "agent"),
        *("chatgpt", "gpt-4", "gpt4", "bing", "bard", "claude"),
    ),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response"),
}
"""Role -> its names, which may be written with capitals."""

_NOT_TEXT = ("image", "image_url", "images", "audio", "input_audio", "video", "video_url", "file")
"""Keys of a part that is more than text, whatever its type."""

_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_CALLS = ("function_call", "tool_call")
"""ShareGPT's roles of an assistant's message that is a call of a tool; its text is the call in JSON."""


def with_message_lists(row: Row) -> Row:
    """Returns a row whose messages are lists of objects, whatever their shape in the file."""
    changed = {
        name: items
        for name in COLUMNS
        if (value := row.fields.get(name)) is not None
        and (items := _as_list(value, only_lists=name in COLUMNS[:2])) is not value
    }
    return replace(row, fields={**row.fields, **changed}) if changed else row


def _as_list(value: Any, only_lists: bool) -> Any:
    """Returns messages as a list of objects; a value that is something else as it is."""
    if isinstance(value, str):
        parsed = from_text(value) if only_lists or _LIKE_MESSAGES.match(value) else value
        is_list = isinstance(parsed, (list, dict))
        # A text that begins like messages and does not consist of them is a text.
        if not is_list or not (only_lists or _are_messages(_as_list(parsed, True))):
            return value
        value = parsed
    if not isinstance(value, dict):
        return value
    columns = {key: inner for key, inner in value.items() if inner is not None}
    lengths = {len(inner) if isinstance(inner, list) else -1 for inner in columns.values()}
    if len(lengths) == 1 and -1 not in lengths and ("role" in columns or "from" in columns):
        return [dict(zip(columns, cells)) for cells in zip(*columns.values())]
    return [value]


_LIKE_MESSAGES = re.compile(r"\s*\[?\s*\{\s*['\"](role|from|content|value)['\"]\s*:")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in value
    )


def from_text(text: str) -> Any:
    """Returns the list or object that a text spells in JSON, or as Python and NumPy print it.

    Any other text is returned as it is.
    """
    if not text.lstrip().startswith(("[", "{")):
        return text
    for read, spelled in (
        (json.loads, text),
        (ast.literal_eval, text.strip()),
        # NumPy prints the objects of an array without commas.
        (ast.literal_eval, re.sub(r"\}\s*\n\s*\{", "}, {", text.strip())),
    ):
        try:
            return read(spelled)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def messages_field(row: Row, name: str) -> Messages:
    """Returns a field that holds messages.

    Raises:
        UserError: The field is missing, empty or something else.
    """
    value = _as_list(present(row, name, "a list of messages"), True)
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{row.where}, field '{name}': expected a list of messages, got {describe(value)}")
    if not value:
        raise UserError(f"{row.where}, field '{name}': expected messages, got an empty list")
    return tuple(_message(row, f"{name}[{i}]", item) for i, item in enumerate(value))


def unread_keys(name: str, values: Iterable[Any]) -> list[str]:
    """Returns the keys of messages that are not read, such as "messages[].mood".

    Args:
        name: The column.
        values: Its values.
    """
    keys = {
        key: None
        for value in values
        if isinstance(value, list)
        for item in value
        if isinstance(item, dict)
        for key, inner in item.items()
        if key not in KEYS and inner is not None
    }
    return [f"{name}[].{key}" for key in keys]


def _message(row: Row, name: str, item: object) -> Message:
    if not isinstance(item, dict):
        raise UserError(
            f"{row.where}, field '{name}': expected a message (role and content), got {describe(item)}"
        )
    if isinstance(item, Repeating):
        raise UserError(f"{row.where}, field '{name}': expected each key once, got '{item.repeated}' twice")
    # A table has all keys in each message, some of them null.
    role_key = "from" if item.get("role") is None and "from" in item else "role"
    content_key = "value" if item.get("content") is None and "value" in item else "content"
    role, content = item.get(role_key), item.get(content_key)
    known = role.strip().lower() if isinstance(role, str) else ""
    if known not in _ROLE_OF and known not in _CALLS:
        raise UserError(
            f"{row.where}, field '{name}.{role_key}': expected system, user, assistant or tool, "
            f"got {describe(role)}"
        )
    standard = _ROLE_OF.get(known, "assistant")
    if known in _CALLS:
        calls, content = _called(row, f"{name}.{content_key}", content), ""
    else:
        calls = tool_calls_of(row, f"{name}.tool_calls", item.get("tool_calls"))
        if not calls and item.get("function_call") is not None:  # OpenAI's older form has one call
            calls = _called(row, f"{name}.function_call", item["function_call"])
    if calls and standard != "assistant":
        raise UserError(
            f"{row.where}, field '{name}': expected tool_calls of an assistant, got those of a {role}"
        )
    content = "" if calls and content is None else content  # a call of a tool without words
    message: Message = {"role": standard, "content": _content(row, f"{name}.{content_key}", content)}
    if calls:
        message["tool_calls"] = calls
    for key in KEPT:
        if item.get(key) is not None:
            message[key] = checked_text(row, f"{name}.{key}", item[key])
    if message["role"] == "assistant" and not _is_learned(row, name, item):
        message["weight"] = 0
    return message


def _is_learned(row: Row, name: str, item: Mapping[str, Any]) -> bool:
    """Reads `weight` (0 or 1) and `train` (true or false) of a message: whether it is learned."""
    for key in ("weight", "train"):
        value = item.get(key)
        flag = as_flag(row, value)
        if value is not None and flag is None:
            raise UserError(
                f"{row.where}, field '{name}.{key}': expected 0 or 1 (false or true), got {describe(value)}"
            )
        if flag is False:
            return False
    return True


def _called(row: Row, name: str, content: object) -> list[dict[str, Any]]:
    """Returns ShareGPT's call of a tool, {"name", "arguments"} in JSON, as chat templates take it."""
    call = from_text(content) if isinstance(content, str) else content
    calls = call if isinstance(call, list) else [call]
    functions = []
    for item in calls:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise UserError(
                f"{row.where}, field '{name}': expected a call {{name, arguments}} in JSON, "
                f"got {describe(content)}"
            )
        functions.append({"name": item["name"], "arguments": item.get("arguments", {})})
    return [{"type": "function", "function": function} for function in functions]


def _content(row: Row, name: str, content: object) -> str:
    """Returns a content of parts as one text, joined as chat templates join them: with nothing between."""
    if isinstance(content, dict):
        is_columns = all(isinstance(inner, list) for inner in content.values())
        content = [dict(zip(content, cells)) for cells in zip(*content.values())] if is_columns else [content]
    if not isinstance(content, list):
        return checked_text(row, name, content)
    if not content:
        raise UserError(f"{row.where}, field '{name}': expected text or text parts, got an empty list")
    return "".join(_part(row, f"{name}[{i}]", part) for i, part in enumerate(content))


def _part(row: Row, name: str, part: object) -> str:
    """Returns the text of a part: a text, or an object with `text` whose type is a text's."""
    if isinstance(part, str):
        return checked_text(row, name, part)
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in ("text", "input_text", "output_text"):
        raise UserError(
            f"{row.where}, field '{name}': expected a part of type text, got the type "
            f'"{shorten(kind)}"; images and other parts cannot be read yet'
        )
    if not isinstance(part, dict) or kind is None and "text" not in part:
        raise UserError(
            f"{row.where}, field '{name}': expected a part {{type: text, text: …}}, got {describe(part)}"
        )
    other = next((key for key in _NOT_TEXT if part.get(key) is not None), None)
    if other is not None:
        raise UserError(
            f"{row.where}, field '{name}': expected a part with text alone, got one with '{other}'; images "
            f"and other parts cannot be read yet"
        )
    return checked_text(row, f"{name}.text", part.get("text"))
