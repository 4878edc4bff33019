"""Makes examples of rows: tokenises them, compares them with the longest length, and counts them.

`sft_examples`, `preference_examples` and `prompt_examples` take a recipe's `data` and return (examples,
Report). An answer is never cut: a record whose answers do not fit is dropped and counted. A prompt of more
than half of max_length is cut first: it loses its beginning, never the assistant tag. Lengths count tokens,
including the end of the turn.

A record with a mistake ends the loading (UserError with file, row and field). What is only counted: ties,
identical responses, empty responses, labels that contradict each other, dialogues without an answer, and
examples that are too long.

Harm labels (safety, severity, categories of each response) are read with `labels=True` only. Otherwise their
columns are ignored, so that a stage that does not use them neither spends time on them nor loses a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from saferlhf_fast.config.setting_types import Data
from saferlhf_fast.data.chat_template import Rendered
from saferlhf_fast.data.counted_records import (
    EMPTY,
    SHORTENED,
    each_accepted,
    flag_disagreeing,
    records_of,
    require_record,
)
from saferlhf_fast.data.pair_template import PairTemplate, template_of
from saferlhf_fast.data.pairs import KINDS as KINDS
from saferlhf_fast.data.pairs import PairExample as PairExample
from saferlhf_fast.data.pairs import preference_examples as preference_examples
from saferlhf_fast.data.records import Conversation, HarmLabel, Message, Messages, prompt_of, prompt_text
from saferlhf_fast.data.report import Report, SourceReport
from saferlhf_fast.data.templates import Pieces, Template
from saferlhf_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


UNMATCHED = "the chat template changes the turns, so that the one with the weight 0 cannot be found"
UNLEARNED_END = "the chat template's {% generation %} leaves out the end of an answer, which is not learned"


@dataclass(frozen=True, slots=True)
class SFTExample:
    """A dialogue to imitate."""

    ids: list[int]
    """Token ids [L]."""
    mask: list[bool]
    """True on the tokens to learn: assistant turns and their ends [L]."""
    prompt_text: str = ""
    labels: tuple[HarmLabel, ...] = ()
    """(HarmLabel of the last answer,); () when labels were not requested."""


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt that waits for a response."""

    ids: list[int]
    """Token ids with the assistant tag at the end [L]."""
    text: str
    """The prompt as a user wrote it."""
    messages: Messages
    meta: dict[str, Any] = field(default_factory=dict)
    """Other short fields of the row, e.g. the category."""

    @property
    def prompt_text(self) -> str:
        """The same as `text`: other examples have the prompt under this name."""
        return self.text


def sft_examples(
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    template_name: str = "auto",
    max_length: int = 512,
    seed: int = 0,
    labels: bool = False,
) -> tuple[list[SFTExample], Report]:
    """Makes examples of instruction data.

    Args:
        data: A recipe's `data`.
        tokenizer: The tokenizer of the model.
        template_name: One of templates.NAMES.
        max_length: Longest prompt + response (tokens).
        seed: Seed of the rows that sources with a count or a proportion draw.
        labels: Read the harm labels of the last answers.

    Returns:
        The examples in the order of the data, and the counts.

    Raises:
        UserError: A source cannot be read, a record has a mistake, or no example is left.
    """
    template, report = Template(tokenizer, template_name), Report()
    examples: list[SFTExample] = []
    for counts, records in records_of(data, seed, report, labels):
        examples += [example for example, _ in encode_conversations(counts, records, template, max_length)]
    report.require("conversation")
    return examples, report


