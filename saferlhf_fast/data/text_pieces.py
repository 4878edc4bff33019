"""The templates that are no chat template: safe-rlhf's tags, and none. Also the room for a prompt."""

from collections.abc import Callable, Sequence

from saferlhf_fast.data.records import Message
from saferlhf_fast.errors import UserError

BEGIN, USER, TAG = "BEGINNING OF CONVERSATION: ", "USER: {} ", "ASSISTANT:"


def text_pieces(messages: Sequence[Message], generate: bool, name: str) -> list[tuple[str, bool]]:
    """Splits a dialogue into [(text, is_response)].

    A system message becomes the beginning of the user's text: safe-rlhf's format has no place for it.

    Args:
        messages: The dialogue.
        generate: Whether it ends with a user turn, and the assistant tag is added.
        name: safe-rlhf; any other name gives the texts alone.

    Raises:
        UserError: It has tools.
    """
    if any(item["role"] == "tool" or item.get("tool_calls") or item.get("tools") for item in messages):
        raise UserError(f"the template {name} has no place for tools, their calls and their results")
    tagged = name == "safe-rlhf"
    pieces: list[tuple[str, bool]] = []
    text, system = BEGIN if tagged else "", ""
    for item in messages:
        if item["role"] == "assistant":
            pieces += [(text + (TAG if tagged else ""), False), (item["content"], True)]
            text = "" if tagged else "\n"
        elif item["role"] == "system":
            system += item["content"] + "\n\n"
        else:
            text += USER.format(system + item["content"]) if tagged else system + item["content"]
            system = ""
    if generate:
        pieces.append((text + system + (TAG if tagged else ""), False))
    return pieces


def fit_prompt(
    truncate: Callable[[list[int], int], list[int] | None],
    prompt: list[int],
    response_length: int,
    max_length: int,
) -> list[int] | None:
    """Returns a prompt, without its beginning where prompt + response are too long.

    Args:
        truncate: (ids of a prompt, length) -> its last ids, or None where what must stay does not fit.
        prompt: The ids of the prompt.
        response_length: Length of the longest response to it, with the end of the turn (tokens).
        max_length: Longest prompt + response (tokens).

    Returns:
        None when the response leaves the prompt less than half of max_length, and the prompt needs more.
    """
    if len(prompt) + response_length <= max_length:
        return prompt
    room = max_length - response_length
    return truncate(prompt, room) if room >= max_length // 2 else None
