"""Prompts in, responses of the current policy out: a rollout engine samples, ranks divide the tokens evenly.

One of saferlhf_fast.rollout.engines samples. Its responses are on the host, and are divided into the passes
that scoring and update will run.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..data.examples import PromptExample
from ..data.templates import Template
from ..models.packing import pack_into_microbatches
from ..runtime import engine
from .types import FrozenScores, Minibatch, Response, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..config.sections import Sampling
    from .engines import RolloutEngine


def end_tokens(tokenizer: "PreTrainedTokenizerBase", lm: "PreTrainedModel", template: str) -> list[int | str]:
    """What ends a response: ids, of the template's ends of a turn and of the model's generation config.

    An end of a turn that is several ordinary tokens is its text, which is behind the ids.
    """
    eos = lm.generation_config.eos_token_id
    model_ends = [] if eos is None else eos if isinstance(eos, (list, tuple)) else [eos]
    ends = Template(tokenizer, template)
    return [*sorted({*ends.stop_ids, *model_ends}), *ends.stop_texts]


def generate(
    generator: "RolloutEngine",
    prompts: Sequence[PromptExample],
    sampling: "Sampling",
    max_length: int,
    seed: int = 0,
    first: int = 0,
) -> tuple[list[PromptExample], list[Response]]:
    """Samples `sampling.num_return_sequences` responses for each prompt.

    Args:
        generator: From `open_generator`.
        prompts: Of this rank.
        sampling: The distribution and its limits.
        max_length: Longest prompt + response (tokens).
        seed: Of the step. Each sequence has a seed of its own, from this one and its place in the global
            batch, so that its sample depends on neither the number of ranks nor the size of a batch.
        first: Place of the batch's first prompt.

    Returns:
        Each response's prompt, and the responses, prompt after prompt.
    """
    n = sampling.num_return_sequences
    rows = [p for p in prompts for _ in range(n)]
    places = [first * n + place for place in global_places(len(prompts), n)]
    limits = [sampling.response_limit(len(p.ids), max_length) for p in rows]
    seeds = [(seed * 1_000_003 + place) % (1 << 62) for place in places]
    return rows, generator.generate([list(p.ids) for p in rows], seeds, limits)


def global_places(count: int, n: int, rank: int | None = None, world: int | None = None) -> list[int]:
    """Places in the global batch of one rank's responses, as `data.batches.share` deals prompts.

    Args:
        count: Prompts of the rank.
        n: Responses to each prompt.
        rank: None: this process's.
        world: Number of ranks; None: this run's.

    Returns:
        One place for each response.
    """
    rank, world = engine.rank() if rank is None else rank, engine.world_size() if world is None else world
    return [(i * world + rank) * n + k for i in range(count) for k in range(n)]


class Sampled(NamedTuple):
    """One sequence between sampling and packing. It travels between ranks."""

    place: int  # in the global batch
    prompt: PromptExample
    response: Response
    frozen_scores: FrozenScores | None = None  # where the frozen models have run already

    @property
    def ids(self) -> list[int]:
        """Prompt and response."""
        return [*self.prompt.ids, *self.response.ids]


def assemble(
    rows: Sequence[PromptExample],
    responses: Sequence[Response],
    tokenizer: "PreTrainedTokenizerBase",
    budget: int,
    *,
    minibatches: int = 1,
    n: int = 1,
    version: int = 0,
    frozen_scores: Sequence[FrozenScores | None] | None = None,
) -> Rollout:
    """Gathers all ranks' responses and gives each rank about as many tokens, whichever rank sampled them.

    Ids are small beside the time that a rank would wait. A collective.

    Args:
        rows: Each response's prompt, of this rank.
        responses: In the same order.
        tokenizer: Of the policy.
        budget: Most tokens of a forward pass.
        minibatches: Optimiser steps per batch.
        n: Responses per prompt.
        version: PPO steps that the policy has taken since it sampled.
        frozen_scores: Of each response, where the frozen models have run already.

    Returns:
        This rank's Rollout.
    """
    places = global_places(len(rows) // n, n)
    local = [Sampled(*row) for row in zip(places, rows, responses, frozen_scores or [None] * len(rows))]
    batch = sorted(
        (row for rank_rows in engine.gather_objects(local) for row in rank_rows), key=lambda row: row.place
    )
    return arrange(batch, tokenizer, budget, minibatches, version, engine.rank(), engine.world_size())


def arrange(
    batch: Sequence[Sampled],
    tokenizer: "PreTrainedTokenizerBase",
    budget: int,
    minibatches: int = 1,
    version: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Rollout:
    """One rank's Rollout of the global batch. No collective.

    Args:
        batch: All responses of the global batch, in the order of their places.
        tokenizer: Decodes the responses.
        budget: Most tokens of a pass.
        minibatches: Optimiser steps that the batch is split into.
        version: PPO steps that the policy has taken since it sampled.
        rank: The rank.
        world: Number of ranks.

    Returns:
        The rank's Rollout.
    """
    steps: list[Minibatch] = []
    own_rows: list[Sampled] = []
    size = -(-len(batch) // minibatches)
    for start in range(0, len(batch), size):
        minibatch = batch[start : start + size]
        passes = []
        for indices in pack_into_microbatches([len(row.ids) for row in minibatch], budget, world)[rank]:
            passes.append(slice(len(own_rows), len(own_rows) + len(indices)))
            own_rows += [minibatch[i] for i in indices]
        lengths = [len(row.response.ids) for row in minibatch]
        steps.append(Minibatch(passes, sum(n > 0 for n in lengths), sum(lengths)))
    shortest = min(batch, key=lambda row: len(row.ids))
    return Rollout(
        sequences=[row.ids for row in own_rows],
        lengths=[len(row.response.ids) for row in own_rows],
        prompts=[row.prompt for row in own_rows],
        ended=[row.response.ended for row in own_rows],
        order=[row.place for row in own_rows],
        texts=[tokenizer.decode(row.response.ids, skip_special_tokens=True).strip() for row in own_rows],
        minibatches=steps,
        dummy=(shortest.ids, len(shortest.response.ids)),
        device=engine.device(),
        engine_logp_N=packed_numbers([row.response.logp for row in own_rows]),
        version=version,
        size=len(batch),
        frozen_scores=[row.frozen_scores for row in own_rows],
        # of the global batch, so that all ranks agree on whether it was measured
        spare_mass=None
        if any(row.response.spare_mass is None for row in batch)
        else [fmean(row.response.spare_mass or [0.0]) for row in own_rows],
    )


def packed_numbers(columns: Sequence[Sequence[float] | None]) -> torch.Tensor | None:
    """The numbers of all sequences in one tensor.

    Args:
        columns: Numbers of each sequence, or None where it has none.

    Returns:
        [N] fp32 on the device; None where a sequence has none, or there is no sequence.
    """
    numbers: list[float] = []
    for column in columns:
        if column is None:
            return None
        numbers += column
    return torch.tensor(numbers, dtype=torch.float32, device=engine.device()) if columns else None
