"""What models say of a rollout, without gradient: the frozen ones, and actor and critics where the update
does not ask them.
"""

import torch

from ..config.sections import REWARD
from .batch import packed_numbers
from .types import Scored


def kept(parts, rollout):
    """Concatenation of what each pass gave, without what fillers gave."""
    return torch.cat(
        [part[:0] if rows.start == rows.stop else part for part, rows in zip(parts, rollout.passes)]
    )


@torch.no_grad()
def score_rollout(rollout, roles, cfg):
    """Asks the frozen models, where that has not been done -> Scored without log-probs of the actor and
    values.
    """
    if rollout.frozen_scores and rollout.frozen_scores[0] is not None:
        ref_logp, *scores = zip(*rollout.frozen_scores)
        ref_logp_N, scores = packed_numbers(ref_logp), [packed_numbers([column]) for column in scores]
    else:
        ref_logp, scores = [], [[] for _ in roles.scorers]
        for rows in rollout.passes:
            ref_logp.append(roles.reference(rollout.packed(rows), cfg.sampling))
            for scorer, column in zip(roles.scorers.values(), scores):
                column.append(scorer(rollout, rows))
        ref_logp_N, scores = kept(ref_logp, rollout), [kept(column, rollout) for column in scores]
    costs = dict(zip(roles.scorers, scores))
    return Scored(ref_logp_N, costs.pop(REWARD), costs)


def frozen_scores(rollout, roles, cfg):
    """Asks the frozen models -> for each row of a rollout (ref_logp list, score by each of roles.scorers …),
    on the host.
    """
    scored = score_rollout(rollout, roles, cfg)
    scores = (column.tolist() for column in (scored.reward_B, *scored.costs.values()))
    return list(zip((part.tolist() for part in scored.ref_logp_N.split(rollout.lengths)), *scores))


@torch.no_grad()
def old_logprobs_and_values(rollout, roles, cfg):
    """Asks actor and critics as they are now -> fields of Scored.

    An actor whose engine's log-probs count is not asked.
    """
    roles.train(False)
    logp, values = [], []
    own = cfg.ppo.old_logp == "trainer"
    for rows in rollout.passes:
        packed = rollout.packed(rows)
        if own:
            logp.append(roles.actor(packed, cfg.sampling))
        made = {}
        for critic in roles.critics:
            made |= critic(packed)
        values.append(made)
    values = {name: kept([part[name] for part in values], rollout) for name in values[0]}
    return {"logp_N": kept(logp, rollout) if own else rollout.engine_logp_N, "values": values}
