"""Judges answers with a moderator: probabilities, severity, flags by threshold, and prefixes of answers.

    moderator = Moderator.from_pretrained("runs/moderation/model")
    verdicts = moderator(["How do I …?"], ["First you …"])          # one Verdict for each pair
    verdicts = moderator.prefixes("How do I …?", "First you …", every=16)

Texts are batched by tokens; a text's numbers do not depend on what else is in the batch (to 1e-5 in fp32).
The level of a severity is 0 where P(unsafe) = P(y > 0) is below its threshold, else the most likely one of
1 to 3, so level and `flagged` cannot contradict each other.

Shapes: S texts, X outputs of `ModeratorSpec.outputs`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.moderation_examples import Encoded, encode_pairs
from ..data.pair_template import pair_name, template_of
from ..errors import UserError
from ..models.folders import context_length
from ..models.moderator import ModeratorModel
from ..models.moderator_files import load_moderator
from ..models.moderator_spec import LEVELS, REFUSAL, UNSAFE, Calibration
from ..models.ngrams import bags_of
from ..models.packing import end_row, pack_into_microbatches, pack_sequences
from ..models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Verdict:
    """What a moderator says about one answer.

    Attributes:
        unsafe: P(unsafe) = P(severity > 0).
        flagged: Whether it reaches its threshold.
        severity: The level, 0 to 3.
        severity_distribution: P(severity = 0) … P(severity = 3).
        expected_severity: Σ k · P(severity = k), 0 to 3.
        categories: {category: probability}.
        flags: {category: whether it reaches its threshold}.
        refusal: P(refusal); None where the moderator has no such head.
        refused: Whether it reaches its threshold.
        truncated: The text was longer than the moderator reads and was judged by head and tail.
        threshold_version: Version of thresholds and temperatures; `untuned` where there are none.
        tokens: Of a prefix, the tokens of the answer that were judged; None for a whole answer.
    """

    unsafe: float
    flagged: bool
    severity: int
    severity_distribution: tuple[float, ...]
    expected_severity: float
    categories: dict[str, float]
    flags: dict[str, bool]
    refusal: float | None
    refused: bool | None
    truncated: bool
    threshold_version: str
    tokens: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain types; `tokens` of prefixes alone."""
        values = asdict(self)
        values["severity_distribution"] = list(self.severity_distribution)
        if self.tokens is None:
            del values["tokens"]
        return values