def encode_conversations(
    counts: SourceReport, records: Sequence[Conversation], template: Template, max_length: int
) -> list[tuple[SFTExample, str]]:
    """Returns [(example, its place)] of records of one source.

    Args:
        counts: Gets the counts of what is kept, dropped and flagged.
        records: The records.
        template: The template of the model's tokenizer.
        max_length: Longest prompt + response (tokens).

    Raises:
        UserError: The source's format gives no conversations.
    """
    require_record(
        counts, Conversation, "conversations (messages, prompt and completion, instruction and output …)"
    )
    answered = _with_answers(counts, template, records)
    split = each_accepted(
        counts,
        answered,
        lambda record: (
            [(record.messages[0]["content"], True)]
            if record.is_document
            else template.pieces(record.messages)
        ),
    )
    examples = []
    for record, pieces, ids, mask in _encoded(template, split):
        if not record.is_document and template.has_no_token(pieces, mask):
            counts.drop(EMPTY, record.where)
            continue
        start = mask.index(True)
        prompt = template.fit_prompt(ids[:start], len(ids) - start, max_length)
        if prompt is None:
            counts.drop(f"prompt + response is longer than {max_length} tokens", record.where)
            continue
        if len(prompt) < start:
            counts.flag(SHORTENED, record.where)
        if not template.learns_end(pieces):
            counts.flag(UNLEARNED_END, record.where)
        learned = without_unlearned(record.messages, pieces, mask)
        if learned is None:
            counts.drop(UNMATCHED, record.where)
            continue
        counts.kept += 1
        example = SFTExample(
            prompt + ids[start:],
            [False] * len(prompt) + learned[start:],
            prompt_text(_opening(record.messages)),
            record.labels,
        )
        examples.append((example, record.where))
        flag_disagreeing(counts, record)
    return examples


def prompt_examples(
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    template_name: str = "auto",
    max_prompt_length: int = 256,
    seed: int = 0,
) -> tuple[list[PromptExample], Report]:
    """Makes examples of the prompts in any data: each prompt once, long ones without their beginning.

    Args:
        data: A recipe's `data`.
        tokenizer: The tokenizer of the model.
        template_name: One of templates.NAMES.
        max_prompt_length: Longest prompt (tokens).
        seed: Seed of the rows that sources with a count or a proportion draw.

    Returns:
        The examples in the order of the data, and the counts.

    Raises:
        UserError: A source cannot be read, a record has a mistake, no example is left, or max_prompt_length
            is too short for the assistant tag.
    """
    template, report = Template(tokenizer, template_name), Report()
    examples: list[PromptExample] = []
    place_of: dict[str, str] = {}  # prompt -> where it first occurs
    if max_prompt_length <= template.tag_length + 1:
        raise UserError(
            f"max_prompt_length: expected more than the {template.tag_length + 1} tokens of the assistant "
            f"tag, got {max_prompt_length}"
        )
    for counts, records in records_of(data, seed, report):
        new_prompts = []
        for record in records:
            messages = record.messages if not isinstance(record, Conversation) else prompt_of(record.messages)
            text = prompt_text(messages)
            if not text.strip():
                counts.drop("an empty prompt", record.where)
            elif text in place_of:
                if place_of[text] != record.where:  # several records of one row repeat its prompt
                    counts.drop("the prompt occurs before", record.where)
            else:
                place_of[text] = record.where
                new_prompts.append((record, messages, text))
        split = each_accepted(counts, new_prompts, lambda item: template.pieces(item[1], generate=True))
        encoded = template.encode_pieces([pieces for _, pieces in split])
        for ((record, messages, text), _), (ids, _) in zip(split, encoded):
            if len(ids) > max_prompt_length:
                counts.flag(SHORTENED, record.where)
                shorter = template.truncate_prompt(ids, max_prompt_length)
                assert shorter is not None, "max_prompt_length has room for the assistant tag"
                ids = shorter
            counts.kept += 1
            examples.append(PromptExample(ids, text, messages, getattr(record, "meta", {})))
    report.require("prompt")
    return examples, report


def retokenize(
    prompts: Sequence[Sequence[Message]],
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    template_name: str = "auto",
    max_length: int | None = None,
    ended: Sequence[bool] | None = None,
) -> list[list[int]]:
    """Returns the ids of prompt + response for a score model whose tokenizer is not the actor's.

    Args:
        prompts: The messages of each prompt.
        texts: The response to each.
        tokenizer: The tokenizer of the score model.
        template_name: One of templates.NAMES, or what `pair_template.pair_name` makes of it.
        max_length: Longest prompt + response (tokens): a longer one loses the beginning of its prompt, and
            the end of its response only where that alone is too long.
        ended: Whether each response has the end of its turn; all have it when not given.
    """
    template = template_of(tokenizer, template_name)
    return [head + tail for head, tail in retokenize_split(prompts, texts, template, max_length, ended)]


