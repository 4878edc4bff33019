"""Limits on what a judge may cost: requests, tokens, money. Each call reserves its worst case first.

A token is at least one byte of the text, so the bytes that are sent bound the tokens that are counted; the
messages' frames get a margin. After the call the endpoint's own count replaces the reservation.
"""

import threading

from ...config.judge_settings import Judge
from .protocol import Chat
from .verdict_store import VerdictStore

FRAME_TOKENS = 16
"""Most tokens that an endpoint adds to a message for its role and its ends."""


class LimitReached(Exception):
    """The next call could pass a limit; its text names the limit."""


class Spending:
    """Counts the calls of a judge against the limits of its settings. Threads may share it."""

    def __init__(self, judge: Judge, store: VerdictStore) -> None:
        """Begins with what the store says was spent by earlier starts.

        Args:
            judge: The limits and the prices.
            store: Where calls are written.
        """
        self.judge, self.store, self._lock = judge, store, threading.Lock()

    def reserve(self, chat: Chat) -> tuple[int, int]:
        """Reserves the worst case of a call: (tokens sent, tokens answered), for `settle`.

        Raises:
            LimitReached: The call could pass a limit. Nothing is reserved then.
        """
        tokens_in = sum(len(message["content"].encode()) + FRAME_TOKENS for message in chat)
        tokens_out = self.judge.max_answer_tokens
        with self._lock:
            requests, sent, answered = self.store.spent()
            after = (requests + 1, sent + tokens_in, answered + tokens_out)
            limits = (
                ("max_requests", after[0], self.judge.max_requests),
                ("max_tokens", after[1] + after[2], self.judge.max_tokens),
                ("max_cost", self.cost(*after[1:]), self.judge.max_cost),
            )
            for name, value, limit in limits:
                if limit is not None and value is not None and value > limit:
                    raise LimitReached(f"judge.{name}={limit:g}: the next call could take it to {value:.6g}")
            self.store.spend(tokens_in, tokens_out, requests=1)
            return tokens_in, tokens_out

    def settle(self, reserved: tuple[int, int], usage: tuple[int, int] | None) -> None:
        """Replaces a reservation by what the endpoint counted.

        Args:
            reserved: What `reserve` returned.
            usage: (tokens sent, tokens answered); None where nobody knows, which leaves the worst case.
        """
        if usage is not None:
            self.store.spend(usage[0] - reserved[0], usage[1] - reserved[1])

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """Returns the price of some tokens; None without prices."""
        prices = self.judge.prices
        return None if prices is None else (tokens_in * prices.input + tokens_out * prices.output) / 1e6

    def text(self) -> str:
        """Returns what was spent so far, in words."""
        requests, sent, answered = self.store.spent()
        cost = self.cost(sent, answered)
        return f"{requests:,} requests, {sent + answered:,} tokens" + (
            "" if cost is None else f", cost {cost:.4g}"
        )