@dataclass(frozen=True)
class Moderator:
    """A moderator with its tokenizer and its thresholds.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        calibration: Thresholds and temperatures.
        batch_tokens: Most tokens of a forward pass.
    """

    model: ModeratorModel
    tokenizer: "PreTrainedTokenizerBase"
    calibration: Calibration
    batch_tokens: int = 8192

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        batch_tokens: int = 8192,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> "Self":
        """Loads a moderator.

        Args:
            path: A folder that `moderation train` wrote, or a name on the Hub.
            dtype: The type of the weights.
            device: Where it runs; None: the GPU where there is one.
            batch_tokens: Most tokens of a forward pass.
            trust_remote_code: Whether code beside the model may run.
            allow_pickle: Whether weights that exist in pickles alone are read.

        Raises:
            UserError: It is no moderator, or cannot be read.
        """
        # the spec first: a score model's tokenizer may lack what a moderator needs
        model, calibration = load_moderator(
            path, dtype=dtype, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
        )
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, pairs=model.pairs)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(place).eval(), tokenizer, calibration, batch_tokens)

    def __call__(
        self,
        prompts: Sequence[str] | str,
        responses: Sequence[str] | str,
        *,
        preset: str = "balanced",
        source: str | None = None,
    ) -> list[Verdict]:
        """Judges answers.

        Args:
            prompts: The prompts; an empty one where a text is judged alone.
            responses: The answer to each; a single text is a list of one.
            preset: Thresholds: strict, balanced or permissive.
            source: The source whose heads and thresholds judge; None: the mean of the heads.

        Raises:
            UserError: The lists differ in length, hold something else than text, or preset or source is
                unknown.
        """
        prompts, responses = checked_pairs(prompts, responses)
        encoded = self.encode(prompts, responses)
        probabilities_SX = self.probabilities(encoded, prompts, responses, source)
        return [
            self.verdict(row, item.truncated, preset, source) for row, item in zip(probabilities_SX, encoded)
        ]

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Encoded]:
        """Tokenises pairs as in training; a long one keeps head and tail."""
        spec = self.model.spec
        template = template_of(self.tokenizer, pair_name(spec.template, spec.pairs))
        context = context_length(self.model.config, self.model.form.first)
        return encode_pairs(template, prompts, responses, min(spec.max_length, context or spec.max_length))

    def logits(
        self,
        encoded: Sequence[Encoded],
        prompts: Sequence[str],
        responses: Sequence[str],
        source: str | None | Sequence[str | None] = None,
    ) -> "NDArray[np.float64]":
        """logits_SX, without temperature.

        Args:
            encoded: What `encode` returned.
            prompts: The prompts, for the n-grams.
            responses: The answers, for the n-grams.
            source: The source whose heads judge, of all texts or of each.
        """
        model, spec = self.model, self.model.spec
        device = next(model.parameters()).device
        logits_SX = np.zeros((len(encoded), len(spec.outputs)))
        if not encoded:
            return logits_SX
        each = [source] * len(encoded) if source is None or isinstance(source, str) else source
        numbers = [spec.source_index(item) for item in each]
        for rows in pack_into_microbatches([len(item.ids) for item in encoded], self.batch_tokens)[0]:
            if not rows:
                continue
            chosen = [encoded[i] for i in rows]
            packed = pack_sequences(
                [item.ids for item in chosen],
                [end_row(len(item.ids)) for item in chosen],
                device,
                [item.second_at for item in chosen],
            )
            bags = None
            if spec.buckets:
                bags = bags_of([prompts[i] for i in rows], [responses[i] for i in rows], spec.buckets).to(
                    device
                )
            source_S = torch.tensor([numbers[i] for i in rows], device=device) if spec.sources else None
            with torch.inference_mode():
                logits_SX[rows] = model(packed, bags, source_S).double().cpu().numpy()
        return logits_SX

    def probabilities(
        self,
        encoded: Sequence[Encoded],
        prompts: Sequence[str],
        responses: Sequence[str],
        source: str | None | Sequence[str | None] = None,
    ) -> "NDArray[np.float64]":
        """probabilities_SX, each head's logits divided by its temperature; arguments as in `logits`."""
        return self.scaled(self.logits(encoded, prompts, responses, source))

    def scaled(self, logits_SX: "NDArray[np.float64]") -> "NDArray[np.float64]":
        """probabilities_SX of logits."""
        out_SX = np.empty_like(logits_SX)
        for head, place in self.model.spec.heads.items():
            scaled = logits_SX[:, place] / self.calibration.temperatures.get(head, 1.0)
            if head == "severity":
                scaled = scaled + np.array(self.calibration.level_shifts)
            out_SX[:, place] = 0.5 * (1 + np.tanh(0.5 * scaled))  # the sigmoid, without an overflow
            if head == "severity":  # shifts may cross; P(y > k) may not
                out_SX[:, place] = np.minimum.accumulate(out_SX[:, place], axis=1)
        return out_SX

    def verdict(
        self,
        row_X: "NDArray[np.float64]",
        truncated: bool,
        preset: str = "balanced",
        source: str | None = None,
        tokens: int | None = None,
    ) -> Verdict:
        """What probabilities mean by the thresholds.

        Args:
            row_X: Probabilities of one text.
            truncated: Whether the text was cut.
            preset: Thresholds.
            source: The source whose thresholds hold.
            tokens: As in Verdict.
        """
        spec = self.model.spec

        def reaches(name: str, value: float) -> bool:
            return bool(value >= self.calibration.threshold(name, preset, source))

        values = [float(value) for value in row_X]
        k = len(spec.categories)
        categories = dict(zip(spec.categories, values[:k]))
        above = values[k : k + LEVELS - 1]
        refusal = values[-1] if spec.refusal else None
        edges = [1.0, *above, 0.0]
        distribution = tuple(a - b for a, b in zip(edges, edges[1:]))
        level = 1 + int(np.argmax(distribution[1:])) if reaches(UNSAFE, above[0]) else 0
        return Verdict(
            unsafe=above[0],
            flagged=level > 0,
            severity=level,
            severity_distribution=distribution,
            expected_severity=sum(above),
            categories=categories,
            flags={name: reaches(name, value) for name, value in categories.items()},
            refusal=refusal,
            refused=None if refusal is None else reaches(REFUSAL, refusal),
            truncated=truncated,
            threshold_version=self.calibration.version,
            tokens=tokens,
        )

    def prefixes(
        self,
        prompt: str,
        response: str,
        every: int = 16,
        *,
        preset: str = "balanced",
        source: str | None = None,
    ) -> list[Verdict]:
        """Judges an answer after every so many of its tokens, and at its end.

        A decoder that reads the last token does so in one packed pass over the answer; other moderators read
        each prefix by itself. A prefix has no end of turn, since generation has not ended there.

        Args:
            prompt: The prompt.
            response: The answer.
            every: Tokens between two scores.
            preset: Thresholds.
            source: The source whose heads and thresholds judge.

        Raises:
            UserError: As in calling, or `every` is below 1.
        """
        from .prefixes import prefix_logits

        if every < 1:
            raise UserError(f"every: expected at least 1 token, got {every}")
        prompts, responses = checked_pairs([prompt], [response])
        encoded = self.encode(prompts, responses)
        places, logits_SX = prefix_logits(self, encoded[0], prompts[0], every, source)
        rows = [*self.scaled(logits_SX), *self.probabilities(encoded, prompts, responses, source)]
        places = [*places, len(encoded[0].ids) - encoded[0].prompt_length]
        return [
            self.verdict(row, encoded[0].truncated, preset, source, count) for row, count in zip(rows, places)
        ]


def checked_pairs(
    prompts: Sequence[str] | str, responses: Sequence[str] | str
) -> tuple[list[str], list[str]]:
    """Lists of equally many texts.

    Raises:
        UserError: They are not.
    """
    lists = []
    for name, values in (("prompts", prompts), ("responses", responses)):
        texts = [values] if isinstance(values, str) else list(values)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"{name}[{i}]: expected text, got {type(text).__name__}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{name}[{i}]: expected Unicode text, got the lone surrogate "
                    f"{ascii(text[error.start])[1:-1]}"
                ) from error
        lists.append(texts)
    if len(lists[0]) != len(lists[1]):
        raise UserError(f"responses: expected {len(lists[0])}, one for each prompt, got {len(lists[1])}")
    return lists[0], lists[1]
