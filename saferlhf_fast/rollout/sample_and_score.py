"""One response to each prompt, scored by the models of a run, for evaluations and best-of-run selection."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..config.sections import COST, REWARD
from ..config.stages import PPOConfig
from ..data.batches import share
from ..models.policy import sequence_sums
from ..runtime import engine
from .batch import assemble, generate
from .scoring import without_dummies
from .types import per_constraint

if TYPE_CHECKING:
    from ..config.stages import EvaluateConfig
    from ..data.examples import PromptExample
    from .roles import Roles
    from .types import Rollout


@torch.no_grad()
def sample_and_score(
    roles: "Roles", prompts: "Sequence[PromptExample]", cfg: "PPOConfig | EvaluateConfig", seed: int = 0
) -> list[dict[str, Any]]:
    """Samples one response for each prompt and scores it.

    Random numbers are the same at each call, so that evaluations of one run can be compared. A collective.

    Args:
        roles: The policy, its reference and the scorers.
        prompts: The same on every rank.
        cfg: The stage's config.
        seed: Of the responses.

    Returns:
        One dict for each prompt, in order, on every rank: prompt, response, reward, cost (of several costs
        cost/<name> each), kl (summed over the response, nats) and length (tokens). The value is None
        where there is no model for a number. Where sampling cut the rows of the head without a token away,
        spare_mass is their mean probability.
    """
    world = engine.world_size()
    own_prompts = [prompts[i] for i in share(range(len(prompts)), engine.rank(), world)]
    # Every rank runs as many as the one with the most: under ZeRO-3 each forward pass is a collective.
    own_prompts += list(prompts[:1]) * (math.ceil(len(prompts) / world) - len(own_prompts))
    sampling = dataclasses.replace(cfg.sampling, num_return_sequences=1)
    # Generation fits more rows than scoring does.
    size = sampling.batch_size or (cfg.ppo.batch_size if isinstance(cfg, PPOConfig) else 4 * cfg.batch_size)
    scored: list[tuple[int, dict[str, Any]]] = []
    for start in range(0, len(own_prompts), size):
        rows, responses = generate(
            roles.rollout_engine,
            own_prompts[start : start + size],
            sampling,
            cfg.max_length,
            seed,
            first=start * world,
        )
        rollout = assemble(rows, responses, roles.tokenizer, cfg.pass_tokens())
        scored += [
            (start * world + place, row) for place, row in zip(rollout.order, _rows(roles, rollout, cfg))
        ]
    by_place = dict(pair for rank_pairs in engine.gather_objects(scored) for pair in rank_pairs)
    return [by_place[i] for i in range(len(prompts))]


def _rows(roles: "Roles", rollout: "Rollout", cfg: "PPOConfig | EvaluateConfig") -> list[dict[str, Any]]:
    """One dict for each row of a rollout."""
    by_pass: dict[str, list[torch.Tensor]] = {name: [] for name in (*roles.scorers, "kl")}
    for rows in rollout.passes:
        for name, scorer in roles.scorers.items():
            by_pass[name].append(scorer(rollout, rows))
        if roles.reference is not None:
            packed = rollout.packed(rows)
            gap_N = roles.actor(packed, cfg.sampling) - roles.reference(packed, cfg.sampling)
            by_pass["kl"].append(sequence_sums(gap_N, packed))
    labels = {name: per_constraint(COST, name, roles.costs) for name in roles.costs}
    scores: dict[str, list[Any]] = dict.fromkeys(
        (REWARD, *(labels.values() or (COST,)), "kl"), [None] * len(rollout)
    )
    scores |= {
        labels.get(name, name): without_dummies(values, rollout).tolist()
        for name, values in by_pass.items()
        if values
    }
    prompts = [prompt.text for prompt in rollout.prompts]
    columns: dict[str, list[Any]] = {
        "prompt": prompts,
        "response": rollout.texts,
        **scores,
        "length": rollout.lengths,
        **({} if rollout.spare_mass is None else {"spare_mass": rollout.spare_mass}),
    }
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the rows of `sample_and_score`.

    Returns:
        Those of "reward", "cost", "unsafe_share" (cost > 0), "kl", "length" and "spare_mass" that the rows
        have; of several costs cost/<name> and unsafe_share/<name>.
    """
    names = [name for name in (rows[0] if rows else ()) if name not in ("prompt", "response")]
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    means = {name: sum(column) / len(column) for name, column in columns.items() if column}
    for name in names:
        stem, _, cost = name.partition("/")
        if stem == COST and columns[name]:
            means["unsafe_share" + (f"/{cost}" if cost else "")] = sum(c > 0 for c in columns[name]) / len(
                columns[name]
            )
    return means
