"""What ranks write into their store for the watchdog: their state (Beat), and why a run ends (Fault).

Also how messages name ranks.
"""

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypedDict

from .process_identity import Identity


class Fault(NamedTuple):
    """Why a run ends.

    Attributes:
        rank: The rank to blame; −1 for the launcher.
        line: The message, which names the rank.
        code: The exit code.
        gone: Ranks that will not answer any more.
        quiet: Print nothing (Ctrl-C).
    """

    rank: int
    line: str
    code: int = 1
    gone: tuple[int, ...] = ()
    quiet: bool = False


class Beat(TypedDict):
    """What a rank writes about itself at each look.

    Attributes:
        count: Number of the look.
        state: "runs" or "ended".
        stalled: Seconds without progress of its main thread.
        waits: Whether its main thread is in a collective.
        at: Where its main thread is, in words.
        collectives: How many collectives it has called.
    """

    count: int
    state: str
    stalled: float
    waits: bool
    at: str
    collectives: int


def read_fault(text: str | bytes) -> Fault:
    """The Fault that was written into the store as JSON."""
    rank, line, code, gone, quiet = json.loads(text)
    return Fault(rank, line, code, tuple(gone), quiet)


def name_ranks(who: Sequence[Identity], ranks: Sequence[int]) -> str:
    """Names ranks for a message: "rank 1 (node7, process 4242)" or "ranks 8, 9 (node8)".

    Args:
        who: The process of each rank.
        ranks: The ranks to name, at least one.
    """
    hosts = ", ".join(dict.fromkeys(who[r]["host"] for r in ranks))
    if len(ranks) == 1:
        return f"rank {ranks[0]} ({hosts}, process {who[ranks[0]]['pid']})"
    return f"ranks {few(map(str, ranks), 16)} ({hosts})"


def is_or_are(ranks: Sequence[int]) -> str:
    """The verb that goes with ranks."""
    return "is" if len(ranks) == 1 else "are"


def few(texts: Iterable[str], most: int = 4) -> str:
    """The first texts, and how many more there are.

    Args:
        texts: Any number of texts.
        most: How many are written out.
    """
    texts = list(texts)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
