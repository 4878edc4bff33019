"""Rows -> examples: tokenised, checked against the length, counted.

`sft_examples`, `preference_examples` and `prompt_examples` take a recipe's `data` and return (examples,
Report). An answer is never cut: a record whose answers do not fit is dropped and counted. A prompt of more
than half of max_length gives way first: it loses its beginning, never the assistant tag. Lengths count
tokens, the end of the turn included.

A record with a mistake in it ends the loading (UserError with file, row and field). These do not; they are
counted: ties, identical responses, empty responses, labels that contradict each other, dialogues without an
answer, too long.

Harm labels (safety, severity, categories of each response) are read where they are asked for: `labels=True`.
Else their columns are not looked at, so that a stage without use for them neither pays for them nor loses a
row over them.
"""

from dataclasses import dataclass, field, replace

from saferlhf_fast.data.formats import FORMATS, format_of, with_labels
from saferlhf_fast.data.records import (
    SAFE,
    UNKNOWN,
    UNSAFE,
    Conversation,
    Dropped,
    Preference,
    Prompt,
    prompt_of,
    prompt_text,
)
from saferlhf_fast.data.report import Report, SourceReport
from saferlhf_fast.data.sources import load_sources
from saferlhf_fast.data.templates import Template
from saferlhf_fast.errors import UserError

KINDS = {"reward": "better", "better": "better", "cost": "safer", "safer": "safer"}
"""Kind of preference examples -> the label that says which response comes first."""

TIE = "the label is a tie"
IDENTICAL = "the two responses are identical"
EMPTY = "a response with no token"
INCONSISTENT = "the safer response is labelled unsafe and the other safe"
UNSIGNED = "no safety label of each response"
CONTRADICTED = "other labels of the same responses contradict this one"
DISAGREEING = "safety, severity and categories of a response contradict each other"


@dataclass(frozen=True, slots=True)
class SFTExample:
    """A dialogue to imitate."""

    ids: list
    """Token ids [L]."""
    mask: list
    """True on the tokens to learn: all assistant turns and their ends [L]."""
    prompt_text: str = ""
    labels: tuple = ()
    """(HarmLabel of the last answer,); () when labels were not asked for."""


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two responses to one prompt; first is the better or safer one."""

    first_ids: list
    """Prompt + preferred response [L1]."""
    second_ids: list
    """Prompt + other response [L2]."""
    prompt_length: int
    """The prompt's tokens, the same in both."""
    prompt_text: str
    sign_first: int = UNKNOWN
    """+1 unsafe, -1 safe, 0 unknown."""
    sign_second: int = UNKNOWN
    first_text: str = ""
    second_text: str = ""
    flagged: bool = False
    """Other labels contradict this one's."""
    labels: tuple = ()
    """(HarmLabel of the first response, HarmLabel of the second); () when labels were not asked for."""


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt that waits for a response."""

    ids: list
    """Token ids with the assistant tag at the end [L]."""
    text: str
    """The prompt as a user wrote it."""
    messages: tuple
    meta: dict = field(default_factory=dict)
    """Other short fields of the row, e.g. the category."""

    @property
    def prompt_text(self):
        return self.text


def sft_examples(data, tokenizer, template_name="auto", max_length=512, seed=0, labels=False):
    """Instruction data -> ([SFTExample], Report). labels: read the harm labels of the last answers."""
    template, report, examples = Template(tokenizer, template_name), Report(), []
    for counts, records in _sources(data, seed, report, labels):
        _need(
            counts, Conversation, "conversations (messages, prompt and completion, instruction and output …)"
        )
        pieces = _each(counts, records, lambda record: template.pieces(record.messages))
        kept = []
        for record, parts in pieces:
            if any(is_response and not text.strip() for text, is_response in parts):
                counts.drop(EMPTY, record.where)
            else:
                kept.append((record, parts))
        for (record, parts), (ids, mask) in zip(kept, template.encode_pieces([parts for _, parts in kept])):
            start = mask.index(True)
            prompt = _fit(template, ids[:start], len(ids) - start, max_length)
            if prompt is None:
                counts.drop(f"prompt + response is longer than {max_length} tokens", record.where)
                continue
            if len(prompt) < start:
                counts.flag("the prompt lost its beginning", record.where)
            if sum(mask) == len(template.end([])) * sum(is_response for _, is_response in parts):
                counts.drop(EMPTY, record.where)  # the tokenizer makes nothing of the text
                continue
            counts.kept += 1
            examples.append(
                SFTExample(
                    prompt + ids[start:],
                    [False] * len(prompt) + mask[start:],
                    prompt_text(_opening(record.messages)),
                    record.labels,
                )
            )
            _flag_disagreeing(counts, record)
    report.require("conversation")
    return examples, report


def preference_examples(
    data, tokenizer, template_name="auto", max_length=512, seed=0, kind="reward", labels=False
):
    """Preference data -> ([PairExample], Report). kind: reward or better (first = more helpful), cost (first
    = safer, both signs known), safer (first = safer). labels: read the harm labels of both responses.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    template, report, examples = Template(tokenizer, template_name), Report(), []
    for counts, records in _sources(data, seed, report, labels):
        _need(counts, Preference, "preferences (two responses with labels, or chosen and rejected)")
        pairs = _labelled(counts, records, kind)
        pieces = _each(
            counts,
            pairs,
            lambda pair: (
                template.pieces(pair[0].messages, generate=True),
                [template.response_text(pair[0].messages, text) for text in pair[0].responses],
            ),
        )
        prompts = template.encode_pieces([prompt for _, (prompt, _) in pieces])
        known = dict.fromkeys(text for _, (_, texts) in pieces for text in texts)
        # each text once: references repeat
        known = dict(zip(known, template.encode_responses(list(known))))
        for ((record, first), (_, texts)), (prompt, _) in zip(pieces, prompts):
            responses = [known[text] for text in texts]
            if not all(responses):
                counts.drop(EMPTY, record.where)
                continue
            if responses[0] == responses[1]:
                counts.drop(IDENTICAL, record.where)
                continue
            responses = [template.end(ids) for ids in responses]
            kept = _fit(template, prompt, max(map(len, responses)), max_length)
            if kept is None:
                counts.drop(f"prompt + response is longer than {max_length} tokens", record.where)
                continue
            if len(kept) < len(prompt):
                counts.flag("the prompt lost its beginning", record.where)
            counts.kept += 1
            _flag_disagreeing(counts, record)
            examples.append((_pair(record, first, kept, responses), counts, record.where))
    report.require("preference")
    return _flag_contradictions(examples, KINDS[kind] == "safer"), report


