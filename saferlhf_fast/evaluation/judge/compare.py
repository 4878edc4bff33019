"""Asks a judge about pairs of answers, in both orders, several at once, and nothing twice."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal

from saferlhf_fast.errors import UserError

from ...config.judge_settings import Judge, Question
from ...runtime import console
from .endpoint import Endpoint, EndpointFailed
from .protocol import Pair, chat_of, read_verdict, repair_of
from .spending import LimitReached, Spending
from .verdict_store import Judged, VerdictStore, key_of

Outcome = Literal["first", "second", "tie"]

FAILURES_IN_A_ROW = 10
"""So many questions without an answer in a row, and the endpoint is taken to be down."""

NOT_ASKED = Judged(None, reason="not asked", final=False)


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """What a judge said to one question about a pair, in both orders."""

    pair: Pair
    question: Question
    in_order: Judged
    """The first answer was shown first."""
    swapped: Judged
    """The second answer was shown first."""

    @property
    def votes(self) -> tuple[Outcome | None, Outcome | None]:
        """Which answer each order prefers."""
        meaning: dict[str, tuple[Outcome, Outcome]] = {
            "A": ("first", "second"),
            "B": ("second", "first"),
            "tie": ("tie", "tie"),
        }
        one, two = self.in_order.verdict, self.swapped.verdict
        return meaning[one][0] if one else None, meaning[two][1] if two else None

    @property
    def outcome(self) -> Outcome | None:
        """Which answer is better; a tie where the orders disagree, None where a verdict is missing."""
        one, two = self.votes
        if one is None or two is None:
            return None
        return one if one == two else "tie"

    @property
    def consistent(self) -> bool | None:
        """Whether both orders say the same; None where a verdict is missing."""
        one, two = self.votes
        return None if one is None or two is None else one == two

    @property
    def reason(self) -> str:
        """Why there is no outcome; "" where there is one."""
        return self.in_order.reason or self.swapped.reason


@dataclass(frozen=True, slots=True)
class Comparison:
    """All judged pairs, and why the judge was not asked about the rest."""

    judged: list[JudgedPair]
    stopped: str
    """The limit that ended it, or that the endpoint is down; "" where every question was asked."""
    spent: str
    """What was spent, earlier starts included, in words."""


def judge_pairs(judge: Judge, pairs: Sequence[Pair], store: VerdictStore) -> Comparison:
    """Asks a judge every question about every pair, in both orders.

    Each verdict is in the store before its thread asks the next question. A limit on spending, or an endpoint
    that is down, ends it in order; the same call goes on where it stopped.

    Args:
        judge: The judge.
        pairs: The pairs.
        store: Holds the verdicts of earlier starts, and gets the new ones.

    Returns:
        A JudgedPair for each pair and question, in the order of pairs, then of judge.questions.

    Raises:
        UserError: The endpoint refuses for good (key, model, address), or max_cost has no prices.
    """
    if judge.max_cost is not None and judge.prices is None:
        raise UserError("judge.max_cost: expected judge.prices beside it, {input: …, output: …}, got none")
    stopping = threading.Event()
    spending = Spending(judge, store)
    session = _Session(judge, store, Endpoint(judge, spending, stopping), stopping)
    places = [
        (place, question, swapped)
        for place in range(len(pairs))
        for question in judge.questions
        for swapped in (False, True)
    ]
    answers: dict[tuple[int, Question, bool], Judged] = {}
    with ThreadPoolExecutor(judge.concurrency) as pool, console.track(len(places), "judge") as bar:
        try:
            futures = {pool.submit(session.ask, pairs[p], q, s): (p, q, s) for p, q, s in places}
            for future in as_completed(futures):
                answers[futures[future]] = future.result()
                bar.advance(line=spending.text())
        except BaseException:  # a wrong key, Ctrl-C: let the other threads end what they are doing
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            session.endpoint.close()
    judged = [
        JudgedPair(pair, question, answers[place, question, False], answers[place, question, True])
        for place, pair in enumerate(pairs)
        for question in judge.questions
    ]
    return Comparison(judged, session.stopped, spending.text())


class _Session:
    """Asks single questions; its threads share what has to stop all of them."""

    def __init__(
        self, judge: Judge, store: VerdictStore, endpoint: Endpoint, stopping: threading.Event
    ) -> None:
        self.name, self.store, self.endpoint, self.stopping = (
            f"{judge.base_url} {judge.model}",
            store,
            endpoint,
            stopping,
        )
        self.stopped, self.failures = "", 0
        self._lock = threading.Lock()

    def ask(self, pair: Pair, question: Question, swapped: bool) -> Judged:
        """Returns the judge's verdict on one question in one order."""
        chat = chat_of(pair, question, swapped)
        key = key_of(self.name, chat)
        known = self.store.get(key)
        if known is not None:
            return known
        if self.stopping.is_set():
            return NOT_ASKED
        try:
            judged = self._verdict(chat)
            self._count(failed=False)
        except LimitReached as e:
            self._stop(str(e))
            return NOT_ASKED
        except EndpointFailed as e:
            judged = Judged(None, reason=str(e), final=False)
            self._count(failed=True)
        self.store.put(key, self.name, chat, judged)
        return judged

    def _verdict(self, chat: list[dict[str, str]]) -> Judged:
        """Asks, and once more where the answer has no verdict."""
        reply = self.endpoint.ask(chat)
        verdict = read_verdict(reply.text)
        if verdict is not None or reply.refused:
            return Judged(verdict, reply.text, reply.refused)
        again = self.endpoint.ask(repair_of(chat, reply.text))
        verdict = read_verdict(again.text)
        both = f"{reply.text}\n{again.text}"
        return Judged(verdict, both, "" if verdict else again.refused or "no verdict in the judge's answer")

    def _count(self, failed: bool) -> None:
        with self._lock:
            self.failures = self.failures + 1 if failed else 0
            down = self.failures >= FAILURES_IN_A_ROW
        if down:
            self._stop(f"the endpoint failed {FAILURES_IN_A_ROW} times in a row")

    def _stop(self, reason: str) -> None:
        self.stopped = self.stopped or reason
        self.stopping.set()
