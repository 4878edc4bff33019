"""Which rows `generate` may sample together: whether padding on the left changes what a row gets.

Recurrent states run through padding, compressed caches count it, some architectures recompute their cache
from the width of the batch, and some keep a state in their modules, from which no row can be taken. A probe
samples with a tiny copy of the architecture (models/shrunken.py): rows of different length together and each
alone, beyond every length at which the copy changes what it does. It takes about a second for each
architecture and configuration of a process, whatever the size of the model.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, NamedTuple

from ...models import rotary
from ...models.lora import plain as unwrapped
from ...models.row_form import ERRORS
from ...models.shrunken import changes_with_length, reproducible, shrunken
from ...models.tokenizer import logit_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..types import Response


class Batching(NamedTuple):
    """Which rows a batch may have."""

    rows: Literal["any", "equal", "single"] = "any"  # of any length; of equal prompt length; one
    drops: bool = True  # rows that have ended may leave the batch

    def in_words(self) -> str:
        """What is done where not every batch is right; empty where each is."""
        if self.rows == "single":
            return "its rows change each other, so one sequence is sampled at a time"
        parts = []
        if self.rows == "equal":
            parts.append(
                "padding on the left changes its rows, so prompts of equal length are sampled together"
            )
        if not self.drops:
            parts.append("its state cannot lose rows, so rows that have ended stay until the batch ends")
        return "; ".join(parts)


PREFERRED = (Batching(), Batching(drops=False), Batching("equal"), Batching("equal", drops=False))
"""The fastest first."""
PROBES: dict[tuple[type, str], Batching] = {}
"""{(class, configuration): verdict}."""
PROMPTS, LIMITS = (40, 27, 9, 9, 9), (4, 10, 3, 8, 3)
"""Tokens of the probe's prompts, and of their responses: one grows beyond the copy's context of 32."""


def batching_of(lm: "PreTrainedModel") -> Batching:
    """Which rows may be in a batch.

    Args:
        lm: A causal LM, which peft may wrap; only its class and configuration are read where a copy of them
            runs.

    Returns:
        The verdict.
    """
    lm = unwrapped(lm)
    key = (type(lm), str(lm.config.to_dict()))
    if key not in PROBES:
        PROBES[key] = _probed(lm)
    return PROBES[key]


def _probed(lm: "PreTrainedModel") -> Batching:
    for copy in shrunken(type(lm), lm.config):
        with reproducible():
            verdict = _verdict(copy, PROMPTS, LIMITS)
        if verdict is not None:
            return verdict
    sharded = any(hasattr(p, "ds_id") or p.is_meta for p in lm.parameters())
    if sharded or changes_with_length(lm.config):
        return PREFERRED[-1]
    return _verdict(lm, (5, 3, 4, 4, 4), (2, 3, 1, 4, 1)) or PREFERRED[-1]


def _verdict(lm: "PreTrainedModel", lengths: tuple[int, ...], limits: tuple[int, ...]) -> Batching | None:
    """The verdict of one model; None where it does not generate at all."""
    rotary.separate(lm)
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    first = min(3, vocabulary - 1)
    prompts = [
        [first + (7 * i * i + 11 * i + 5 * k) % (vocabulary - first) for i in range(n)]
        for k, n in enumerate(lengths)
    ]
    try:
        alone = _sampled(lm, prompts, limits, Batching("single"))
    except ERRORS:
        return None
    for batching in PREFERRED:
        try:
            if _same(_sampled(lm, prompts, limits, batching), alone):
                return batching
        except ERRORS:
            continue
    return Batching("single")


def _sampled(
    lm: "PreTrainedModel", prompts: list[list[int]], limits: tuple[int, ...], batching: Batching
) -> "list[Response]":
    from ...config.sections import Sampling
    from .hf_generate import Generate

    actor = SimpleNamespace(module=SimpleNamespace(lm=lm), sharded=False)
    every_id = {str(i): i for i in range(logit_count(lm))}
    tokenizer = SimpleNamespace(pad_token_id=0, get_vocab=lambda: every_id)
    generator = Generate(actor, tokenizer, [], Sampling(), batching)
    return generator.generate(prompts, list(range(len(prompts))), list(limits))


def _same(got: "list[Response]", expected: "list[Response]") -> bool:
    """Whether the samples are the same, and their log-probs but for the last bits."""
    if [r.ids for r in got] != [r.ids for r in expected]:
        return False
    gaps = [abs(a - b) for g, e in zip(got, expected) for a, b in zip(g.logp or (), e.logp or ())]
    return not any(gap > 1e-3 or gap != gap for gap in gaps)