def retokenize_split(
    prompts: Sequence[Sequence[Message]],
    texts: Sequence[str],
    template: Template | PairTemplate,
    max_length: int | None = None,
    ended: Sequence[bool] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """As `retokenize`, with a template that exists: (ids of the prompt, ids of the response) of each."""
    split = []
    for head, tail in template.encode_scored(prompts, texts, [True] * len(texts) if ended is None else ended):
        if max_length is not None and len(head) + len(tail) > max_length:
            least = min(len(head), template.tag_length + 2)
            tail = template.cut_response(tail, max_length - least)
            head = template.truncate_prompt(head, max_length - len(tail)) or head[-least:]
        split.append((head, tail))
    return split


def _encoded(
    template: Template, answered: Sequence[tuple[Conversation, Pieces]]
) -> Iterator[tuple[Conversation, Pieces, list[int], list[bool]]]:
    """Yields (record, its pieces, ids, mask): mask is True on responses and on all of a document."""
    if not answered or not answered[0][0].is_document:  # a source has documents alone or none
        encoded = template.encode_pieces([pieces for _, pieces in answered])
        yield from ((*item, ids, mask) for item, (ids, mask) in zip(answered, encoded))
        return
    plain = Template(template.tokenizer, "none")
    bos = template.tokenizer.bos_token_id
    texts: list[Pieces] = [[(record.messages[0]["content"], False)] for record, _ in answered]
    for (record, pieces), (ids, _) in zip(answered, plain.encode_pieces(texts)):
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]  # the text brings its own
        begin = int(ids[:1] == [bos])
        if ids[-1] not in plain.stop_ids:
            ids = plain.end(ids)
        yield record, pieces, ids, [False] * begin + [True] * (len(ids) - begin)


def without_unlearned(messages: Messages, pieces: Pieces, mask: list[bool]) -> list[bool] | None:
    """Returns a mask that is False on the turns with the weight 0.

    Args:
        messages: The dialogue.
        pieces: Its pieces.
        mask: True on all responses.

    Returns:
        None where no response is left, or where the chat template changes the turns so that it is unknown
        which one a response is.
    """
    turns = [item for item in messages if item["role"] == "assistant"]
    if all(item.get("weight") != 0 for item in turns):
        return mask
    if isinstance(pieces, Rendered):
        answers = [pieces.text[begin:end] for begin, end in pieces.learned]
    else:
        answers = [text for text, is_response in pieces if is_response]
    runs = [list(run) for is_learned, run in groupby(range(len(mask)), mask.__getitem__) if is_learned]
    if len(answers) != len(runs):
        return None
    remaining = iter(turns)
    learned = list(mask)
    for answer, run in zip(answers, runs):
        # A template may leave some turns in the prompt: then the texts tell which ones.
        turn = next(
            (item for item in remaining if len(answers) == len(turns) or item["content"].strip() in answer),
            None,
        )
        if turn is None:
            return None
        for i in run if turn.get("weight") == 0 else ():
            learned[i] = False
    return learned if any(learned) else None


def _opening(messages: Messages) -> Messages:
    """Returns a dialogue's messages before its first answer, which are its prompt in a split by prompt.

    Of a document they are the document.
    """
    first = next(i for i, item in enumerate(messages) if item["role"] == "assistant")
    return messages[:first] or messages[:1]


def _with_answers(
    counts: SourceReport, template: Template, records: Sequence[Conversation]
) -> list[Conversation]:
    """Returns the dialogues in which each assistant turn has text, or calls tools, and counts the others."""
    answered = []
    for record in records:
        answers = [item for item in record.messages if item["role"] == "assistant"]
        if all(template.answer_text(a["content"]).strip() or a.get("tool_calls") for a in answers):
            answered.append(record)
        else:
            counts.drop(EMPTY, record.where)
    return answered
