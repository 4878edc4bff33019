"""A tokenizer's chat template: dialogues as it renders them, and where the answers in them begin and end.

The text is always the template's own. Places in it are found by rendering again:

    begin   behind the generation prompt of the messages before the answer. Where a dialogue does not go on
            from there (the prompt opens a block of thoughts, it has none), behind what they share.
    end     before what the template writes behind an answer, with the end mark. That is known from answers
            that stand for others (`_PROBE`) in a dialogue of the same form.

A template with `{% generation %}` says itself which characters are learned. A dialogue whose answers cannot
be placed is refused (UserError), which callers count.

The end mark is what the template writes behind the last answer and behind earlier ones: "<|end|>" where a
dialogue ends with "<|end|></s>". Where the two have nothing in common, it is that of the last
answer ("<|return|>", not "<|end|>"), and where nothing is behind the last one, a mark that is behind earlier
ones. It may be empty.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from saferlhf_fast.data.files import shorten
from saferlhf_fast.data.records import Message, assistant, user
from saferlhf_fast.data.tool_calls import with_other_arguments, with_probes
from saferlhf_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE, _FIRST, _SECOND, _THIRD = "Zq7xW", "Zq5uK", "Zq6uK", "Zq8uK"  # texts that are in no template
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHTS = re.compile(r"[<\[][^<>\[\]]*think[^<>\[\]]*[>\]]\s*$", re.IGNORECASE)
_MARK = re.compile(r"<[^<>]*>|\[[^\[\]\s]*\]")
UNPLACED = "the place of an answer in the chat template's text cannot be told"


@dataclass(frozen=True, slots=True)
class Answer:
    """Places of one answer in a rendered dialogue (characters)."""

    begin: int
    stop: int
    """End of the answer itself; its end mark follows."""
    end: int
    """End of its end mark."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialogue as text, up to the end mark of its last answer; or a prompt with the tag of an answer."""

    text: str
    learned: tuple[tuple[int, int], ...] = ()
    """(begin, end) of what is learned, in order."""
    last: Answer | None = None
    ended: bool = True
    """Whether the text has an end mark for the last answer."""

    @property
    def end_learned(self) -> bool:
        """Whether the end of the last answer is learned; {% generation %} may leave it out."""
        return not self.ended or (bool(self.learned) and self.learned[-1][1] == len(self.text))


