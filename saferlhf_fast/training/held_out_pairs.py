"""A score model and TF-IDF on the same held-out pairs, with intervals from resampling prompts.

Several pairs may share a prompt, and are then not independent: so whole prompts are resampled, and the
difference of the two models is taken in each resample, which leaves out what is hard for both.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..models.packing import end_row, pack_into_microbatches, pack_sequences
from ..runtime import engine
from .tfidf_baseline import tfidf_right

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.examples import PairExample

RESAMPLES = 2000


class Right(NamedTuple):
    """Where a model is right.

    Attributes:
        accuracy: For each pair 1 or 0 [n].
        accuracy_sign: For each pair the share of its two signs that are right: 0, 0.5 or 1 [n]; None for
            rewards, and where no sign was learned.
    """

    accuracy: np.ndarray
    accuracy_sign: np.ndarray | None


def compare_with_tfidf(
    model: engine.Engine,
    examples: "Sequence[PairExample]",
    held_out: "Sequence[PairExample]",
    tokenizer: "PreTrainedTokenizerBase",
    kind: str,
    budget: int,
) -> dict[str, Any]:
    """Measures the model and the baseline on the held-out pairs; every rank must call it.

    Args:
        model: The engine of the score model.
        examples: Training pairs, from which the baseline learns.
        held_out: Held-out pairs; not empty.
        tokenizer: Turns the pairs' ids into text.
        kind: "reward" or "cost".
        budget: Most tokens of a forward pass.

    Returns:
        baseline/accuracy, for costs also baseline/accuracy_sign, and `comparison`: for each of the two
        {"model", "tfidf", "difference"}, each {"mean", "low", "high"} with a 95 % interval, then the numbers
        of pairs and prompts. Where other labels contradict some pairs, `consistent` has the
        same for the rest.
        Ranks other than 0 get an empty dict.

    Raises:
        UserError: If scikit-learn is not installed.
    """
    ours = model_right(model, held_out, kind, budget)
    if engine.rank() != 0:
        return {}
    theirs = Right(*tfidf_right(examples, held_out, tokenizer, kind))
    prompts = [e.prompt_text for e in held_out]
    out: dict[str, Any] = {
        f"baseline/{name}": float(values.mean())
        for name, values in zip(Right._fields, theirs)
        if values is not None
    }
    out["comparison"] = _compare(ours, theirs, prompts, np.arange(len(held_out)))
    consistent = np.flatnonzero([not e.flagged for e in held_out])
    if 0 < len(consistent) < len(held_out):
        out["comparison"]["consistent"] = _compare(ours, theirs, prompts, consistent)
    return out


@torch.no_grad()
def model_right(model: engine.Engine, held_out: "Sequence[PairExample]", kind: str, budget: int) -> Right:
    """Where the score model is right; every rank must call it and gets the same answer."""
    model.train(False)
    lengths = [len(e.first_ids) + len(e.second_ids) for e in held_out]
    scores: dict[int, tuple[float, float]] = {}
    for indices in pack_into_microbatches(lengths, budget, engine.world_size())[engine.rank()]:
        # a rank without a pair runs the first one, because the others wait for it in collectives
        batch = [held_out[i] for i in indices or [0]]
        rows = [ids for e in batch for ids in (e.first_ids, e.second_ids)]
        second_at = [e.second_at for e in batch for _ in range(2)]
        packed = pack_sequences(rows, [end_row(len(ids)) for ids in rows], engine.device(), second_at)
        ends_B = model(packed).index_select(0, (packed.cu_seqlens[1:] - 1).long())
        scores.update(zip(indices, map(tuple, ends_B.float().view(-1, 2).tolist())))
    for part in engine.gather_objects(scores):
        scores.update(part)
    score = np.array([scores[i] for i in range(len(held_out))])
    first, second = score[:, 0], score[:, 1]
    if kind == "reward":
        return Right((first > second).astype(float), None)
    signs = np.array([[e.sign_first, e.sign_second] for e in held_out])
    return Right((first < second).astype(float), (score * signs > 0).mean(1))


def comparison_lines(comparison: dict[str, Any]) -> list[str]:
    """The comparison for people, a line for each measure."""
    lines = []
    for part, label in ((comparison, "held-out"), (comparison.get("consistent"), "consistent held-out")):
        if part is None:
            continue
        lines += [
            f"{label} pairs ({part['pairs']} of {part['prompts']} prompts), {name}: "
            + ", ".join(f"{who} {_text(part[name][who])}" for who in ("model", "tfidf", "difference"))
            for name in Right._fields
            if name in part
        ]
    return lines


def _text(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def _compare(ours: Right, theirs: Right, prompts: Sequence[str], rows: np.ndarray) -> dict[str, Any]:
    """Both models on some pairs, with 95 % percentile intervals from RESAMPLES resamples of the prompts."""
    _, group = np.unique(np.array(prompts, dtype=object)[rows].astype(str), return_inverse=True)
    groups = int(group.max()) + 1
    drawn = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), RESAMPLES)
    sizes = drawn @ np.bincount(group)

    def interval(values: np.ndarray) -> dict[str, float]:
        means = drawn @ np.bincount(group, values) / sizes
        low, high = np.quantile(means, [0.025, 0.975])
        return {"mean": float(values.mean()), "low": float(low), "high": float(high)}

    out: dict[str, Any] = {"pairs": len(rows), "prompts": groups}
    for name, mine, other in zip(Right._fields, ours, theirs):
        if mine is not None and other is not None:
            out[name] = {
                "model": interval(mine[rows]),
                "tfidf": interval(other[rows]),
                "difference": interval(mine[rows] - other[rows]),
            }
    return out
