"""One bounded queue and one thread that judges what is in it, in batches.

A batch begins with the request that waits longest and takes further ones until it has `batch_tokens` tokens
or `wait_ms` have passed. A request whose texts raise gets that exception; the others of its batch are then
judged one by one. Where the thread itself dies, every waiting request fails and `alive` is False.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ...data.moderation_examples import Encoded
from ..moderator import Moderator, Verdict

QUEUED_CHARACTERS = 64 * 2**20
"""Most characters of waiting texts: few long ones would take more memory than many short ones."""


class QueueFull(Exception):
    """There is no room for a request.

    Attributes:
        retry_after: Seconds until there probably is.
    """

    def __init__(self, retry_after: int) -> None:
        """Makes the exception."""
        super().__init__("the queue is full")
        self.retry_after = retry_after


class WorkerDead(Exception):
    """The thread that judges has ended."""


@dataclass
class Job:
    """The texts of one request."""

    prompts: list[str]
    responses: list[str]
    future: "Future[list[Verdict]]" = field(default_factory=Future)
    encoded: list[Encoded] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def characters(self) -> int:
        """Characters of all its texts."""
        return sum(map(len, self.prompts)) + sum(map(len, self.responses))

    @property
    def tokens(self) -> int:
        """Tokens of all its texts, once they are encoded."""
        return sum(len(item.ids) for item in self.encoded)


class ScoringQueue:
    """Judges the texts of many clients on one thread."""

    def __init__(
        self,
        moderator: Moderator,
        preset: str = "balanced",
        size: int = 1024,
        wait_ms: float = 5.0,
        on_batch: Callable[[int, int, float], None] | None = None,
    ) -> None:
        """Makes the queue; `start` starts its thread.

        Args:
            moderator: Judges; its `batch_tokens` bounds a batch.
            preset: Thresholds.
            size: Most texts that wait or are being judged.
            wait_ms: How long a request waits for others to be judged with it.
            on_batch: Is called after each batch with its texts, tokens and seconds.
        """
        self.moderator, self.preset, self.size, self.wait = moderator, preset, size, wait_ms / 1000
        self.on_batch = on_batch
        self.pending = 0
        self.characters = 0
        self.seconds_per_text = 0.01
        self._jobs: deque[Job] = deque()
        self._batch: list[Job] = []
        self._ready = threading.Condition()
        self._closing = self._dead = False
        self._thread = threading.Thread(target=self._run, name="moderator", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Judges what waits and ends the thread; requests that come later raise WorkerDead."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests will be judged."""
        return self._thread.is_alive() and not self._dead and not self._closing

    def submit(self, prompts: Sequence[str], responses: Sequence[str]) -> "Future[list[Verdict]]":
        """Puts checked texts into the queue.

        Args:
            prompts: The prompts.
            responses: The answer to each.

        Returns:
            Will have the verdicts, in order.

        Raises:
            QueueFull: There is no room for all of them.
            WorkerDead: The thread has ended.
        """
        job = Job(list(prompts), list(responses))
        with self._ready:
            if not self.alive:
                raise WorkerDead("the moderator's thread has ended")
            full = self.pending + len(job.prompts) > self.size
            # a single text always fits: the body's limit has bounded it
            if full or (self.pending and self.characters + job.characters > QUEUED_CHARACTERS):
                raise QueueFull(max(1, math.ceil(self.pending * self.seconds_per_text)))
            self.pending += len(job.prompts)
            self.characters += job.characters
            self._jobs.append(job)
            self._ready.notify_all()
        return job.future

    def _run(self) -> None:
        try:
            while self._collect():
                started = time.monotonic()
                texts, tokens = sum(len(job.prompts) for job in self._batch), self._tokens()
                self._judge(list(self._batch))
                seconds = time.monotonic() - started
                self.seconds_per_text += 0.2 * (seconds / max(1, texts) - self.seconds_per_text)
                if self.on_batch is not None:
                    self.on_batch(texts, tokens, seconds)
        except BaseException as error:  # whatever it was, nobody may wait for ever
            self._fail_all(type(error).__name__)

    def _tokens(self) -> int:
        return sum(job.tokens for job in self._batch)

    def _collect(self) -> bool:
        """Fills the batch; False where the queue was closed and is empty."""
        self._batch = []
        while self._tokens() < self.moderator.batch_tokens:
            job = self._next()
            if job is None:
                return bool(self._batch)
            if not job.future.set_running_or_notify_cancel():
                self._release(job)
                continue
            self._batch.append(job)
            try:
                job.encoded = self.moderator.encode(job.prompts, job.responses)
            except Exception as error:
                self._batch.pop()
                self._settle(job, error)
        return True

    def _next(self) -> Job | None:
        """The next request; None after the batch's deadline, or once the queue is closed and empty."""
        with self._ready:
            while not self._jobs:
                if self._closing:
                    return None
                left = self._batch[0].arrived + self.wait - time.monotonic() if self._batch else None
                if left is not None and left <= 0:
                    return None
                self._ready.wait(left)
            return self._jobs.popleft()

    def _judge(self, jobs: list[Job]) -> None:
        """Settles the requests of a batch."""
        try:
            verdicts = self._verdicts(jobs)
        except Exception as error:
            if len(jobs) == 1:
                self._settle(jobs[0], error)
                return
            for job in jobs:
                self._judge([job])
            return
        for job, values in zip(jobs, verdicts, strict=True):
            self._settle(job, values)

    def _verdicts(self, jobs: list[Job]) -> list[list[Verdict]]:
        moderator = self.moderator
        encoded = [item for job in jobs for item in job.encoded]
        prompts = [text for job in jobs for text in job.prompts]
        responses = [text for job in jobs for text in job.responses]
        rows = iter(moderator.probabilities(encoded, prompts, responses))
        return [
            [moderator.verdict(next(rows), item.truncated, self.preset) for item in job.encoded]
            for job in jobs
        ]

    def _settle(self, job: Job, value: list[Verdict] | Exception) -> None:
        self._release(job)
        if isinstance(value, Exception):
            job.future.set_exception(value)
        else:
            job.future.set_result(value)

    def _release(self, job: Job) -> None:
        with self._ready:
            self.pending -= len(job.prompts)
            self.characters -= job.characters

    def _fail_all(self, reason: str) -> None:
        with self._ready:
            self._dead = True
            jobs = [*self._batch, *self._jobs]
            self._jobs.clear()
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(WorkerDead(f"the moderator's thread has ended ({reason})"))
