"""Win rates of judged pairs, and how far they can be trusted."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from ..statistics import mean_interval, share_interval
from .compare import JudgedPair

MISSING_LIMIT = 0.02
"""A larger share of missing verdicts is named beside the win rate: judges fail more often on unsafe texts."""

SCORE = {"first": 1.0, "tie": 0.5, "second": 0.0}


def win_rate(judged: Sequence[JudgedPair]) -> dict[str, Any]:
    """Summarises the judged pairs of one question.

    Args:
        judged: Pairs whose first answers are of one model and whose second ones are of another.

    Returns:
        `win_rate` of the first answers, (wins + ½ ties) / judged: {"mean", "low", "high", "n", "prompts",
        "method"}, the interval over prompts, of which each counts by its mean; `wins`, `ties`, `losses`;
        `consistency`, the share of pairs on which both orders agree; `first_position`, the share of decided
        verdicts for the answer that was shown first (½ where the order does not matter); `missing`: pairs
        without an outcome, by reason; `warning`, "" or what a reader has to know.
    """
    outcomes = Counter(pair.outcome for pair in judged if pair.outcome is not None)
    by_prompt = defaultdict(list)
    for pair in judged:
        if pair.outcome is not None:
            by_prompt[pair.pair.prompt].append(SCORE[pair.outcome])
    rate = mean_interval([sum(scores) / len(scores) for scores in by_prompt.values()])
    prompts, n = rate["n"], sum(outcomes.values())
    verdicts = [
        v for pair in judged for v in (pair.in_order.verdict, pair.swapped.verdict) if v in ("A", "B")
    ]
    missing = Counter(pair.reason for pair in judged if pair.outcome is None)
    share = sum(missing.values()) / len(judged) if judged else 0.0
    return {
        "win_rate": {**rate, "n": n, "prompts": prompts, "method": "mean over prompts, t interval"},
        "wins": outcomes["first"],
        "ties": outcomes["tie"],
        "losses": outcomes["second"],
        "consistency": {**share_interval([pair.consistent for pair in judged]), "method": "Wilson"},
        "first_position": {**share_interval([verdict == "A" for verdict in verdicts]), "method": "Wilson"},
        "missing": dict(missing),
        "warning": f"{share:.1%} of the pairs have no verdict" if share > MISSING_LIMIT else "",
    }
