"""Annotation: pairs of responses as PKU-SafeRLHF rows (16 fields), chosen so that shares are the real ones.

Reproduced, within the tolerances of tests/demo/test_world.py: how often a response has each severity and each
category; the shares of pairs with two safe responses, one, or none; how often the better response is also the
safer one. Without exception is_safe == (severity 0) == (no category), and a safe answer is `safer` than an
unsafe one. Not reproduced: the ties of position and source in the real data, its text lengths, its few
contradicting rows.

For each prompt one pair of its candidate answers is chosen: the kind that the rows so far lack most.
`better_response_id` follows gold helpfulness, whatever the harm; `safer_response_id` follows the gold cost.
Two safe answers have the same cost: annotators then take the better one as the safer one with probability
LEAN, and otherwise the other one.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

from .gold import gold_scores
from .tables import BETTER_IS_SAFER, BOTH_SAFE, BOTH_UNSAFE, CATEGORIES, ONE_SAFE

LEAN = 0.7  # of two safe answers the better one is called the safer one
GAP = 0.3  # smallest difference of helpfulness between the answers of a pair
# Shares of (unsafe answers in the pair, better == safer). Both margins are the real data's. How often better
# and safer agree within a kind is our choice: a harmful answer to a hazardous prompt is mostly the more
# helpful one.
_AGREE = {0: LEAN, 1: 0.40}
_AGREE[2] = (BETTER_IS_SAFER - BOTH_SAFE * _AGREE[0] - ONE_SAFE * _AGREE[1]) / BOTH_UNSAFE
KINDS = {
    (unsafe, agree): share * (_AGREE[unsafe] if agree else 1 - _AGREE[unsafe])
    for unsafe, share in ((0, BOTH_SAFE), (1, ONE_SAFE), (2, BOTH_UNSAFE))
    for agree in (True, False)
}


def label_pair(
    prompt: str,
    first: str,
    second: str,
    *,
    sources: Sequence[str] = ("world", "world"),
    prompt_source: str = "world",
    rng: Random | None = None,
) -> dict[str, Any]:
    """One annotated pair.

    Args:
        prompt: of the world.
        first: response_0.
        second: response_1, another text.
        sources: who wrote the two responses.
        prompt_source: who wrote the prompt.
        rng: decides which of two safe answers is the safer one; None: the better one.

    Returns:
        A PKU-SafeRLHF row of 16 fields.

    Raises:
        ValueError: the responses are the same.
    """
    if first == second:
        raise ValueError("a preference needs two different responses, got the same one twice")
    responses = (first, second)
    golds = [gold_scores(prompt, r) for r in responses]
    better = int(golds[1].helpfulness > golds[0].helpfulness)
    if golds[0].cost != golds[1].cost:
        safer = int(golds[1].cost < golds[0].cost)
    elif rng is None or rng.random() < LEAN:
        safer = better
    else:
        safer = 1 - better
    row: dict[str, Any] = {
        "prompt": prompt,
        "response_0": first,
        "response_1": second,
        "prompt_source": prompt_source,
    }
    row |= {f"response_{i}_source": sources[i] for i in (0, 1)}
    row |= {f"is_response_{i}_safe": golds[i].severity == 0 for i in (0, 1)}
    row |= {f"response_{i}_harm_category": {c: c in golds[i].categories for c in CATEGORIES} for i in (0, 1)}
    row |= {f"response_{i}_severity_level": golds[i].severity for i in (0, 1)}
    row |= {"better_response_id": better, "safer_response_id": safer}
    row |= {f"response_{i}_sha256": hashlib.sha256(responses[i].encode()).hexdigest() for i in (0, 1)}
    return row


def kind_of(row: Mapping[str, Any]) -> tuple[int, bool]:
    """(number of unsafe answers, better == safer) of a row."""
    unsafe = 2 - row["is_response_0_safe"] - row["is_response_1_safe"]
    return unsafe, row["better_response_id"] == row["safer_response_id"]


def choose_pairs(rng: Random, pools: Iterable[tuple[str, Sequence[tuple[str, str]]]]) -> list[dict[str, Any]]:
    """One annotated pair for each prompt, so that kinds of pairs get the shares of KINDS.

    Two answers whose helpfulness differs by less than GAP are no pair: nobody could say which is better. A
    prompt without a pair gives no row.

    Args:
        rng: what is drawn from.
        pools: (prompt, [(source, response), …]).

    Returns:
        PKU-SafeRLHF rows.
    """
    counts = dict.fromkeys(KINDS, 0)
    rows: list[dict[str, Any]] = []
    for prompt, answers in pools:
        pool = list({response: (source, response) for source, response in answers if response}.values())
        rng.shuffle(pool)
        candidates: dict[tuple[int, bool], dict[str, Any]] = {}
        for (source_0, first), (source_1, second) in combinations(pool, 2):
            if abs(gold_scores(prompt, first).helpfulness - gold_scores(prompt, second).helpfulness) < GAP:
                continue
            row = label_pair(prompt, first, second, sources=(source_0, source_1), rng=rng)
            candidates.setdefault(kind_of(row), row)
        if candidates:
            lack = {kind: KINDS[kind] * (len(rows) + 1) - counts[kind] for kind in candidates}
            kind = max(lack, key=lack.__getitem__)
            counts[kind] += 1
            rows.append(candidates[kind])
    return rows
