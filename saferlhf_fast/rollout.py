"""Prompts in, responses of the current policy out: a rollout engine samples, ranks share the tokens out evenly.

What samples is one of saferlhf_fast.generation; what comes back lies on the host, packed into the passes that scoring and
update will make.
"""

import torch

from . import data, engine
from .packing import fill
from .types import Minibatch, Rollout


def end_tokens(tokenizer, lm, template):
    """Ids that end a response: the template's ends of a turn and those of the model's generation config."""
    named = lm.generation_config.eos_token_id
    named = [] if named is None else named if isinstance(named, (list, tuple)) else [named]
    return sorted({*data.Template(tokenizer, template).stop_ids, *named})


def generate(generator, prompts, tokenizer, sampling, max_length, seed=0, first=0):
    """Samples `sampling.num_return_sequences` responses for each prompt -> ([PromptExample], [Response]), prompt after prompt.

    generator: of `open_generator` · prompts: PromptExamples of this rank · max_length: longest prompt + response (tokens) ·
    seed: of the step; each sequence has a seed of its own from it and its place in the global batch, so that its sample
    depends on neither the number of ranks nor the size of a batch · first: place of the batch's first prompt.
    """
    n = sampling.num_return_sequences
    rows = [p for p in prompts for _ in range(n)]
    places = [first * n + place for place in global_places(len(prompts), n)]
    limits = [max(1, min(max_length - len(p.ids), sampling.max_new_tokens or max_length)) for p in rows]
    seeds = [(seed * 1_000_003 + place) % (1 << 62) for place in places]
    return rows, generator.generate([list(p.ids) for p in rows], seeds, limits)


def global_places(count, n, rank=None, world=None):
    """Places in the global batch of this rank's `count` prompts with n responses each, as `data.share` deals prompts."""
    rank, world = engine.rank() if rank is None else rank, engine.world_size() if world is None else world
    return [(i * world + rank) * n + k for i in range(count) for k in range(n)]


def assemble(rows, responses, tokenizer, budget, *, minibatches=1, n=1, version=0):
    """PromptExamples and their Responses of this rank -> Rollout, on the device.

    Every rank gets about as many tokens, whoever sampled them: ids are small beside the time that a rank would wait.
    budget: most tokens of a forward pass · minibatches: optimiser steps per batch · n: responses per prompt · version: of
    the weights that sampled, counted back.
    """
    places = global_places(len(rows) // n, n)
    everyone = engine.gather_objects([(place, p, r.ids, r.logp, r.ended) for place, p, r in zip(places, rows, responses)])
    batch = sorted((row for part in everyone for row in part), key=lambda row: row[0])
    made, mine = [], []
    size = -(-len(batch) // minibatches)
    for at in range(0, len(batch), size):
        part = batch[at:at + size]
        passes = []
        for each in fill([len(p.ids) + len(ids) for _, p, ids, *_ in part], budget, engine.world_size())[engine.rank()]:
            passes.append(slice(len(mine), len(mine) + len(each)))
            mine += [part[i] for i in each]
        lengths = [len(ids) for _, _, ids, *_ in part]
        made.append(Minibatch(passes, sum(n > 0 for n in lengths), sum(lengths)))
    shortest = min(batch, key=lambda row: len(row[1].ids) + len(row[2]))
    return Rollout(
        sequences=[[*p.ids, *ids] for _, p, ids, *_ in mine], lengths=[len(ids) for _, _, ids, *_ in mine],
        prompts=[p for _, p, *_ in mine], ended=[ended for *_, ended in mine], order=[place for place, *_ in mine],
        texts=[tokenizer.decode(ids, skip_special_tokens=True).strip() for _, _, ids, *_ in mine], minibatches=made,
        filler=([*shortest[1].ids, *shortest[2]], len(shortest[2])), device=engine.device(),
        engine_logp_N=_log_probs([logp for *_, logp, _ in mine]), version=version,
        size=len(batch))


def _log_probs(parts):
    """What the engine said of each token, packed; None where it did not say it of all."""
    if not parts or any(logp is None for logp in parts):
        return None
    return torch.tensor([x for logp in parts for x in logp], dtype=torch.float32, device=engine.device())
