"""Conversation templates: messages -> token ids, and which of them the model has to produce.

A chat template's text is tokenised as a whole, so its ids are those of `apply_chat_template`; the learned
tokens are those of the learned characters (chat_template.py). A dialogue of the other templates is a list of
pieces that are tokenised one by one and joined: prompt pieces, which end with the tag that begins the
assistant's turn, and response pieces, which end with the end-of-sequence token. So the ids of a prompt are a
prefix of the ids of prompt + response.

Templates by name: "safe-rlhf" is `BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}` and the
end-of-sequence token, with more turns as `USER: {prompt} ASSISTANT:{response}`; "tokenizer" is the
tokenizer's own chat template; "none" is the texts alone; "auto" is the tokenizer's if it has one, else
safe-rlhf.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from saferlhf_fast.data.chat_template import Answer, ChatTemplate, Rendered
from saferlhf_fast.data.records import Message, assistant
from saferlhf_fast.data.text_pieces import TAG, fit_prompt, text_pieces
from saferlhf_fast.data.token_places import place_of, tokenize, tokenize_with_places
from saferlhf_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pieces = list[tuple[str, bool]] | Rendered
"""A dialogue before it is tokenised: [(text, is_response)], or a chat template's text."""

NAMES = ("auto", "tokenizer", "safe-rlhf", "none")

_ANCHOR = "\n"  # see Template._continuations


class Answers(NamedTuple):
    """A prompt and responses to it, before they are tokenised."""

    prompt: Pieces | None
    """None where `dialogues` have the prompt."""
    texts: list[str]
    dialogues: list[Rendered]
    """Prompt and response of each, with a chat template."""


