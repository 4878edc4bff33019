"""Scores of a rollout without gradient: by the frozen models, and by actor and critics before an update.

Actor and critics run here only where the update's own forward passes do not give their numbers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..config.sections import REWARD
from .batch import packed_numbers
from .types import FrozenScores, Rollout, Scored

if TYPE_CHECKING:
    from ..config.stages import PPOConfig
    from .roles import Roles


def without_dummies(by_pass: Sequence[torch.Tensor], rollout: Rollout) -> torch.Tensor:
    """Concatenates the results of all passes, without those of dummy micro-batches."""
    return torch.cat(
        [result[:0] if rows.start == rows.stop else result for result, rows in zip(by_pass, rollout.passes)]
    )


@torch.no_grad()
def score_rollout(rollout: Rollout, roles: "Roles", cfg: "PPOConfig") -> Scored:
    """Runs the frozen models, unless the rollout has their scores already.

    Args:
        rollout: This rank's batch.
        roles: The reference and the scorers.
        cfg: The stage's config.

    Returns:
        Scored without log-probs of the actor and without values.
    """
    columns = _frozen_columns(rollout)
    if columns is None:
        assert roles.reference is not None, "a PPO run has a reference"
        by_pass: list[list[torch.Tensor]] = [[] for _ in ("reference", *roles.scorers)]
        for rows in rollout.passes:
            by_pass[0].append(roles.reference(rollout.packed(rows), cfg.sampling))
            for scorer, results in zip(roles.scorers.values(), by_pass[1:]):
                results.append(scorer(rollout, rows))
        columns = [without_dummies(results, rollout) for results in by_pass]
    ref_logp_N, *scores = columns
    costs = dict(zip(roles.scorers, scores))
    return Scored(ref_logp_N, costs.pop(REWARD), costs)


def _frozen_columns(rollout: Rollout) -> list[Any] | None:
    """[ref_logp_N, score_B by each scorer] where the frozen models have run already, else None."""
    rows: Sequence[Any] = rollout.frozen_scores
    if not rows or rows[0] is None:
        return None
    ref_logp, *scores = zip(*rows)
    return [packed_numbers(ref_logp), *(packed_numbers([column]) for column in scores)]


def frozen_scores(rollout: Rollout, roles: "Roles", cfg: "PPOConfig") -> list[FrozenScores]:
    """The frozen models' results for each row of a rollout, on the host.

    Args:
        rollout: The batch.
        roles: The reference and the scorers.
        cfg: The stage's config.

    Returns:
        For each row (reference log-probs, score by each of roles.scorers …).
    """
    scored = score_rollout(rollout, roles, cfg)
    scores = (column.tolist() for column in (scored.reward_B, *scored.costs.values()))
    return list(zip((logp_T.tolist() for logp_T in scored.ref_logp_N.split(rollout.lengths)), *scores))


@torch.no_grad()
def old_logprobs_and_values(rollout: Rollout, roles: "Roles", cfg: "PPOConfig") -> dict[str, Any]:
    """Runs actor and critics at their weights before the update.

    Args:
        rollout: This rank's batch.
        roles: The actor and the critics.
        cfg: The stage's config. With ppo.old_logp=engine the engine's log-probs count, and the actor does
            not run.

    Returns:
        The fields logp_N and values of Scored.
    """
    roles.train(False)
    logp: list[torch.Tensor] = []
    by_pass: list[dict[str, torch.Tensor]] = []
    runs_actor = cfg.ppo.old_logp == "trainer"
    for rows in rollout.passes:
        packed = rollout.packed(rows)
        if runs_actor:
            logp.append(roles.actor(packed, cfg.sampling))
        values: dict[str, torch.Tensor] = {}
        for critic in roles.critics:
            values |= critic(packed)
        by_pass.append(values)
    return {
        "logp_N": without_dummies(logp, rollout) if runs_actor else rollout.engine_logp_N,
        "values": {
            name: without_dummies([values[name] for values in by_pass], rollout) for name in by_pass[0]
        },
    }
