"""One response to each prompt, scored by the models of a run: what evaluations and best-of-run selection look
at.
"""

import dataclasses
import math

import torch

from ..config.sections import COST, REWARD
from ..config.stages import PPOConfig
from ..data.batches import share
from ..models.policy import sequence_sums
from ..runtime import engine
from .batch import assemble, generate
from .scoring import kept
from .types import per_constraint


@torch.no_grad()
def sample_and_score(roles, prompts, cfg, seed=0):
    """Samples one response for each prompt and scores it -> one dict per prompt, in order, on every rank.

    Each has prompt, response, reward, cost (of several costs cost/<name> each), kl (summed over the response,
    nats) and length (tokens); what there is no model for is None. Random numbers are the same at each call,
    so that evaluations of one run compare.
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
        rows, responses = generate(
            roles.generator,
            mine[start : start + size],
            roles.tokenizer,
            sampling,
            cfg.max_length,
            seed,
            first=start * world,
        )
        rollout = assemble(rows, responses, roles.tokenizer, cfg.pass_tokens())
        found += [
            (start * world + place, row) for place, row in zip(rollout.order, _rows(roles, rollout, cfg))
        ]
    everyone = dict(pair for part in engine.gather_objects(found) for pair in part)
    return [everyone[i] for i in range(len(prompts))]


def _rows(roles, rollout, cfg):
    parts = {name: [] for name in (*roles.scorers, "kl")}
    for rows in rollout.passes:
        for name, scorer in roles.scorers.items():
            parts[name].append(scorer(rollout, rows))
        if roles.reference is not None:
            packed = rollout.packed(rows)
            gap_N = roles.actor(packed, cfg.sampling) - roles.reference(packed, cfg.sampling)
            parts["kl"].append(sequence_sums(gap_N, packed))
    labels = {name: per_constraint(COST, name, roles.costs) for name in roles.costs}
    scores = dict.fromkeys((REWARD, *(labels.values() or (COST,)), "kl"), [None] * len(rollout))
    scores |= {
        labels.get(name, name): kept(values, rollout).tolist() for name, values in parts.items() if values
    }
    prompts = [prompt.text for prompt in rollout.prompts]
    columns = {"prompt": prompts, "response": rollout.texts, **scores, "length": rollout.lengths}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def summary_of(rows):
    """Means over the rows of `sample_and_score` -> {"reward", "cost", "unsafe_share" (cost > 0), "kl",
    "length"}, those there are; of several costs each has its name behind it.
    """
    names = [name for name in (rows[0] if rows else ()) if name not in ("prompt", "response")]
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    out = {name: sum(column) / len(column) for name, column in columns.items() if column}
    for name in names:
        stem, _, cost = name.partition("/")
        if stem == COST and columns[name]:
            out["unsafe_share" + (f"/{cost}" if cost else "")] = sum(c > 0 for c in columns[name]) / len(
                columns[name]
            )
    return out
