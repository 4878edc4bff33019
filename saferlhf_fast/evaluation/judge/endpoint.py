"""One request to a judge, with retries, by any endpoint of OpenAI's chat completions.

Busy, broken and silent endpoints (408, 409, 429, 5xx, time-outs, lost connections) are asked again, after
what Retry-After says or after exponentially longer random waits. A content filter's refusal is an answer of
its own. Other refusals (a wrong key, an unknown model) end the command: asking again would not help.
"""

import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import tenacity

from saferlhf_fast.errors import UserError

from ...config.judge_settings import Judge
from ...data.files import shorten
from .protocol import Chat
from .spending import Spending

TRANSIENT = {408, 409, 429}
FATAL = {401, 402, 403, 404, 405}


@dataclass(frozen=True, slots=True)
class Reply:
    """What an endpoint answered."""

    text: str
    refused: str = ""
    """Why the endpoint did not judge, e.g. its content filter; the text is then empty."""


class EndpointFailed(Exception):
    """The endpoint gave no answer after all tries; the text says what came last."""


class _TryAgain(Exception):
    """A try without an answer; `wait` is what Retry-After asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """A judge's endpoint. Threads may share it."""

    def __init__(self, judge: Judge, spending: Spending, stopping: threading.Event) -> None:
        """Prepares the connections.

        Args:
            judge: Address, name, key, time-out and tries.
            spending: Asked before each request.
            stopping: Set when no request shall follow; waits end then.
        """
        self.judge, self.spending = judge, spending
        key = os.environ.get(judge.api_key_env)
        self.client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=judge.timeout,
            limits=httpx.Limits(max_connections=judge.concurrency),
        )
        self.url = judge.base_url.rstrip("/") + "/chat/completions"
        backoff = tenacity.wait_random_exponential(multiplier=1, max=judge.longest_wait)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait if isinstance(error, _TryAgain) else None
            return backoff(state) if asked is None else min(asked, judge.longest_wait)

        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(judge.tries), tenacity.stop_when_event_set(stopping)
            ),
            wait=wait,
            retry=tenacity.retry_if_exception_type(_TryAgain),
            sleep=tenacity.sleep_using_event(stopping),
            reraise=True,
        )

    def close(self) -> None:
        """Closes the connections."""
        self.client.close()

    def ask(self, chat: Chat) -> Reply:
        """Returns the judge's answer.

        Args:
            chat: The messages.

        Raises:
            EndpointFailed: No answer after all tries.
            LimitReached: A limit on spending; nothing was sent.
            UserError: The endpoint refuses the request for good: a wrong key, model or address.
        """
        try:
            return self._retrying.copy()(self._try, chat)
        except _TryAgain as e:
            raise EndpointFailed(str(e)) from None

    def _try(self, chat: Chat) -> Reply:
        body = {
            "model": self.judge.model,
            "messages": chat,
            "temperature": 0,
            "max_tokens": self.judge.max_answer_tokens,
        }
        reserved = self.spending.reserve(chat)
        try:
            response = self.client.post(self.url, json=body)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as e:
            self.spending.settle(reserved, (0, 0))
            raise UserError(f"judge.base_url: expected an address like http://host/v1, got {e}") from None
        except httpx.ConnectError as e:
            self.spending.settle(reserved, (0, 0))  # nothing was sent
            raise _TryAgain(f"no connection to {self.url}: {shorten(str(e), 80)}") from None
        except httpx.HTTPError as e:  # it may have been answered, and paid for
            raise _TryAgain(f"{type(e).__name__} from {self.url}") from None
        if response.status_code != 200:
            self.spending.settle(reserved, (0, 0))
            return self._refusal(response)
        return self._reply(reserved, response)

    def _reply(self, reserved: tuple[int, int], response: httpx.Response) -> Reply:
        """Reads an answer of status 200."""
        try:
            content = response.json()
            choice = content["choices"][0]
            text, ended = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _TryAgain(f"no chat completion from {self.url}: {shorten(response.text, 80)}") from None
        self.spending.settle(reserved, _usage(content))
        if ended == "content_filter" or not isinstance(text, str):
            return Reply(
                "", "the judge's endpoint filtered the content" if ended == "content_filter" else "no text"
            )
        return Reply(text)

    def _refusal(self, response: httpx.Response) -> Reply:
        """Reads an answer of another status than 200."""
        status, words = response.status_code, _error_of(response)
        if status in TRANSIENT or status >= 500:
            raise _TryAgain(f"status {status} from {self.url}", _retry_after(response))
        if status in FATAL:
            raise UserError(
                f"judge: {self.url} refuses with status {status}: {words} (model={self.judge.model}, key "
                f"from {self.judge.api_key_env})"
            )
        if status == 400 and "content" in words.lower() and "filter" in words.lower():
            return Reply("", "the judge's endpoint filtered the content")
        return Reply("", f"the judge's endpoint refused with status {status}: {words}")


def _usage(content: dict[str, Any]) -> tuple[int, int] | None:
    usage = content.get("usage")
    if not isinstance(usage, dict):
        return None
    sent, answered = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return (sent, answered) if isinstance(sent, int) and isinstance(answered, int) else None


def _error_of(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        words = (
            f"{error.get('code') or ''} {error.get('message') or ''}"
            if isinstance(error, dict)
            else str(error)
        )
    except (ValueError, KeyError, TypeError):
        words = response.text
    return shorten(" ".join(words.split()), 120) or "no reason"


def _retry_after(response: httpx.Response) -> float | None:
    """Returns the seconds of Retry-After, which is a number or a date; None where it is neither."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date - datetime.now(UTC)).total_seconds()) if date.tzinfo else None