class Template:
    """Encodes conversations for one tokenizer.

    Attributes:
        name: The template's name; where "auto" was given, the one that was chosen.
        stop_ids: The tokens that end a response; generation must stop at any of them.
        stop_texts: End marks that are no single token; generation must stop where a response completes one.
        tag_length: How many tokens at the end of a prompt are the assistant tag.
        marks_second: False: prompt and response are one text (see pair_template.py).
    """

    marks_second = False

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str = "auto") -> None:
        if name not in NAMES:
            raise UserError(f"template: expected one of {', '.join(NAMES)}, got '{name}'")
        own = getattr(tokenizer, "chat_template", None)
        if name == "tokenizer" and not own:
            raise UserError("template: the tokenizer has no chat template; use safe-rlhf or none")
        self.name = ("tokenizer" if own else "safe-rlhf") if name == "auto" else name
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token (eos_token), so no response could end"
            )
        self._chat = ChatTemplate(tokenizer) if self.name == "tokenizer" else None
        self._begin = self._leading_ids()
        self._anchor = self._anchor_ids()
        mark = self._chat.end if self._chat else ""
        self._end_ids = self._continuations([mark])[0] or [tokenizer.eos_token_id]
        is_token = not mark or self._end_ids[-1] in tokenizer.get_added_vocab().values()
        self.stop_ids = tuple(sorted({tokenizer.eos_token_id, *(self._end_ids[-1:] if is_token else ())}))
        self.stop_texts: tuple[str, ...] = () if is_token else (mark.strip(),)
        stop_tokens = map(str, tokenizer.convert_ids_to_tokens(list(self.stop_ids)))
        self._own_ends = tuple(text for text in (mark.strip(), *stop_tokens) if text)
        self.tag_length = len(self._continuations([self._tag()])[0]) if self._tag() else 0

    def encode_prompts(self, conversations: Iterable[Sequence[Message]]) -> list[list[int]]:
        """Returns the ids of many prompts, each with bos (once, where the tokenizer has it) and the tag.

        Args:
            conversations: The messages of each prompt; the last one is the user's.
        """
        dialogues = [self.pieces(messages, generate=True) for messages in conversations]
        return [ids for ids, _ in self.encode_pieces(dialogues)]

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of many responses without the end of the turn, which `end` adds.

        Args:
            texts: What `response_text` returns for each.
        """
        return self._continuations(texts)

    def end(self, ids: Iterable[int]) -> list[int]:
        """Returns the ids of a response with the end of the turn added."""
        return [*ids, *self._end_ids]

    def answer_text(self, text: str) -> str:
        """Returns a response's text without the end marks that it brings itself; the template adds one."""
        bare = text.rstrip()
        while bare.endswith(self._own_ends):
            mark = next(mark for mark in self._own_ends if bare.endswith(mark))
            text = bare.removesuffix(mark)
            bare = text.rstrip()
        return text

    def response_text(self, messages: Sequence[Message], text: str) -> str:
        """Returns the text between the prompt and the end of the turn.

        This is `text`, except with chat templates that trim it or write something before it.

        Args:
            messages: The prompt.
            text: The response.
        """
        if self._chat is None:
            return self.answer_text(text)
        dialogue = self._dialogue((*messages, assistant(text)))
        assert dialogue.last is not None, "the place of the last answer was asked for"
        return dialogue.text[dialogue.last.begin : dialogue.last.stop]

    def pieces(self, messages: Sequence[Message], generate: bool = False) -> Pieces:
        """Prepares a dialogue for `encode_pieces`.

        Args:
            messages: The dialogue.
            generate: True: the dialogue ends with a user turn, and the assistant tag is added. False: it is
                cut after the last assistant turn.

        Raises:
            UserError: There is no assistant turn, or the template cannot show the dialogue.
        """
        messages = [
            {**item, "content": self.answer_text(item["content"])} if item["role"] == "assistant" else item
            for item in messages
        ]
        if not generate:
            last = max((i for i, item in enumerate(messages) if item["role"] == "assistant"), default=None)
            if last is None:
                raise UserError("a conversation without an assistant turn")
            messages = messages[: last + 1]
        if self._chat is None:
            return text_pieces(messages, generate, self.name)
        return Rendered(self._chat.render(messages, True)) if generate else self._chat.dialogue(messages)

    def answers(self, messages: Sequence[Message], responses: Sequence[str]) -> Answers:
        """Prepares responses to one prompt for `encode_answers`.

        Args:
            messages: The prompt.
            responses: The text of each response.

        Raises:
            UserError: The template cannot show the dialogues, or not with one prompt.
        """
        texts = [self.answer_text(text) for text in responses]
        if self._chat is None:
            return Answers(self.pieces(messages, generate=True), texts, [])
        dialogues = [self._dialogue((*messages, assistant(text))) for text in texts]
        begin = min(item.last.begin for item in dialogues if item.last)
        if len({item.text[:begin] for item in dialogues}) > 1:
            raise UserError("the chat template does not show the two responses behind the same prompt")
        return Answers(None, texts, dialogues)

    def encode_answers(self, groups: Sequence[Answers]) -> list[tuple[list[int], list[list[int]]]]:
        """Tokenises prompts and the responses to each.

        Args:
            groups: What `answers` returns.

        Returns:
            (ids of the prompt, ids of each response with the end of its turn) of each group; [] for a
            response whose text has no token.
        """
        if self._chat is None:
            prompts = self.encode_pieces([group.prompt for group in groups if group.prompt is not None])
            # Each text is tokenised once: references repeat.
            texts = list(dict.fromkeys(text for group in groups for text in group.texts))
            ids_of = {
                text: self.end(ids) if ids else [] for text, ids in zip(texts, self.encode_responses(texts))
            }
            return [(ids, [ids_of[t] for t in group.texts]) for (ids, _), group in zip(prompts, groups)]
        dialogues = [item for group in groups for item in group.dialogues]
        borders = [(item.last.begin, item.last.stop) for item in dialogues if item.last]
        encoded = iter(tokenize_with_places(self.tokenizer, [item.text for item in dialogues], borders))
        split = []
        for group in groups:
            prompt, responses = self._split(group.dialogues, [next(encoded) for _ in group.dialogues])
            # A template may write something before an answer without a text.
            split.append((prompt, [ids if text.strip() else [] for text, ids in zip(group.texts, responses)]))
        return split

    def encode_scored(
        self, prompts: Sequence[Sequence[Message]], texts: Sequence[str], ended: Sequence[bool]
    ) -> list[tuple[list[int], list[int]]]:
        """Returns (ids of the prompt, ids of the response) of texts that another tokenizer's model wrote.

        Args:
            prompts: The messages of each prompt.
            texts: The response to each.
            ended: Whether each response has the end of its turn.
        """
        if self._chat is None:
            heads = self.encode_prompts(prompts)
            tails = self.encode_responses([self.answer_text(text) for text in texts])
            return [(head, self.end(ids) if end else ids) for head, ids, end in zip(heads, tails, ended)]
        dialogues = [self._scored(*item) for item in zip(prompts, texts, ended)]
        borders = [(item.last.begin, item.last.stop) for item in dialogues if item.last]
        encoded = tokenize_with_places(self.tokenizer, [item.text for item in dialogues], borders)
        joined = []
        for (ids, spans), item in zip(encoded, dialogues):
            start = place_of(spans, item.last.begin if item.last else 0, len(item.text))[0]
            joined.append((ids[:start], ids[start:] if item.ended else [*ids[start:], *self._end_ids]))
        return joined

    def _scored(self, messages: Sequence[Message], text: str, end: bool) -> Rendered:
        """Renders a prompt and a response; what the template does not show follows the generation prompt."""
        assert self._chat is not None, "the template is the tokenizer's"
        try:
            whole = self._dialogue((*messages, assistant(text)))
        except UserError:
            prompt, text = self._chat.render(messages, True), self.answer_text(text)
            place = Answer(
                len(prompt), len(prompt) + len(text), len(prompt) + len(text) + len(self._chat.end)
            )
            whole = Rendered(prompt + text + self._chat.end, (), place, bool(self._chat.end))
        assert whole.last is not None, "the place of the last answer was asked for"
        return whole if end else Rendered(whole.text[: whole.last.stop], (), whole.last, True)

    def has_no_token(self, pieces: Pieces, mask: Sequence[bool]) -> bool:
        """Tells whether the answers of a dialogue have no token but the ends of their turns."""
        if isinstance(pieces, Rendered):
            return not any(mask)
        return sum(mask) == len(self._end_ids) * sum(is_response for _, is_response in pieces)

    def learns_end(self, pieces: Pieces) -> bool:
        """Tells whether the end of a dialogue's last answer is learned."""
        return not isinstance(pieces, Rendered) or pieces.end_learned

    def _split(
        self, dialogues: Sequence[Rendered], encoded: Sequence[tuple[list[int], list[tuple[int, int]]]]
    ) -> tuple[list[int], list[list[int]]]:
        """Splits the ids of dialogues with one prompt where their responses begin."""
        places = [item.last for item in dialogues if item.last]
        begin = min(place.begin for place in places)
        start = min(place_of(spans, begin, len(item.text))[0] for (_, spans), item in zip(encoded, dialogues))
        responses = []
        for (ids, spans), item, place in zip(encoded, dialogues, places):
            first, stop = place_of(spans, place.begin, place.stop)
            end = [] if item.ended else self._end_ids
            responses.append(
                [*ids[start:], *end] if stop > first and item.text[place.begin : place.stop] else []
            )
        return encoded[0][0][:start], responses

    def _dialogue(self, messages: Sequence[Message]) -> Rendered:
        """Renders a dialogue for its last answer alone."""
        assert self._chat is not None, "the template is the tokenizer's"
        *context, last = messages
        context = [
            {**item, "content": self.answer_text(item["content"])} if item["role"] == "assistant" else item
            for item in context
        ]
        last = {**last, "content": self.answer_text(last["content"])}
        return self._chat.dialogue([*context, last], last_only=True)

    def truncate_prompt(self, ids: list[int], limit: int) -> list[int] | None:
        """Returns the last `limit` ids of a prompt, with its bos; None when the tag does not fit.

        Args:
            ids: The ids of the prompt.
            limit: Length of the result (tokens).
        """
        if len(ids) <= limit:
            return ids
        bos = ids[:1] if ids[:1] == [self.tokenizer.bos_token_id] else []
        if limit < self.tag_length + len(bos) + 1:
            return None
        return bos + ids[len(ids) - limit + len(bos) :]

    def fit_prompt(self, prompt: list[int], response_length: int, max_length: int) -> list[int] | None:
        """Returns a prompt, without its beginning where prompt + response are too long.

        Args:
            prompt: The ids of the prompt.
            response_length: Length of the longest response to it, with the end of the turn (tokens).
            max_length: Longest prompt + response (tokens).

        Returns:
            None when the response leaves the prompt less than half of max_length, and the prompt needs more.
        """
        return fit_prompt(self.truncate_prompt, prompt, response_length, max_length)

    def cut_response(self, ids: list[int], limit: int) -> list[int]:
        """Returns the first `limit` ids of a response."""
        return ids[:limit]

    def _tag(self) -> str:
        if self._chat is not None:
            return self._chat.tag
        return TAG if self.name == "safe-rlhf" else ""

    def encode_pieces(self, dialogues: Sequence[Pieces]) -> list[tuple[list[int], list[bool]]]:
        """Tokenises many dialogues; all texts at once, which is several times faster.

        Args:
            dialogues: What `pieces` returns for each.

        Returns:
            (ids, mask) of each dialogue; mask is True on responses and the ends of their turns.
        """
        texts = [pieces for pieces in dialogues if not isinstance(pieces, Rendered)]
        if len(texts) < len(dialogues):
            return self._encode_rendered([item for item in dialogues if isinstance(item, Rendered)])
        prompts = iter(
            self._plain([text for pieces in texts for text, is_response in pieces if not is_response])
        )
        responses = iter(
            self._continuations([text for pieces in texts for text, is_response in pieces if is_response])
        )
        encoded: list[tuple[list[int], list[bool]]] = []
        for pieces in texts:
            ids, mask = list(self._begin), [False] * len(self._begin)
            for _, is_response in pieces:
                piece = self.end(next(responses)) if is_response else next(prompts)
                ids += piece
                mask += [is_response] * len(piece)
            encoded.append((ids, mask))
        return encoded

    def _encode_rendered(self, dialogues: Sequence[Rendered]) -> list[tuple[list[int], list[bool]]]:
        encoded = []
        borders = [[place for span in item.learned for place in span] for item in dialogues]
        tokenized = tokenize_with_places(self.tokenizer, [item.text for item in dialogues], borders)
        for item, (ids, spans) in zip(dialogues, tokenized):
            mask = [False] * len(ids)
            for begin, end in item.learned:
                first, stop = place_of(spans, begin, end)
                mask[first:stop] = [True] * (stop - first)
            end_ids = [] if item.ended else self._end_ids
            encoded.append(([*ids, *end_ids], mask + [True] * len(end_ids)))
        return encoded

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        return tokenize(self.tokenizer, texts)

    def _continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenises texts that continue another text.

        SentencePiece tokenizers put a space before every text. After "ASSISTANT:" there is none, so the text
        is tokenised after a line break, whose tokens are then removed.
        """
        if not self._anchor:
            return self._plain(texts)
        n, encoded = len(self._anchor), self._plain([_ANCHOR + text for text in texts])
        return [
            ids[n:] if ids[:n] == self._anchor else self._plain([text])[0]
            for ids, text in zip(encoded, texts)
        ]

    def _anchor_ids(self) -> list[int]:
        """Returns the ids of the line break of `_continuations`; none where it is not needed."""
        anchor, joined, alone = self._plain([_ANCHOR, _ANCHOR + "a", "a"])
        return anchor if joined[: len(anchor)] == anchor and joined[len(anchor) :] != alone else []

    def _leading_ids(self) -> list[int]:
        """Returns [bos] where the tokenizer puts it before a text; a chat template writes its own."""
        bos = self.tokenizer.bos_token_id
        if self.name == "tokenizer" or bos is None:
            return []
        ids = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        return [bos] if ids[0] == bos else []
