"""One response to each prompt, scored by the models of a run: what evaluations and best-of-run selection look at."""

import dataclasses
import math

import torch

from ..config.stages import PPOConfig
from ..data.batches import share
from ..models.policy import sequence_sums
from ..runtime import engine
from .batch import assemble, generate
from .scoring import kept


@torch.no_grad()
def ask(cast, prompts, cfg, seed=0):
    """Samples one response for each prompt and scores it -> one dict per prompt, in order, on every rank.

    Each has prompt, response, reward, cost, kl (summed over the response, nats) and length (tokens); what there is no
    model for is None. Random numbers are the same at each call, so that evaluations of one run compare.
    """
    world = engine.world_size()
    mine = [prompts[i] for i in share(range(len(prompts)), engine.rank(), world)]
    # Every rank asks for as many as the fullest one: under ZeRO-3 each forward pass is a collective.
    mine += prompts[:1] * (math.ceil(len(prompts) / world) - len(mine))
    sampling = dataclasses.replace(cfg.sampling, num_return_sequences=1)
    # Generation fits more rows than scoring does.
    size = sampling.batch_size or (cfg.ppo.batch_size if isinstance(cfg, PPOConfig) else 4 * cfg.batch_size)
    found = []
    for start in range(0, len(mine), size):
        rows, responses = generate(cast.generator, mine[start:start + size], cast.tokenizer, sampling, cfg.max_length, seed,
                                   first=start * world)
        rollout = assemble(rows, responses, cast.tokenizer, cfg.pass_tokens())
        found += [(start * world + place, row) for place, row in zip(rollout.order, _rows(cast, rollout, cfg))]
    everyone = dict(pair for part in engine.gather_objects(found) for pair in part)
    return [everyone[i] for i in range(len(prompts))]


def _rows(cast, rollout, cfg):
    reward, cost, kl = [], [], []
    for rows in rollout.passes:
        reward.append(cast.reward(rollout, rows) if cast.reward is not None else None)
        cost.append(cast.cost(rollout, rows) if cast.cost is not None else None)
        if cast.reference is not None:
            packed = rollout.packed(rows)
            gap_N = cast.actor(packed, cfg.sampling) - cast.reference(packed, cfg.sampling)
            kl.append(sequence_sums(gap_N, packed))
    columns = [kept(parts, rollout).tolist() if parts and parts[0] is not None else [None] * len(rollout)
               for parts in (reward, cost, kl)]
    return [{"prompt": prompt.text, "response": text, "reward": r, "cost": c, "kl": k, "length": length}
            for prompt, text, r, c, k, length in zip(rollout.prompts, rollout.texts, *columns, rollout.lengths)]


def summary_of(rows):
    """Means over the rows of `ask` -> {"reward", "cost", "unsafe_share" (cost > 0), "kl", "length"}, those there are."""
    out = {}
    for name in ("reward", "cost", "kl", "length"):
        found = [row[name] for row in rows if row[name] is not None]
        if found:
            out[name] = sum(found) / len(found)
    costs = [row["cost"] for row in rows if row["cost"] is not None]
    if costs:
        out["unsafe_share"] = sum(c > 0 for c in costs) / len(costs)
    return out
