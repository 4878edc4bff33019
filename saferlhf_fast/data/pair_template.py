"""Prompts and responses as pairs of texts, as encoders read them: [CLS] prompt [SEP] response [SEP].

The special tokens are those that the tokenizer itself puts around `tokenizer(prompt, response)`, so nothing
here depends on their names. A prompt of one user turn is its text alone; of several turns it is
`USER: … ASSISTANT: … USER: …`, one turn a line. With the template safe-rlhf the prompt is that template's,
tags included; with none it is the texts of the turns, one behind the other.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saferlhf_fast.data.records import Message
from saferlhf_fast.data.templates import Answers, Template
from saferlhf_fast.data.text_pieces import fit_prompt, text_pieces
from saferlhf_fast.data.token_places import tokenize
from saferlhf_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "pair:"
"""What stands before a template's name where texts are encoded as pairs: pair:auto, pair:none …"""
_ROLES = {"system": "SYSTEM", "user": "USER", "assistant": "ASSISTANT"}


def pair_name(name: str, pairs: bool) -> str:
    """The name of a template for a model that reads pairs, or unchanged for one that does not."""
    return PREFIX + name if pairs else name


def template_of(tokenizer: "PreTrainedTokenizerBase", name: str) -> "Template | PairTemplate":
    """The template of a name, which `pair_name` may have changed."""
    if name.startswith(PREFIX):
        return PairTemplate(tokenizer, name.removeprefix(PREFIX))
    return Template(tokenizer, name)


class PairTemplate:
    """Encodes prompts and responses as pairs for one tokenizer; it has the methods of `Template` for that.

    Attributes:
        name: The template's name, without the prefix.
        tag_length: How many tokens at the end of a prompt are the separator.
        marks_second: Whether the tokenizer gives the second text and its end the token type 1.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str = "auto") -> None:
        if name == "tokenizer":
            raise UserError(
                "template: expected auto, safe-rlhf or none for an encoder, which reads prompt and response "
                "as a pair of texts; got tokenizer"
            )
        self.name, self.tokenizer = name, tokenizer
        self._begin, self._between, self._end, self.marks_second = self._special_tokens()
        self.tag_length = len(self._between)

    def answers(self, messages: Sequence[Message], responses: Sequence[str]) -> Answers:
        """Prepares responses to one prompt for `encode_answers`.

        Args:
            messages: The prompt.
            responses: The text of each response.

        Raises:
            UserError: The template cannot show the prompt.
        """
        return Answers([(self.prompt_of(messages), False)], list(responses), [])

    def encode_answers(self, groups: Sequence[Answers]) -> list[tuple[list[int], list[list[int]]]]:
        """Tokenises prompts and the responses to each.

        Args:
            groups: What `answers` returns.

        Returns:
            (ids of the prompt with the special tokens around it, ids of each response with the end) of each
            group; [] for a response whose text has no token.
        """
        prompts = [text for group in groups if isinstance(group.prompt, list) for text, _ in group.prompt]
        # Each text is tokenised once: prompts and references repeat.
        texts = list(dict.fromkeys([*prompts, *(text for group in groups for text in group.texts)]))
        ids_of = dict(zip(texts, tokenize(self.tokenizer, texts)))
        return [
            (
                [*self._begin, *ids_of[prompt], *self._between],
                [[*ids_of[text], *self._end] if ids_of[text] else [] for text in group.texts],
            )
            for prompt, group in zip(prompts, groups)
        ]

    def encode_scored(
        self, prompts: Sequence[Sequence[Message]], texts: Sequence[str], ended: Sequence[bool]
    ) -> list[tuple[list[int], list[int]]]:
        """Returns (ids of the prompt, ids of the response) of texts that another tokenizer's model wrote.

        Args:
            prompts: The messages of each prompt.
            texts: The response to each.
            ended: Not used: a pair has the same end whether or not the response was cut.
        """
        heads = tokenize(self.tokenizer, [self.prompt_of(messages) for messages in prompts])
        tails = tokenize(self.tokenizer, list(texts))
        return [
            ([*self._begin, *head, *self._between], [*tail, *self._end]) for head, tail in zip(heads, tails)
        ]

    def truncate_prompt(self, ids: list[int], limit: int) -> list[int] | None:
        """Returns a prompt of `limit` ids without its beginning; None when its special tokens do not fit.

        Args:
            ids: The ids of the prompt, with the special tokens around it.
            limit: Length of the result (tokens).
        """
        if len(ids) <= limit:
            return ids
        begin = len(self._begin)
        if limit < begin + self.tag_length + 1:
            return None
        return ids[:begin] + ids[len(ids) - limit + begin :]

    def fit_prompt(self, prompt: list[int], response_length: int, max_length: int) -> list[int] | None:
        """As `Template.fit_prompt`."""
        return fit_prompt(self.truncate_prompt, prompt, response_length, max_length)

    def cut_response(self, ids: list[int], limit: int) -> list[int]:
        """Returns the first ids of a response, with its end."""
        return ids if len(ids) <= limit else ids[: limit - len(self._end)] + self._end

    def prompt_of(self, messages: Sequence[Message]) -> str:
        """The text of a prompt.

        Raises:
            UserError: It has tools, for which there is no place.
        """
        if any(item["role"] == "tool" or item.get("tool_calls") or item.get("tools") for item in messages):
            raise UserError("a pair of texts has no place for tools, their calls and their results")
        if self.name == "safe-rlhf":
            pieces = text_pieces(messages, True, self.name)
            return "".join(text + " " * is_response for text, is_response in pieces)
        texts = [item["content"] for item in messages]
        if self.name == "none" or [item["role"] for item in messages] == ["user"]:
            return "\n".join(texts)
        return "\n".join(f"{_ROLES[item['role']]}: {text}" for item, text in zip(messages, texts))

    def _special_tokens(self) -> tuple[list[int], list[int], list[int], bool]:
        """What the tokenizer puts before, between and behind two texts; whether it marks the second one."""
        first, second = tokenize(self.tokenizer, ["a", "b"])
        encoded = self.tokenizer("a", "b", return_token_type_ids=True)
        ids, types = list(encoded["input_ids"]), list(encoded.get("token_type_ids") or [])
        start = _find(ids, first, 0)
        middle = start + len(first)
        stop = -1 if start < 0 else _find(ids, second, middle + 1)
        if not first or not second or start < 0 or stop < 0:
            raise UserError(
                "expected a tokenizer that puts a separator between the two texts of a pair, as "
                f"tokenizer(prompt, response) does for BERT; got {self.tokenizer.convert_ids_to_tokens(ids)}"
            )
        named = "token_type_ids" in self.tokenizer.model_input_names
        marks = named and types[:stop] == [0] * stop and types[stop:] == [1] * (len(ids) - stop)
        return ids[:start], ids[middle:stop], ids[stop + len(second) :], marks


def _find(ids: Sequence[int], part: Sequence[int], start: int) -> int:
    """The first place from `start` on where a part is in ids, or -1."""
    places = range(start, len(ids) - len(part) + 1)
    return next((i for i in places if list(ids[i : i + len(part)]) == list(part)), -1)
