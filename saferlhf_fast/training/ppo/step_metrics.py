"""What a PPO step reports: means over all ranks under the reference implementation's names, and sample rows.

Of several constraints each has its name behind those of its numbers (rollout.types.per_constraint).
"""

import json
from pathlib import Path

import torch

from ...config.sections import COST, REWARD
from ...rollout.types import per_constraint, per_stream
from ...runtime import engine

FROM_ADVANTAGES = {
    "kl_sequence": "kl_divergence",
    "shaped_reward": "reward_with_kl_penalty",
    "reward_advantage": "reward_advantage",
    "reward_return": "reward_return",
    "shaped_cost": "cost_with_kl_penalty",
    "cost_advantage": "cost_advantage",
    "cost_return": "cost_return",
}
"""Statistics of ppo_lag_advantage -> metric names."""


class StepMetrics:
    """What a step tells, on the device until its end: local sums, to be added up over ranks, maxima, and what
    all share.

    bad: what was not finite on some rank; the step was then left out on all.
    """

    def __init__(self):
        self.sums, self.maxima, self.shared, self.advantages, self.bad = {}, {}, {}, [], []

    def add(self, name, value):
        """Adds to a local sum."""
        self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def largest(self, name, value):
        """Raises a local maximum."""
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value


def averages(rollout, scored, step_metrics, multipliers, shaping=None):
    """-> {name: float} of one step's global batch: means over sequences.

    One reduction, one read of the device.

    step_metrics: of the update · multipliers: {constraint: its rule}. kl_divergence and *_with_kl_penalty are
    summed over a response's tokens; lengths are in tokens; tokens is a count. shaping: ν, or None; with it
    the reward stream is R − ν·C and named shaped_reward_*.
    """
    sequences, tokens = (
        sum(getattr(m, name) for m in rollout.minibatches) for name in ("sequences", "tokens")
    )
    sums = {REWARD: scored.reward_B.float().sum()}
    for name, cost_B in scored.costs.items():
        sums |= {
            per_constraint(COST, name, scored.costs): cost_B.float().sum(),
            per_constraint("unsafe_share", name, scored.costs): (cost_B > 0).float().sum(),
        }
    for stats in step_metrics.advantages:
        for key, name in FROM_ADVANTAGES.items():
            if key in stats:
                sums[name] = sums.get(name, 0.0) + stats[key] * stats["sequences"]
    sums = {name: value / max(1, sequences) for name, value in sums.items()} | step_metrics.sums
    sums, largest, shared = _read(
        sums,
        {"max_generated_length": float(max(rollout.lengths, default=0)), **step_metrics.maxima},
        _shared(step_metrics, multipliers),
    )
    out = {
        **sums,
        **largest,
        **shared,
        "tokens": tokens,
        "mean_generated_length": tokens / max(1, sequences),
        "staleness": rollout.version,
    }
    for stream in (REWARD, *multipliers):
        total, advantage, value = (
            per_stream(stem, stream, multipliers) for stem in ("return", "advantage", "value")
        )
        if total in out:  # returns are advantages + values
            out[value] = out[total] - out[advantage]
    if shaping is None:
        return out
    out["shaped_reward"] = out[REWARD] - shaping * out[COST]
    return {
        f"shaped_{name}" if name.startswith("reward_") and "critic" not in name else name: value
        for name, value in out.items()
    }


def _shared(step_metrics, multipliers):
    """What is the same on all ranks."""
    shared = dict(step_metrics.shared)
    for name, multiplier in multipliers.items():
        shared |= {
            per_constraint("lambda", name, multipliers): multiplier.value,
            per_constraint("episode_cost", name, multipliers): multiplier.mean_cost,
        }
    return shared


def _read(sums, maxima, shared):
    """Sums over ranks, maxima over ranks, and what all have -> three dicts of floats: one reduction, one
    read.
    """
    world, device = engine.world_size(), engine.device()

    def vector(values):
        return torch.stack(
            [torch.as_tensor(v, dtype=torch.float32).to(device, non_blocking=True) for v in values]
        )

    # One row for each rank: a sum over ranks then gathers the maxima. What all share is given by rank 0
    # alone.
    gathered = torch.zeros(world, len(maxima), device=device)
    gathered[engine.rank()] = vector(maxima.values())
    given = (
        vector(shared.values()) * (1.0 if engine.rank() == 0 else 0.0)
        if shared
        else torch.zeros(0, device=device)
    )
    packed = engine.all_reduce(torch.cat([vector(sums.values()), given, gathered.flatten()]))
    numbers = packed.tolist()
    rows = [numbers[len(sums) + len(shared) + r * len(maxima) :][: len(maxima)] for r in range(world)]
    return (
        dict(zip(sums, numbers)),
        dict(zip(maxima, map(max, zip(*rows)))),
        dict(zip(shared, numbers[len(sums) :])),
    )


def sample_rows(rollout, scored, count):
    """-> `count` rows, by their place in the batch, as dicts of prompt, response, reward and costs."""
    scores = {
        REWARD: scored.reward_B,
        **{per_constraint(COST, name, scored.costs): cost_B for name, cost_B in scored.costs.items()},
    }
    return [
        {
            "prompt": rollout.prompts[i].text,
            "response": rollout.texts[i],
            **{name: score_B[i].item() for name, score_B in scores.items()},
        }
        for i in sorted(range(len(rollout)), key=rollout.order.__getitem__)[:count]
    ]


def save_batch(cfg, step, rollout, scored):
    """Writes the texts and scores of a batch that gave a number that is not finite -> path of this rank's
    file.
    """
    path = Path(cfg.output).expanduser() / f"nonfinite_batch_step{step}_rank{engine.rank()}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for row in sample_rows(rollout, scored, len(rollout)):
            file.write(json.dumps(row) + "\n")
    return path