def prompt_examples(data, tokenizer, template_name="auto", max_prompt_length=256, seed=0):
    """Prompts of any data -> ([PromptExample], Report). Each prompt once; long ones keep their end."""
    template, report, examples, seen = Template(tokenizer, template_name), Report(), [], {}
    if max_prompt_length <= template.tag_length + 1:
        raise UserError(
            f"max_prompt_length: expected more than the {template.tag_length + 1} tokens of the assistant "
            f"tag, "
            f"got {max_prompt_length}"
        )
    for counts, records in _sources(data, seed, report):
        kept = []
        for record in records:
            messages = record.messages if not isinstance(record, Conversation) else prompt_of(record.messages)
            text = prompt_text(messages)
            if not text.strip():
                counts.drop("an empty prompt", record.where)
            elif text in seen:
                if seen[text] != record.where:  # several records of one row are not worth a word
                    counts.drop("the prompt occurs before", record.where)
            else:
                seen[text] = record.where
                kept.append((record, messages, text))
        pieces = _each(counts, kept, lambda item: template.pieces(item[1], generate=True))
        for ((record, messages, text), _), (ids, _) in zip(
            pieces, template.encode_pieces([p for _, p in pieces])
        ):
            if len(ids) > max_prompt_length:
                counts.flag("the prompt lost its beginning", record.where)
                ids = template.truncate_prompt(ids, max_prompt_length)
            counts.kept += 1
            examples.append(PromptExample(ids, text, messages, getattr(record, "meta", {})))
    report.require("prompt")
    return examples, report


def retokenize(prompts, texts, tokenizer, template_name="auto", max_length=None, ended=None):
    """The ids of prompt + response for another tokenizer -> list of ids: for score models that do not share
    the actor's.

    prompts: list of messages; texts: the responses; ended: a bool for each, whether the end of the turn was
    produced and is put behind (all, when not given). With max_length a prompt loses its beginning where both
    are too long for it, and a response its end only where it is too long by itself.
    """
    template = Template(tokenizer, template_name)
    heads = template.encode_prompts(prompts)
    tails = template.encode_responses([template.response_text(m, text) for m, text in zip(prompts, texts)])
    joined = []
    for head, tail, end in zip(heads, tails, [True] * len(tails) if ended is None else ended):
        tail = template.end(tail) if end else tail
        if max_length is not None and len(head) + len(tail) > max_length:
            least = min(len(head), template.tag_length + 2)
            tail = tail[: max_length - least]
            head = template.truncate_prompt(head, max_length - len(tail)) or head[-least:]
        joined.append(head + tail)
    return joined


