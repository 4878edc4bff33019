"""Makes examples of moderation records: prompt and response as tokens, with the labels as they are.

A text that is longer than max_length is cut: a prompt of more than half of it loses its beginning, a response
its middle, so that it is judged by head and tail. Labels that are unknown stay unknown.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from saferlhf_fast.config.setting_types import Data
from saferlhf_fast.data.moderation_records import ModerationRecord, read_moderation_records
from saferlhf_fast.data.pair_template import PairTemplate, template_of
from saferlhf_fast.data.records import Message, user
from saferlhf_fast.data.templates import Template
from saferlhf_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_WIDTHLESS = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_SPACES = re.compile(r"[^\S\n]+")


class Encoded(NamedTuple):
    """Prompt and response as tokens.

    Attributes:
        ids: Token ids [L].
        prompt_length: Tokens of the prompt.
        second_at: Where tokens begin to have the type 1; None where they all have the type 0.
        truncated: Whether something was cut.
    """

    ids: list[int]
    prompt_length: int
    second_at: int | None
    truncated: bool


@dataclass(frozen=True, slots=True)
class ModerationExample:
    """A prompt and a response with what is known about them."""

    ids: list[int]
    """Token ids [L]."""
    prompt_text: str
    response_text: str
    unsafe: bool | None = None
    severity: int | None = None
    """0 to 3; None: unknown."""
    refusal: bool | None = None
    categories: Mapping[str, bool | None] = field(default_factory=dict)
    """{category: whether it applies}; one that is missing or None is unknown."""
    label_set: str = ""
    source: str = ""
    second_at: int | None = None
    truncated: bool = False


def moderation_examples(
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    template_name: str = "auto",
    max_length: int = 512,
    seed: int = 0,
) -> tuple[list[ModerationExample], dict[str, int]]:
    """Reads records and tokenises them.

    Args:
        data: A recipe's `data`.
        tokenizer: The tokenizer of the model.
        template_name: One of templates.NAMES, or what `pair_template.pair_name` makes of it.
        max_length: Longest prompt + response (tokens).
        seed: Seed of the rows that sources with a count or a proportion draw.

    Returns:
        The examples in the order of the data, and counts: records, labelled, truncated.

    Raises:
        UserError: A source cannot be read, or no record has a label.
    """
    records: Sequence[ModerationRecord] = list(read_moderation_records(data, seed))
    labelled = [record for record in records if is_labelled(record)]
    if not labelled:
        raise UserError(
            f"data: expected records with a label (safety, severity, categories or refusal), got none in "
            f"{len(records)} records"
        )
    template = template_of(tokenizer, template_name)
    encoded = encode_pairs(template, [r.prompt for r in labelled], [r.response for r in labelled], max_length)
    examples = [
        ModerationExample(
            item.ids,
            record.prompt,
            record.response,
            record.unsafe,
            record.severity,
            record.refusal,
            dict(record.categories),
            record.label_set,
            record.source,
            item.second_at,
            item.truncated,
        )
        for record, item in zip(labelled, encoded)
    ]
    return examples, {
        "records": len(records),
        "labelled": len(labelled),
        "truncated": sum(example.truncated for example in examples),
    }


def is_labelled(record: ModerationRecord) -> bool:
    """Whether anything is known about a record."""
    known = (record.unsafe, record.severity, record.refusal, *record.categories.values())
    return any(label is not None for label in known)


def encode_pairs(
    template: Template | PairTemplate,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
) -> list[Encoded]:
    """Tokenises prompts and the response to each.

    Args:
        template: The template of the model's tokenizer.
        prompts: The prompts; one may be empty, where the text alone is judged.
        responses: The responses.
        max_length: Longest prompt + response (tokens).

    Raises:
        UserError: max_length has no room for the template's own tokens.
    """
    return encode_dialogues(template, [[user(prompt)] for prompt in prompts], responses, max_length)


def encode_dialogues(
    template: Template | PairTemplate,
    prompts: Sequence[Sequence[Message]],
    responses: Sequence[str],
    max_length: int,
) -> list[Encoded]:
    """As `encode_pairs`, of prompts that may have several turns.

    Args:
        template: The template of the model's tokenizer.
        prompts: The messages of each prompt.
        responses: The response to each.
        max_length: Longest prompt + response (tokens).

    Raises:
        UserError: As in `encode_pairs`.
    """
    encoded = template.encode_scored(
        [[{**item, "content": normal(item["content"])} for item in messages] for messages in prompts],
        [normal(text) for text in responses],
        [True] * len(responses),
    )
    return [_fitted(template, head, tail, max_length) for head, tail in encoded]


def normal(text: str) -> str:
    """A text as a moderator reads it: without characters of no width, and with single spaces.

    Both are invisible to people, and would change the tokens of a text that is otherwise the same. Line
    breaks stay.
    """
    return _SPACES.sub(" ", _WIDTHLESS.sub("", text))


def _fitted(template: Template | PairTemplate, head: list[int], tail: list[int], max_length: int) -> Encoded:
    """Cuts a pair to max_length: the prompt's beginning, then the response's middle."""
    whole = len(head) + len(tail)
    if whole > max_length:
        # a response is cut only where the prompt has given up what is beyond half of the room
        wanted = max(max_length - len(tail), max_length // 2)
        cut = template.truncate_prompt(head, wanted)
        if cut is None:
            raise UserError(
                f"max_length: expected room for the template's own tokens, got {max_length} tokens"
            )
        head, room = cut, max_length - len(cut)
        if len(tail) > room:
            tail = tail[: room // 2] + tail[len(tail) - (room - room // 2) :]
    second_at = len(head) if template.marks_second else None
    return Encoded(head + tail, len(head), second_at, whole > max_length)
