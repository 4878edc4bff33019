"""Makes examples of preference data: pairs of responses to one prompt.

Pairs that cannot be used are counted (ties, identical responses, empty responses, labels that contradict
each other, too long). Pairs that other pairs contradict are used and flagged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from saferlhf_fast.config.setting_types import Data
from saferlhf_fast.data.counted_records import (
    EMPTY,
    SHORTENED,
    each_accepted,
    flag_disagreeing,
    records_of,
    require_record,
)
from saferlhf_fast.data.pair_template import PairTemplate, template_of
from saferlhf_fast.data.records import SAFE, UNKNOWN, UNSAFE, HarmLabel, Preference, prompt_text
from saferlhf_fast.data.report import Report, SourceReport
from saferlhf_fast.data.templates import Template
from saferlhf_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = {"reward": "better", "better": "better", "cost": "safer", "safer": "safer"}
"""Kind of preference examples -> the label that says which response comes first."""

TIE = "the label is a tie"
IDENTICAL = "the two responses are identical"
INCONSISTENT = "the safer response is labelled unsafe and the other safe"
UNSIGNED = "no safety label of each response"
CONTRADICTED = "other labels of the same responses contradict this one"


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two responses to one prompt; first is the better or safer one."""

    first_ids: list[int]
    """Prompt + preferred response [L1]."""
    second_ids: list[int]
    """Prompt + other response [L2]."""
    prompt_length: int
    """Tokens of the prompt, which is the same in both."""
    prompt_text: str
    sign_first: int = UNKNOWN
    """+1 unsafe, -1 safe, 0 unknown."""
    sign_second: int = UNKNOWN
    first_text: str = ""
    second_text: str = ""
    flagged: bool = False
    """Other labels contradict those of this pair."""
    labels: tuple[HarmLabel, ...] = ()
    """(HarmLabel of the first response, HarmLabel of the second); () when labels were not requested."""
    second_at: int | None = None
    """Where tokens begin to have the type 1, as an encoder's tokenizer gives the second text of a pair."""


def preference_examples(
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    template_name: str = "auto",
    max_length: int = 512,
    seed: int = 0,
    kind: str = "reward",
    labels: bool = False,
) -> tuple[list[PairExample], Report]:
    """Makes examples of preference data.

    Args:
        data: A recipe's `data`.
        tokenizer: The tokenizer of the model.
        template_name: One of templates.NAMES, or what `pair_template.pair_name` makes of it.
        max_length: Longest prompt + response (tokens).
        seed: Seed of the rows that sources with a count or a proportion draw.
        kind: A key of KINDS. The first response is the more helpful one (reward, better) or the safer one
            (cost, safer); with cost the safety signs of both must be known.
        labels: Read the harm labels of both responses.

    Returns:
        The examples in the order of the data, and the counts.

    Raises:
        UserError: A source cannot be read, a record has a mistake, or no example is left.
        ValueError: kind is not in KINDS.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    template, report = template_of(tokenizer, template_name), Report()
    examples: list[tuple[PairExample, SourceReport, str]] = []
    for counts, records in records_of(data, seed, report, labels):
        encoded = encode_preferences(counts, records, template, max_length, kind)
        examples += [(pair, counts, where) for pair, where in encoded]
    report.require("preference")
    return _flag_contradictions(examples, KINDS[kind] == "safer"), report


def encode_preferences(
    counts: SourceReport,
    records: Sequence[Preference],
    template: Template | PairTemplate,
    max_length: int,
    kind: str,
) -> list[tuple[PairExample, str]]:
    """Returns [(pair, its place)] of records of one source; what others contradict is not flagged yet.

    Args:
        counts: Gets the counts of what is kept, dropped and flagged.
        records: The records.
        template: The template of the model's tokenizer.
        max_length: Longest prompt + response (tokens).
        kind: A key of KINDS.

    Raises:
        UserError: The source's format gives no preferences.
    """
    require_record(counts, Preference, "preferences (two responses with labels, or chosen and rejected)")
    pairs = _labelled(counts, records, kind)
    split = each_accepted(counts, pairs, lambda pair: template.answers(pair[0].messages, pair[0].responses))
    encoded = template.encode_answers([answers for _, answers in split])
    examples = []
    for ((record, first), _), (prompt, responses) in zip(split, encoded):
        if not all(responses):
            counts.drop(EMPTY, record.where)
            continue
        if responses[0] == responses[1]:
            counts.drop(IDENTICAL, record.where)
            continue
        fitting = template.fit_prompt(prompt, max(map(len, responses)), max_length)
        if fitting is None:
            counts.drop(f"prompt + response is longer than {max_length} tokens", record.where)
            continue
        if len(fitting) < len(prompt):
            counts.flag(SHORTENED, record.where)
        counts.kept += 1
        flag_disagreeing(counts, record)
        pair = _pair(record, first, fitting, responses)
        if template.marks_second:
            pair = replace(pair, second_at=len(fitting))
        examples.append((pair, record.where))
    return examples


def _labelled(counts: SourceReport, records: Iterable[Preference], kind: str) -> list[tuple[Preference, int]]:
    """Returns [(record, index of the first response)] of the records with the labels that this kind needs."""
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


def _pair(record: Preference, first: int, prompt: list[int], responses: list[list[int]]) -> PairExample:
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


def _flag_contradictions(
    candidates: list[tuple[PairExample, SourceReport, str]], by_sign: bool
) -> list[PairExample]:
    """Flags pairs whose labels others contradict: (pair, its source's counts, its place) -> pairs.

    These are pairs that their file flags, pairs whose two responses also occur in the other order, and
    (by_sign) pairs with a response that is labelled safe here and unsafe elsewhere, or the reverse. The
    caller decides what to do with them.
    """
    order = {(pair.prompt_text, pair.first_text, pair.second_text) for pair, _, _ in candidates}
    signed = {(pair.prompt_text, text, sign) for pair, _, _ in candidates for text, sign in _signed(pair)}
    examples = []
    for pair, counts, where in candidates:
        reversed_too = (pair.prompt_text, pair.second_text, pair.first_text) in order
        other_sign = by_sign and any(
            (pair.prompt_text, text, -sign) in signed for text, sign in _signed(pair)
        )
        if pair.flagged or reversed_too or other_sign:
            counts.flag(CONTRADICTED, where)
            pair = replace(pair, flagged=True)
        examples.append(pair)
    return examples


def _signed(pair: PairExample) -> list[tuple[str, int]]:
    """Returns [(text, sign)] of the responses whose sign is known."""
    both = ((pair.first_text, pair.sign_first), (pair.second_text, pair.sign_second))
    return [(text, sign) for text, sign in both if sign != UNKNOWN]