# ── Helpers
# ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _sources(data, seed, report, labels=False):
    """Yields (SourceReport, records) per source; what the formats drop is counted already. labels: with harm
    labels.
    """
    for item in load_sources(data, seed):
        name, form = format_of(item.rows, item.source.format, item.source.path)
        counts = SourceReport(item.source.path, name, item.available, len(item.rows))
        report.sources.append(counts)
        records = []
        for row in item.rows:
            for record in form.parse(row):
                if labels and not isinstance(record, (Dropped, Prompt)):
                    record = with_labels(form, row, record)
                if isinstance(record, Dropped):
                    counts.drop(record.reason, record.where)
                else:
                    records.append(record)
        yield counts, records


def _need(counts, record, wanted):
    if FORMATS[counts.format].record is not record:
        raise UserError(f"{counts.path}: expected {wanted}, got the format {counts.format}")


def _each(counts, items, function):
    """[(item, function(item))]; items that the chat template refuses are counted."""
    made = []
    for item in items:
        try:
            made.append((item, function(item)))
        except UserError as error:
            counts.drop(str(error), (item[0] if isinstance(item, tuple) else item).where)
    return made


def _opening(messages):
    """A dialogue's messages before its first answer: what tells two dialogues apart in a split by prompt."""
    first = next(i for i, item in enumerate(messages) if item["role"] == "assistant")
    return messages[:first] or messages[:1]


def _fit(template, prompt, response_length, max_length):
    """The prompt, cut at its beginning if it must be; None when the response leaves it less than half and too
    little.
    """
    if len(prompt) + response_length <= max_length:
        return prompt
    room = max_length - response_length
    return template.truncate_prompt(prompt, room) if room >= max_length // 2 else None


def _labelled(counts, records, kind):
    """[(record, index of the first response)] of the records whose labels serve this kind."""
    pairs = []
    for record in records:
        first = getattr(record, KINDS[kind])
        signs = record.signs
        if kind in ("reward", "better") and first is None and counts.format == "pku":
            raise UserError(f"{record.where}: no field 'better_response_id' (expected 0 or 1)")
        if record.tie and first is None:
            counts.drop(TIE, record.where)
        elif first is None:
            counts.drop(f"no label of which response is {KINDS[kind]}", record.where)
        elif record.responses[0] == record.responses[1]:
            counts.drop(IDENTICAL, record.where)
        elif not all(text.strip() for text in record.responses):
            counts.drop(EMPTY, record.where)
        elif kind == "cost" and UNKNOWN in signs:
            counts.drop(UNSIGNED, record.where)
        elif KINDS[kind] == "safer" and (signs[first], signs[1 - first]) == (UNSAFE, SAFE):
            counts.drop(INCONSISTENT, record.where)
        else:
            pairs.append((record, first))
    return pairs


def _pair(record, first, prompt, responses):
    second = 1 - first
    return PairExample(
        prompt + responses[first],
        prompt + responses[second],
        len(prompt),
        prompt_text(record.messages),
        record.signs[first],
        record.signs[second],
        record.responses[first],
        record.responses[second],
        record.flagged,
        tuple(record.labels[i] for i in (first, second)) if record.labels else (),
    )


def _flag_disagreeing(counts, record):
    if any(label.contradicts_itself for label in record.labels):
        counts.flag(DISAGREEING, record.where)


def _flag_contradictions(made, by_sign):
    """[(PairExample, SourceReport, where)] -> [PairExample].

    Flags those whose file says so, those of which the same two responses also occur the other way round, and
    (by_sign) those with a response that is called safe here and unsafe elsewhere. They are kept: what to do
    with them is the caller's choice.
    """
    order = {(pair.prompt_text, pair.first_text, pair.second_text) for pair, _, _ in made}
    signed = {(pair.prompt_text, text, sign) for pair, _, _ in made for text, sign in _signed(pair)}
    examples = []
    for pair, counts, where in made:
        reversed_too = (pair.prompt_text, pair.second_text, pair.first_text) in order
        other_sign = by_sign and any(
            (pair.prompt_text, text, -sign) in signed for text, sign in _signed(pair)
        )
        if pair.flagged or reversed_too or other_sign:
            counts.flag(CONTRADICTED, where)
            pair = replace(pair, flagged=True)
        examples.append(pair)
    return examples


def _signed(pair):
    """[(text, sign)] of the responses whose sign is known."""
    both = ((pair.first_text, pair.sign_first), (pair.second_text, pair.sign_second))
    return [(text, sign) for text, sign in both if sign != UNKNOWN]
