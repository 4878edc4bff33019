"""Calls and results of tools in messages: read from a row, checked against what a chat template shows.

A message of the assistant may have `tool_calls`, a list of {"type": "function", "function": {"name",
"arguments"}} (or of {"name", "arguments"}); a message of the role tool has a result. The tools of a dialogue
are in its first message, under `tools`, so that they stay with the messages.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saferlhf_fast.data.files import Row, describe
from saferlhf_fast.errors import UserError

_NAME = "Zq7tool{}K"  # a text that is in no template

KEPT = ("tool_call_id", "name", "reasoning_content", "thinking", "reasoning")
"""Further fields of a message that chat templates read."""


def tool_calls_of(row: Row, name: str, calls: object) -> list[dict[str, Any]]:
    """Returns the tool calls of a message; [] for none.

    Raises:
        UserError: It is not a list of calls with the name of a function.
    """
    if isinstance(calls, str) and calls.strip():  # in CSV and in some data sets they are JSON text
        try:
            calls = json.loads(calls)
        except json.JSONDecodeError:
            pass
    if not calls:
        return []
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"{row.where}, field '{name}': expected a list of tool calls, got {describe(calls)}")
    kept = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{row.where}, field '{name}[{i}]': expected a call with the name of a function, got "
                f"{describe(call)}"
            )
        kept.append({key: value for key, value in call.items() if value is not None})
    return kept


def tools_of(row: Row) -> list[dict[str, Any]]:
    """Returns the tools that a row declares in the column `tools`, a list or its JSON text; [] for none.

    Raises:
        UserError: It is neither.
    """
    tools = row.fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            pass
    if not tools:
        return []
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{row.where}, field 'tools': expected a list of tools, got {describe(tools)}")
    return [dict(tool) for tool in tools]


def with_other_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Returns messages whose tool calls have their arguments in the other form, as JSON or as an object.

    Chat templates read one of the two, data sets have either. None where no message calls a tool.
    """
    if not any(item.get("tool_calls") for item in messages):
        return None
    return [
        {**item, "tool_calls": [_with_other_arguments(call) for call in item["tool_calls"]]}
        if item.get("tool_calls")
        else item
        for item in messages
    ]


def with_probes(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Replaces the functions' names and the results by texts that a template must show.

    Args:
        messages: The dialogue.

    Returns:
        The changed messages, and [(text, what it stands for)].
    """
    wanted: list[tuple[str, str]] = []
    return list(_probed(messages, wanted)), wanted


def _probed(messages: Sequence[dict[str, Any]], wanted: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for item in messages:
        if item.get("tool_calls"):
            calls = []
            for call in item["tool_calls"]:
                wanted.append((name := _NAME.format(len(wanted)), "tool calls"))
                function = call.get("function")
                renamed = {"function": {**function, "name": name}} if function else {"name": name}
                calls.append({**call, **renamed})
            yield {**item, "tool_calls": calls}
        elif item["role"] == "tool":
            wanted.append((name := _NAME.format(len(wanted)), "results of tools"))
            yield {**item, "content": name}
        else:
            yield item


def _with_other_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments)
        except json.JSONDecodeError:
            pass
    elif arguments is not None:
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": function} if call.get("function") else function
