"""Settings of an LLM judge: where it answers, what it is asked, and what it may cost. No torch."""

from dataclasses import field
from typing import Literal

from .setting_types import Data, NonNegative, NonNegativeInt, Positive, PositiveInt, settings_class

Question = Literal["helpfulness", "harmlessness"]


@settings_class(frozen=True)
class Prices:
    """What a judge's tokens cost."""

    input: NonNegative
    """Of a million tokens that are sent (in one currency, as the two others)."""
    output: NonNegative
    """Of a million tokens that are answered."""


@settings_class(frozen=True, kw_only=True)
class Judge:
    """An LLM that says which of two answers is better, behind any endpoint of OpenAI's chat completions."""

    base_url: str
    """Address of the endpoint, up to and with /v1."""
    model: str
    """The judge's name there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; without it requests carry none, as local servers want it."""
    questions: list[Question] = field(default_factory=lambda: ["helpfulness", "harmlessness"])
    """What is asked about each pair, each in calls of its own: helpfulness, harmlessness."""
    concurrency: PositiveInt = 8
    """Requests at once."""
    timeout: Positive = 120.0
    """Seconds until a request without an answer is given up and tried again."""
    tries: PositiveInt = 6
    """Times that a request is sent when the endpoint is busy, broken or silent."""
    longest_wait: Positive = 120.0
    """Most seconds between two tries, also where the endpoint asks for more (Retry-After)."""
    max_answer_tokens: PositiveInt = 512
    """Longest answer of the judge (tokens)."""
    max_requests: PositiveInt | None = None
    """Most requests in all, those of interrupted starts included."""
    max_tokens: PositiveInt | None = None
    """Most tokens in all, sent and answered; each call reserves its worst case first."""
    max_cost: Positive | None = None
    """Most money in all, by `prices`; each call reserves its worst case first."""
    prices: Prices | None = None
    """Price of a million tokens, {input: …, output: …}; needed by max_cost."""


@settings_class(frozen=True, kw_only=True)
class JudgeCalibrationConfig:
    """evaluate judge-calibration: how often a judge agrees with people's labels of pairs."""

    judge: Judge
    """The judge: {base_url: …, model: …}."""
    data: Data
    """Pairs with labels of which answer is better or safer: a path, a Hub name, or a list of sources."""
    output: str
    """Folder for calibration.json and verdicts.sqlite; the same command goes on where it stopped."""
    seed: NonNegativeInt = 42
    """Seed of the rows that sources with a count draw, and of the resampled intervals."""
