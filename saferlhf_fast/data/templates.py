"""Conversation templates: messages -> token ids, and which of them the model has to produce.

A dialogue is a list of pieces that are tokenised one by one and joined: prompt pieces up to and with the tag
after which the assistant speaks, and response pieces with the token that ends the turn. So the ids of a
prompt are always a prefix of the ids of prompt + response, and generation, scoring and training see the same
ids. Nothing is tokenised across the border.

Templates by name: "safe-rlhf" is `BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}` and the
end-of-sequence token, further turns `USER: {prompt} ASSISTANT:{response}` behind it; "tokenizer" is the
tokenizer's own chat template; "none" the texts alone; "auto" the tokenizer's if it has one, else safe-rlhf.
"""

from saferlhf_fast.data.files import shorten
from saferlhf_fast.errors import UserError

NAMES = ("auto", "tokenizer", "safe-rlhf", "none")

_BEGIN, _USER, _TAG = "BEGINNING OF CONVERSATION: ", "USER: {} ", "ASSISTANT:"
_PROBE = "Zq7"  # stands for an answer where a chat template is examined; occurs in no template
_ANCHOR = "\n"


class Template:
    """Encodes conversations for one tokenizer.

    name: the template's name after `auto` is resolved; stop_ids: the tokens that end a response (generation
    must stop at any of them); tag_length: how many tokens at the end of a prompt are the assistant tag.
    """

    def __init__(self, tokenizer, name="auto"):
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

    # ── Public
    # ────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode_prompts(self, conversations):
        """Messages of many prompts -> list of ids, each with bos (once, where the tokenizer has it) and the
        tag.
        """
        return [
            ids
            for ids, _ in self.encode_pieces(
                [self.pieces(messages, generate=True) for messages in conversations]
            )
        ]

    def encode_responses(self, texts):
        """Many responses (see `response_text`) -> list of ids, without the end of the turn (`end` adds it)."""
        return self._continuations(texts)

    def end(self, ids):
        """Response ids with the end of the turn behind them."""
        return [*ids, *self._end_ids]

    def response_text(self, messages, text, prompt=None):
        """The text that stands between the prompt and the end of the turn: `text` itself, but for chat
        templates that trim it or write something before it. prompt: the rendered messages, if known.
        """
        if self.name != "tokenizer":
            return text
        prompt = self._render(messages, True) if prompt is None else prompt
        whole, end = (
            self._render((*messages, {"role": "assistant", "content": text}), False).rstrip(),
            self._end_text,
        )
        return (
            whole[len(prompt) :].removesuffix(end)
            if whole.startswith(prompt) and whole.endswith(end)
            else text
        )

    def pieces(self, messages, generate=False):
        """Messages -> [(text, is_response)]; the end of turn is not part of a response's text.

        generate: the messages end with a user turn and the assistant tag follows. Otherwise they end with the
        last assistant turn.
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

    def truncate_prompt(self, ids, limit):
        """A prompt's last `limit` ids; bos stays in front where there is one.

        The tag must fit: None when it does not.
        """
        if len(ids) <= limit:
            return ids
        bos = ids[:1] if ids[:1] == [self.tokenizer.bos_token_id] else []
        if limit < self.tag_length + len(bos) + 1:
            return None
        return bos + ids[len(ids) - limit + len(bos) :]

    # ── Pieces
    # ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _text_pieces(self, messages, generate):
        """safe-rlhf and none.

        A system message stands before the user's text: the reference's format has no place for it.
        """
        tagged = self.name == "safe-rlhf"
        pieces, text, system = [], _BEGIN if tagged else "", ""
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

    def _chat_pieces(self, messages, generate):
        """The tokenizer's chat template, cut at the assistant turns.

        The last turn is what the template adds behind the generation prompt (some add more than the text).
        Earlier turns are looked for in order: a turn that the template changes (some drop thoughts from the
        history) stays prompt.
        """
        context = messages if generate else messages[:-1]
        prompt = self._render(context, True)
        pieces, start, cursor = [], 0, 0
        for i, item in enumerate(context):
            content = item["content"].strip()
            begin = cursor
            if item["role"] == "assistant" and i and context[i - 1]["role"] == "user":
                head = self._render(context[:i], True)
                begin = len(head) if len(head) >= cursor and prompt.startswith(head) else cursor
            found = prompt.find(content, begin) if content else -1
            if found < 0:
                continue
            if begin == cursor:
                begin = found
            cursor = found + len(content)
            if item["role"] == "assistant" and prompt.startswith(self._end_text, cursor):
                pieces += [(prompt[start:begin], False), (prompt[begin:cursor], True)]
                start = cursor = cursor + len(self._end_text)
        pieces.append((prompt[start:], False))
        if not generate:
            pieces.append((self.response_text(context, messages[-1]["content"], prompt), True))
        return pieces

    def _render(self, messages, generate):
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"the tokenizer's chat template refuses the conversation ({shorten(error, 80)})"
            ) from error

    def _chat_end(self):
        """What the chat template writes behind an answer, without white space at its end: "<|im_end|>"."""
        whole = self._render(
            ({"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}), False
        )
        if _PROBE not in whole:
            raise UserError("the tokenizer's chat template does not show the assistant's text")
        return whole[whole.rindex(_PROBE) + len(_PROBE) :].rstrip()

    def _tag(self):
        if self.name != "tokenizer":
            return _TAG if self.name == "safe-rlhf" else ""
        ask = ({"role": "user", "content": "x"},)
        plain, asking = self._render(ask, False), self._render(ask, True)
        return asking[len(plain) :] if asking.startswith(plain) else ""

    # ── Tokens
    # ────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode_pieces(self, dialogues):
        """Lists of pieces -> [(ids, mask)].

        All texts go to the tokenizer at once: that is several times faster.
        """
        prompts = self._plain(
            [text for pieces in dialogues for text, is_response in pieces if not is_response]
        )
        responses = self._continuations(
            [text for pieces in dialogues for text, is_response in pieces if is_response]
        )
        prompts, responses, encoded = iter(prompts), iter(responses), []
        for pieces in dialogues:
            ids, mask = list(self._begin), [False] * len(self._begin)
            for _, is_response in pieces:
                piece = self.end(next(responses)) if is_response else next(prompts)
                ids += piece
                mask += [is_response] * len(piece)
            encoded.append((ids, mask))
        return encoded

    def _plain(self, texts):
        if not texts:
            return []
        # verbose=False: the warning about long sequences is not ours to show, lengths are checked by the
        # caller.
        return [
            list(ids)
            for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        ]

    def _continuations(self, texts):
        """Tokenises texts as the continuation of something.

        SentencePiece tokenizers put a space in front of every text. Behind "ASSISTANT:" there is none, so the
        text is tokenised behind a line break, whose tokens are taken away again.
        """
        if not self._anchor:
            return self._plain(texts)
        n, encoded = len(self._anchor), self._plain([_ANCHOR + text for text in texts])
        return [
            ids[n:] if ids[:n] == self._anchor else self._plain([text])[0]
            for ids, text in zip(encoded, texts)
        ]

    def _anchor_ids(self):
        anchor, behind, alone = self._plain([_ANCHOR, _ANCHOR + "a", "a"])
        return anchor if behind[: len(anchor)] == anchor and behind[len(anchor) :] != alone else []

    def _leading_ids(self):
        """[bos] where the tokenizer puts it in front of a text. A chat template writes its own."""
        bos = self.tokenizer.bos_token_id
        if self.name == "tokenizer" or bos is None:
            return []
        ids = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        return [bos] if ids[0] == bos else []
