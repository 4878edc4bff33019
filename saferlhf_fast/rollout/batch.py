"""Prompts in, responses of the current policy out: a rollout engine samples, ranks share the tokens out
evenly.

What samples is one of saferlhf_fast.rollout.engines; what comes back lies on the host, packed into the passes
that scoring and update will make.
"""

from typing import NamedTuple

import torch

from ..data.examples import PromptExample
from ..data.templates import Template
from ..models.packing import pack_into_microbatches
from ..runtime import engine
from .types import Minibatch, Response, Rollout


def end_tokens(tokenizer, lm, template):
    """Ids that end a response: the template's ends of a turn and those of the model's generation config."""
    named = lm.generation_config.eos_token_id
    named = [] if named is None else named if isinstance(named, (list, tuple)) else [named]
    return sorted({*Template(tokenizer, template).stop_ids, *named})


def generate(generator, prompts, tokenizer, sampling, max_length, seed=0, first=0):
    """Samples `sampling.num_return_sequences` responses for each prompt -> ([PromptExample], [Response]),
    prompt after prompt.

    generator: of `open_generator` · prompts: PromptExamples of this rank · max_length: longest prompt +
    response (tokens) · seed: of the step; each sequence has a seed of its own from it and its place in the
    global batch, so that its sample depends on neither the number of ranks nor the size of a batch · first:
    place of the batch's first prompt.
    """
    n = sampling.num_return_sequences
    rows = [p for p in prompts for _ in range(n)]
    places = [first * n + place for place in global_places(len(prompts), n)]
    limits = [sampling.response_limit(len(p.ids), max_length) for p in rows]
    seeds = [(seed * 1_000_003 + place) % (1 << 62) for place in places]
    return rows, generator.generate([list(p.ids) for p in rows], seeds, limits)


def global_places(count, n, rank=None, world=None):
    """Places in the global batch of this rank's `count` prompts with n responses each, as
    `data.batches.share` deals prompts.
    """
    rank, world = engine.rank() if rank is None else rank, engine.world_size() if world is None else world
    return [(i * world + rank) * n + k for i in range(count) for k in range(n)]


class Sampled(NamedTuple):
    """One sequence between sampling and packing. It travels between ranks."""

    place: int  # in the global batch
    prompt: PromptExample
    response: Response
    # of `scoring.frozen_scores`, where the frozen models were asked already
    frozen_scores: tuple | None = None

    @property
    def ids(self):
        return [*self.prompt.ids, *self.response.ids]


def assemble(rows, responses, tokenizer, budget, *, minibatches=1, n=1, version=0, frozen_scores=None):
    """PromptExamples and their Responses of this rank -> Rollout, on the device.

    Every rank gets about as many tokens, whoever sampled them: ids are small beside the time that a rank
    would wait. budget: most tokens of a forward pass · minibatches: optimiser steps per batch · n: responses
    per prompt · version: PPO steps that the policy has made since it sampled · frozen_scores: what frozen
    models said already.
    """
    places = global_places(len(rows) // n, n)
    mine = [Sampled(*row) for row in zip(places, rows, responses, frozen_scores or [None] * len(rows))]
    batch = sorted((row for part in engine.gather_objects(mine) for row in part), key=lambda row: row.place)
    return arrange(batch, tokenizer, budget, minibatches, version, engine.rank(), engine.world_size())


def arrange(batch, tokenizer, budget, minibatches=1, version=0, rank=0, world=1):
    """The global batch, [Sampled], -> Rollout of one rank. No collective."""
    made, mine = [], []
    size = -(-len(batch) // minibatches)
    for at in range(0, len(batch), size):
        part = batch[at : at + size]
        passes = []
        for each in pack_into_microbatches([len(row.ids) for row in part], budget, world)[rank]:
            passes.append(slice(len(mine), len(mine) + len(each)))
            mine += [part[i] for i in each]
        lengths = [len(row.response.ids) for row in part]
        made.append(Minibatch(passes, sum(n > 0 for n in lengths), sum(lengths)))
    shortest = min(batch, key=lambda row: len(row.ids))
    return Rollout(
        sequences=[row.ids for row in mine],
        lengths=[len(row.response.ids) for row in mine],
        prompts=[row.prompt for row in mine],
        ended=[row.response.ended for row in mine],
        order=[row.place for row in mine],
        texts=[tokenizer.decode(row.response.ids, skip_special_tokens=True).strip() for row in mine],
        minibatches=made,
        dummy=(shortest.ids, len(shortest.response.ids)),
        device=engine.device(),
        engine_logp_N=packed_numbers([row.response.logp for row in mine]),
        version=version,
        size=len(batch),
        frozen_scores=[row.frozen_scores for row in mine],
    )


def packed_numbers(parts):
    """Lists of numbers, one for each sequence -> one fp32 tensor; None where a list is missing."""
    if not parts or any(part is None for part in parts):
        return None
    return torch.tensor([x for part in parts for x in part], dtype=torch.float32, device=engine.device())
