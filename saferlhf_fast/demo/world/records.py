"""Annotation: pairs of responses as PKU-SafeRLHF rows (16 fields), and the choice of pairs that gives their
shares.

Reproduced within the tolerances of tests/demo/test_world.py: severity shares of positions; shares of both
safe, one safe, both unsafe; share of better == safer; categories by position; is_safe == (severity 0) == (no
category) without exception; a safe answer is `safer` than an unsafe one, always. Not reproduced: the ties of
position and source in the real data, its text lengths, its few contradicting rows.

The shares come from choosing, for each prompt, one pair of its candidate answers: the kind the rows so far
lack most. `better_response_id` follows gold helpfulness, whatever the harm; `safer_response_id` the gold
cost. Two safe answers differ in no harm, so annotators mostly side with the better one (LEAN) and else with
the other.
"""

import hashlib
from itertools import combinations

from .gold import gold_scores
from .tables import BETTER_IS_SAFER, BOTH_SAFE, BOTH_UNSAFE, CATEGORIES, ONE_SAFE

LEAN, GAP = 0.7, 0.3
# Shares of (unsafe answers in the pair, better == safer). Both margins are the real data's; how often the two
# agree within a kind is ours: a harmful answer to a hazardous prompt is mostly the more helpful one.
_AGREE = {0: LEAN, 1: 0.40}
_AGREE[2] = (BETTER_IS_SAFER - BOTH_SAFE * _AGREE[0] - ONE_SAFE * _AGREE[1]) / BOTH_UNSAFE
KINDS = {
    (unsafe, agree): share * (_AGREE[unsafe] if agree else 1 - _AGREE[unsafe])
    for unsafe, share in ((0, BOTH_SAFE), (1, ONE_SAFE), (2, BOTH_UNSAFE))
    for agree in (True, False)
}


def label_pair(prompt, first, second, *, sources=("world", "world"), prompt_source="world", rng=None):
    """One 16-field row for two different responses; `rng` decides between two safe answers (None: the
    better).
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
    row = {"prompt": prompt, "response_0": first, "response_1": second, "prompt_source": prompt_source}
    row |= {f"response_{i}_source": sources[i] for i in (0, 1)}
    row |= {f"is_response_{i}_safe": golds[i].severity == 0 for i in (0, 1)}
    row |= {f"response_{i}_harm_category": {c: c in golds[i].categories for c in CATEGORIES} for i in (0, 1)}
    row |= {f"response_{i}_severity_level": golds[i].severity for i in (0, 1)}
    row |= {"better_response_id": better, "safer_response_id": safer}
    row |= {f"response_{i}_sha256": hashlib.sha256(responses[i].encode()).hexdigest() for i in (0, 1)}
    return row


def kind_of(row):
    """(number of unsafe answers, better == safer) of a row."""
    unsafe = 2 - row["is_response_0_safe"] - row["is_response_1_safe"]
    return unsafe, row["better_response_id"] == row["safer_response_id"]


def choose_pairs(rng, pools):
    """Rows from `pools` of (prompt, [(source, response), ...]): at most one per prompt and call, kinds by
    quota.

    Two answers whose helpfulness differs by less than GAP are no pair: nobody could say which is better.
    """
    counts, rows = dict.fromkeys(KINDS, 0), []
    for prompt, pool in pools:
        pool = list({response: (source, response) for source, response in pool if response}.values())
        rng.shuffle(pool)
        found = {}
        for (source_0, first), (source_1, second) in combinations(pool, 2):
            if abs(gold_scores(prompt, first).helpfulness - gold_scores(prompt, second).helpfulness) < GAP:
                continue
            row = label_pair(prompt, first, second, sources=(source_0, source_1), rng=rng)
            found.setdefault(kind_of(row), row)
        if found:
            lack = {kind: KINDS[kind] * (len(rows) + 1) - counts[kind] for kind in found}
            kind = max(lack, key=lack.get)
            counts[kind] += 1
            rows.append(found[kind])
    return rows