class ChatTemplate:
    """Renders dialogues with a tokenizer's chat template.

    Attributes:
        tag: What the generation prompt adds to a dialogue.
        end: The end mark, with white space before it where the template writes some; "" where it has none.
        tail: All that the template writes behind the last answer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer, self.in_parts = tokenizer, False
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._added = {text for text in added if text.strip()}
        marks = [re.escape(text) for text in added] + [_MARK.pattern, r"\w+", r"\s", "."]
        self._atoms = re.compile("|".join(marks), re.DOTALL)
        dialogue = self._probe_dialogue()
        question = dialogue.index(_FIRST) + len(_FIRST)
        place = dialogue.rindex(_PROBE)
        before, self.tail = dialogue[:place], dialogue[place + len(_PROBE) :]
        prompt, bare = self.render((user(_FIRST),), True), self.render((user(_FIRST),), False)
        base = max(self._common(bare, prompt), question)
        self.tag = prompt[base:]
        between, heads = self._between_turns(base)
        self.ends = self._end_marks(between, before)
        self.end = self.ends[0] if self.ends else ""
        # (head of an answer in a dialogue, the part of it that belongs to the tag)
        self.heads = [(head, self._opening(head)) for head in (before[base:], *heads)]

    @cached_property
    def marks_learned(self) -> bool:
        """Whether the template has {% generation %}."""
        return bool(_GENERATION.search(self.tokenizer.get_chat_template()))

    def render(self, messages: Sequence[Message], generate: bool) -> str:
        """Returns the template's text.

        Args:
            messages: The dialogue; the first message may have the `tools` that it declares.
            generate: Whether the tag of an answer is added.

        Raises:
            UserError: The template refuses the dialogue.
        """
        return self._accepted(messages, generate)[0]

    def _accepted(self, messages: Sequence[Message], generate: bool) -> tuple[str, Sequence[Message]]:
        """Returns the text, and the messages with the arguments of tools in the form that is accepted."""
        import jinja2

        try:
            return self._apply(messages, generate), messages
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            other = with_other_arguments(messages)
            if other is not None:
                try:
                    return self._apply(other, generate), other
                except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
                    pass  # the first error is the one to report
            raise UserError(
                f"the tokenizer's chat template refuses the conversation ({shorten(error, 80)})"
            ) from error

    def dialogue(self, messages: Sequence[Message], last_only: bool = False) -> Rendered:
        """Renders a dialogue that ends with an answer.

        Args:
            messages: The dialogue.
            last_only: Only the last answer is of interest, and its begin.

        Raises:
            UserError: The template refuses the dialogue, does not show a call or a result of a tool, or the
                place of an answer cannot be told.
        """
        full, messages = self._accepted(messages, False)
        self._require_tools_shown(messages)
        places = _Places(self, messages, full)
        stop, end, ended = places.last_end()
        text = full[:end]
        if not ended and self.end:  # behind an answer that is not last the template writes a mark
            text, ended = text + self.end, True
        if self.marks_learned and not last_only:
            learned = self._marked(messages, full, end)
            if learned[-1][1] == end:
                learned[-1] = (learned[-1][0], len(text))
            return Rendered(text, tuple(learned), None, ended)
        last = len(messages) - 1
        answers = []
        for i, item in enumerate(messages[:last]):
            if item["role"] == "assistant" and not last_only:
                begin = places.begin(i)
                answers.append(Answer(begin, *places.end(i, begin)))
        answers.append(Answer(places.begin(last), stop, len(text)))
        position = 0
        for answer in answers:
            if not position <= answer.begin <= answer.stop <= answer.end:
                raise UserError(UNPLACED)
            position = answer.end
        return Rendered(text, tuple((item.begin, item.end) for item in answers), answers[-1], ended)

    def _apply(self, messages: Sequence[Message], generate: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                self._as_given(messages),
                tools=_tools(messages),
                tokenize=False,
                add_generation_prompt=generate,
            )
        )

    def _as_given(self, messages: Sequence[Message]) -> list[Message]:
        """Returns messages as the template takes them: as a list of parts where it shows no other texts."""
        given = []
        for item in messages:
            item = {key: value for key, value in item.items() if key != "tools" and value is not None}
            if self.in_parts and isinstance(item.get("content"), str):
                item["content"] = [{"type": "text", "text": item["content"]}]
            given.append(item)
        return given

    def _probe_dialogue(self) -> str:
        """Returns a dialogue of one question and one answer; decides whether contents are lists of parts."""
        for self.in_parts in (False, True):
            try:
                dialogue = self.render((user(_FIRST), assistant(_PROBE)), False)
            except UserError:
                if self.in_parts:
                    raise
                continue
            if _PROBE in dialogue and _FIRST in dialogue:
                return dialogue
        raise UserError("the tokenizer's chat template does not show the assistant's text")

    def _between_turns(self, base: int) -> tuple[list[str], list[str]]:
        """Returns what is between an answer and the next question, and the heads of earlier answers.

        Both are empty where the template refuses further turns.
        """
        messages = [user(_FIRST), assistant(_PROBE), user(_SECOND), assistant(_PROBE), user(_THIRD)]
        try:
            text = self.render(messages, False)
        except UserError:
            return [], []
        parts = text.split(_PROBE)
        if len(parts) != 3 or _SECOND not in parts[1] or _THIRD not in parts[2]:
            return [], []
        return [parts[1][: parts[1].index(_SECOND)], parts[2][: parts[2].index(_THIRD)]], [parts[0][base:]]

    def _end_marks(self, between: list[str], before: str) -> list[str]:
        """Returns the end marks, that of the last answer first.

        Args:
            between: What the template writes between an answer and the next question, twice.
            before: What it writes before the answer of a dialogue.
        """
        tail = self.tail.rstrip()
        if not between:
            return [tail] if tail else []
        common = tail[: self._common(tail, between[0])].rstrip() if tail else ""
        if common:
            return [common]
        inner = self._inner_mark(between, before)
        return [mark for mark in (tail, inner) if mark]

    def _inner_mark(self, between: list[str], before: str) -> str:
        """Returns the mark behind an earlier answer; "" where only the next question's head is there."""
        atoms, head = self._atoms.findall(between[0]), self._atoms.findall(before[: before.index(_FIRST)])
        n = 0
        while n < min(len(atoms), len(head)) and atoms[-1 - n] == head[-1 - n]:
            n += 1
        own = atoms[: len(atoms) - n]
        while own and own[-1].isspace():
            own.pop()
        if not own:  # the turn before the first question ends as answers do, or there is no mark
            marks = [i for i, atom in enumerate(atoms) if self._is_mark(atom)]
            own = atoms[: marks[0] + 1] if len(marks) > 1 else []
        mark = "".join(own)
        return mark if own and self._is_mark(own[-1]) and between[1].startswith(mark) else ""

    def _opening(self, head: str) -> str:
        """Returns how much of the tag a dialogue's answer begins with."""
        n = self._common(self.tag, head)
        return self.tag if n == len(self.tag) else _THOUGHTS.sub("", self.tag[:n])

    def _is_mark(self, atom: str) -> bool:
        return atom in self._added or _MARK.fullmatch(atom) is not None

    def _common(self, first: str, second: str) -> int:
        """Returns the length of what two texts begin with, in whole words and marks (characters)."""
        n = 0
        for a, b in zip(self._atoms.finditer(first), self._atoms.finditer(second)):
            if a.group() != b.group():
                break
            n = a.end()
        return n

    def _marked(self, messages: Sequence[Message], full: str, end: int) -> list[tuple[int, int]]:
        """Returns what {% generation %} marks before an end."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tools = _tools(messages)
        texts, spans = render_jinja_template(
            conversations=[self._as_given(messages)],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(None, tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        marked = [(begin, min(stop, end)) for begin, stop in spans[0] if begin < min(stop, end)]
        if texts[0] != full or not marked:
            raise UserError("the chat template's {% generation %} marks nothing of the conversation")
        return marked

    def _require_tools_shown(self, messages: Sequence[Message]) -> None:
        """Raises UserError when the template leaves out a call or a result of a tool."""
        probed, wanted = with_probes(messages)
        text = self.render(probed, False) if wanted else ""
        for name, what in wanted:
            if name not in text:
                raise UserError(f"the tokenizer's chat template does not show {what}")


class _Places:
    """Places of the answers of one dialogue in its text."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], full: str) -> None:
        self.template, self.messages, self.full = template, messages, full

    def begin(self, i: int) -> int:
        """Returns where answer i begins.

        Raises:
            UserError: It cannot be told.
        """
        template, full = self.template, self.full
        if i:
            prompt = template.render(self.messages[:i], True)
            if full.startswith(prompt):
                # Behind the result of a tool some templates write the tag in dialogues alone.
                tag = "" if prompt.endswith(template.tag) else template.tag
                return len(prompt) + (len(tag) if full.startswith(tag, len(prompt)) else 0)
            if template.tag and prompt.endswith(template.tag):
                base = prompt.removesuffix(template.tag)
                for opening in sorted({opening for _, opening in template.heads}, key=len, reverse=True):
                    if full.startswith(base + opening):
                        return len(base + opening)
        # Earlier turns differ (thoughts that are dropped later), or the answer is the first message.
        before, _ = self._around(i)
        for head, opening in template.heads:
            if before.endswith(head):
                place = len(before) - len(head) + len(opening)
                if full.startswith(before[:place]):
                    return place
        raise UserError(UNPLACED)

    def last_end(self) -> tuple[int, int, bool]:
        """Returns where the last answer and its end mark end, and whether it has a mark."""
        tail, full = self.template.tail, self.full
        if not full.endswith(tail):  # it ends otherwise, e.g. with a call of a tool
            end = len(full.rstrip())
            return end, end, bool(tail.strip())
        stop = len(full) - len(tail)
        return (stop, stop + len(self.template.end), True) if tail.strip() else (stop, stop, False)

    def end(self, i: int, begin: int) -> tuple[int, int]:
        """Returns where answer i, which is not the last one and begins at `begin`, and its end mark end.

        Raises:
            UserError: It cannot be told.
        """
        full, item = self.full, self.messages[i]
        bare: int | None = None  # end of the answer where no mark follows it
        if not item.get("tool_calls"):
            content = item["content"]
            if content and content == content.strip() and full.startswith(content, begin):
                for mark in self.template.ends:
                    if full.startswith(mark, begin + len(content)):
                        return begin + len(content), begin + len(content) + len(mark)
            _, after = self._around(i)
            if full.endswith(after):
                stop = len(full) - len(after)
                for mark in self.template.ends:
                    if full.startswith(mark, stop):
                        return stop, stop + len(mark)
                if not self.template.ends:
                    return stop, stop
                bare = stop
        alone = self.template.render(self.messages[: i + 1], False).rstrip()
        if full.startswith(alone):
            return len(alone), len(alone)
        for own in self.template.ends:  # the template ends it otherwise where it is the last one
            content = alone.removesuffix(own)
            for mark in self.template.ends:
                if content != alone and full.startswith(content + mark):
                    return len(content), len(content) + len(mark)
        if bare is None:
            raise UserError(UNPLACED)
        return bare, bare  # the template marks the end of a dialogue alone

    def _around(self, i: int) -> tuple[str, str]:
        """Returns the texts before and behind an answer that stands for answer i.

        Raises:
            UserError: The template does not show it once.
        """
        messages = [*self.messages[:i], {**self.messages[i], "content": _PROBE}, *self.messages[i + 1 :]]
        before, *after = self.template.render(messages, False).split(_PROBE)
        if len(after) != 1:
            raise UserError(UNPLACED)
        return before, after[0]


def _tools(messages: Sequence[Message]) -> list[Any] | None:
    return messages[0].get("tools") if messages else None
