"""Conversation templates: messages -> token ids, and which of them the model has to produce.

A dialogue is a list of pieces that are tokenised one by one and joined: prompt pieces, which end with the tag
that begins the assistant's turn, and response pieces, which end with the token that ends the turn. So the ids
of a prompt are always a prefix of the ids of prompt + response, and generation, scoring and training use the
same ids.

Templates by name: "safe-rlhf" is `BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}` and the
end-of-sequence token, with more turns as `USER: {prompt} ASSISTANT:{response}`; "tokenizer" is the
tokenizer's own chat template; "none" is the texts alone; "auto" is the tokenizer's if it has one, else
safe-rlhf.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from saferlhf_fast.data.files import shorten
from saferlhf_fast.data.records import Message, assistant, user
from saferlhf_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pieces = list[tuple[str, bool]]
"""[(text, is_response)] of one dialogue."""

NAMES = ("auto", "tokenizer", "safe-rlhf", "none")

_BEGIN, _USER, _TAG = "BEGINNING OF CONVERSATION: ", "USER: {} ", "ASSISTANT:"
_PROBE = "Zq7"  # an answer that shows how a chat template writes answers; it is in no template
_ANCHOR = "\n"  # see Template._continuations


class Template:
    """Encodes conversations for one tokenizer.

    Attributes:
        name: The template's name; where "auto" was given, the one that was chosen.
        stop_ids: The tokens that end a response; generation must stop at any of them.
        tag_length: How many tokens at the end of a prompt are the assistant tag.
    """

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
        self._begin = self._leading_ids()
        self._anchor = self._anchor_ids()
        self._end_text = self._chat_end() if self.name == "tokenizer" else ""
        self._end_ids = (self._plain([self._end_text])[0] if self._end_text else []) or [
            tokenizer.eos_token_id
        ]
        self.stop_ids = tuple(sorted({tokenizer.eos_token_id, self._end_ids[-1]}))
        self.tag_length = len(self._plain([self._tag()])[0]) if self._tag() else 0

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

    def response_text(self, messages: Sequence[Message], text: str, prompt: str | None = None) -> str:
        """Returns the text between the prompt and the end of the turn.

        This is `text`, except with chat templates that trim it or write something before it.

        Args:
            messages: The prompt.
            text: The response.
            prompt: The messages as the chat template renders them; rendered here when not given.
        """
        if self.name != "tokenizer":
            return text
        prompt = self._render(messages, True) if prompt is None else prompt
        dialogue = self._render((*messages, assistant(text)), False).rstrip()
        if dialogue.startswith(prompt) and dialogue.endswith(self._end_text):
            return dialogue[len(prompt) :].removesuffix(self._end_text)
        return text

    def pieces(self, messages: Sequence[Message], generate: bool = False) -> Pieces:
        """Splits a dialogue into prompts and responses; the end of a turn is not part of a response's text.

        Args:
            messages: The dialogue.
            generate: True: the dialogue ends with a user turn, and the assistant tag is added. False: it is
                cut after the last assistant turn.

        Raises:
            UserError: There is no assistant turn, or the chat template refuses the dialogue.
        """
        if not generate:
            last = max((i for i, item in enumerate(messages) if item["role"] == "assistant"), default=None)
            if last is None:
                raise UserError("a conversation without an assistant turn")
            messages = messages[: last + 1]
        return (
            self._chat_pieces(messages, generate)
            if self.name == "tokenizer"
            else self._text_pieces(messages, generate)
        )

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
        if len(prompt) + response_length <= max_length:
            return prompt
        room = max_length - response_length
        return self.truncate_prompt(prompt, room) if room >= max_length // 2 else None

    def _text_pieces(self, messages: Sequence[Message], generate: bool) -> Pieces:
        """Splits a dialogue for safe-rlhf and none.

        A system message becomes the beginning of the user's text: safe-rlhf's format has no place for it.
        """
        tagged = self.name == "safe-rlhf"
        pieces: Pieces = []
        text, system = _BEGIN if tagged else "", ""
        for item in messages:
            if item["role"] == "assistant":
                pieces += [(text + (_TAG if tagged else ""), False), (item["content"], True)]
                text = "" if tagged else "\n"
            elif item["role"] == "system":
                system += item["content"] + "\n\n"
            else:
                text += _USER.format(system + item["content"]) if tagged else system + item["content"]
                system = ""
        if generate:
            pieces.append((text + system + (_TAG if tagged else ""), False))
        return pieces

    def _chat_pieces(self, messages: Sequence[Message], generate: bool) -> Pieces:
        """Renders a dialogue with the tokenizer's chat template and splits it at the assistant turns.

        The last turn is what the template adds to the generation prompt (some add more than the text).
        Earlier turns are searched in order; a turn that the template changes (some drop thoughts from the
        history) remains part of the prompt.
        """
        context = messages if generate else messages[:-1]
        prompt = self._render(context, True)
        pieces: Pieces = []
        start = cursor = 0
        for i, item in enumerate(context):
            content = item["content"].strip()
            begin = cursor
            if item["role"] == "assistant" and i and context[i - 1]["role"] == "user":
                head = self._render(context[:i], True)
                begin = len(head) if len(head) >= cursor and prompt.startswith(head) else cursor
            place = prompt.find(content, begin) if content else -1
            if place < 0:
                continue
            if begin == cursor:
                begin = place
            cursor = place + len(content)
            if item["role"] == "assistant" and prompt.startswith(self._end_text, cursor):
                pieces += [(prompt[start:begin], False), (prompt[begin:cursor], True)]
                start = cursor = cursor + len(self._end_text)
        pieces.append((prompt[start:], False))
        if not generate:
            pieces.append((self.response_text(context, messages[-1]["content"], prompt), True))
        return pieces

    def _render(self, messages: Sequence[Message], generate: bool) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"the tokenizer's chat template refuses the conversation ({shorten(error, 80)})"
            ) from error

    def _chat_end(self) -> str:
        """Returns what the chat template writes after an answer, without white space: "<|im_end|>"."""
        dialogue = self._render((user("x"), assistant(_PROBE)), False)
        if _PROBE not in dialogue:
            raise UserError("the tokenizer's chat template does not show the assistant's text")
        return dialogue[dialogue.rindex(_PROBE) + len(_PROBE) :].rstrip()

    def _tag(self) -> str:
        if self.name != "tokenizer":
            return _TAG if self.name == "safe-rlhf" else ""
        question = (user("x"),)
        without, with_tag = self._render(question, False), self._render(question, True)
        return with_tag[len(without) :] if with_tag.startswith(without) else ""

    def encode_pieces(self, dialogues: Sequence[Pieces]) -> list[tuple[list[int], list[bool]]]:
        """Tokenises many dialogues; all texts at once, which is several times faster.

        Args:
            dialogues: What `pieces` returns for each.

        Returns:
            (ids, mask) of each dialogue; mask is True on responses and the ends of their turns.
        """
        prompts = iter(
            self._plain([text for pieces in dialogues for text, is_response in pieces if not is_response])
        )
        responses = iter(
            self._continuations([text for pieces in dialogues for text, is_response in pieces if is_response])
        )
        encoded: list[tuple[list[int], list[bool]]] = []
        for pieces in dialogues:
            ids, mask = list(self._begin), [False] * len(self._begin)
            for _, is_response in pieces:
                piece = self.end(next(responses)) if is_response else next(prompts)
                ids += piece
                mask += [is_response] * len(piece)
            encoded.append((ids, mask))
        return encoded

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: no warning about long sequences, because the caller checks lengths.
        return [
            list(ids)
            for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        ]

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
