"""What a PPO step reports: means over all ranks under safe-rlhf's names, and sample rows.

With several constraints each has its name behind those of its numbers (rollout.types.per_constraint).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...config.sections import COST, REWARD
from ...rollout.types import per_constraint, per_stream
from ...runtime import disk, engine

if TYPE_CHECKING:
    from ...config.stages import PPOConfig
    from ...rollout.types import Rollout, Scored
    from .multiplier import MultiplierRule

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
    """The numbers of one step, on the device until its end.

    Attributes:
        sums: This rank's share of each number, 0-d; the shares of all ranks are added up.
        maxima: This rank's maximum of each number, 0-d.
        shared: Numbers that are the same on all ranks: learning rates, gradient norms.
        advantages: Statistics of each call of ppo_lag_advantage.
        bad: Names of what was not finite on some rank; the step was then skipped on all ranks.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.maxima: dict[str, torch.Tensor] = {}
        self.shared: dict[str, torch.Tensor | float] = {}
        self.advantages: list[Mapping[str, torch.Tensor]] = []
        self.bad: list[str] = []

    def add(self, name: str, value: torch.Tensor) -> None:
        """Adds to a local sum.

        Args:
            name: Name of the number.
            value: [] this rank's addend, of any dtype, detached here.
        """
        self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def largest(self, name: str, value: torch.Tensor) -> None:
        """Raises a local maximum.

        Args:
            name: Name of the number.
            value: [] a value of this rank, which counts where it is larger than those before.
        """
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value


def averages(
    rollout: "Rollout",
    scored: "Scored",
    step_metrics: StepMetrics,
    multipliers: "Mapping[str, MultiplierRule]",
    shaping: float | None = None,
) -> dict[str, float]:
    """The metrics of one step: means over the sequences of the global batch; one reduction, one device read.

    Args:
        rollout: Lengths (tokens) and counts of the batch.
        scored: Scores of this rank's responses, in score model units.
        step_metrics: What the update added up.
        multipliers: The rule that moves λ by name of the constraint.
        shaping: ν, or None. With ν the reward stream is R − ν·C, and its metrics are named shaped_reward_*.

    Returns:
        {name: number}. kl_divergence (nats) and *_with_kl_penalty are summed over a response's tokens;
        lengths are in tokens; `tokens` is a count.
    """
    sequences, tokens = (
        sum(getattr(m, name) for m in rollout.minibatches) for name in ("sequences", "tokens")
    )
    sums, largest, shared = _read(
        {**_sums(scored, step_metrics, sequences), **_spare_mass(rollout, tokens)},
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


def _sums(scored: "Scored", step_metrics: StepMetrics, sequences: int) -> dict[str, torch.Tensor]:
    """This rank's share of each mean over the sequences of the global batch, and of the update's sums."""
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
    return {name: value / max(1, sequences) for name, value in sums.items()} | step_metrics.sums


def _spare_mass(rollout: "Rollout", tokens: int) -> dict[str, torch.Tensor]:
    """This rank's share of the mean over response tokens, where the engine measures it."""
    if rollout.spare_mass is None:
        return {}
    total = sum(mass * length for mass, length in zip(rollout.spare_mass, rollout.lengths))
    return {"spare_mass": torch.tensor(total / max(1, tokens))}


def _shared(
    step_metrics: StepMetrics, multipliers: "Mapping[str, MultiplierRule]"
) -> dict[str, torch.Tensor | float]:
    """Numbers that are the same on all ranks: those of the optimisers, λ and J_C."""
    shared = dict(step_metrics.shared)
    for name, multiplier in multipliers.items():
        shared |= {
            per_constraint("lambda", name, multipliers): multiplier.value,
            per_constraint("episode_cost", name, multipliers): multiplier.mean_cost,
        }
    return shared


def _read(
    sums: Mapping[str, torch.Tensor | float],
    maxima: Mapping[str, torch.Tensor | float],
    shared: Mapping[str, torch.Tensor | float],
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Sums over ranks, maxima over ranks, and shared numbers, on the host; one reduction, one device read."""
    world, device = engine.world_size(), engine.device()

    def vector(values: Iterable[torch.Tensor | float]) -> torch.Tensor:
        return torch.stack(
            [torch.as_tensor(v, dtype=torch.float32).to(device, non_blocking=True) for v in values]
        )

    # Each rank writes its maxima into a row of its own, so a sum over ranks gathers them. Shared numbers
    # count on rank 0 alone.
    maxima_by_rank = torch.zeros(world, len(maxima), device=device)
    maxima_by_rank[engine.rank()] = vector(maxima.values())
    of_rank_0 = (
        vector(shared.values()) * (1.0 if engine.rank() == 0 else 0.0)
        if shared
        else torch.zeros(0, device=device)
    )
    packed = engine.all_reduce(torch.cat([vector(sums.values()), of_rank_0, maxima_by_rank.flatten()]))
    numbers = packed.tolist()
    rows = [numbers[len(sums) + len(shared) + r * len(maxima) :][: len(maxima)] for r in range(world)]
    return (
        dict(zip(sums, numbers)),
        dict(zip(maxima, map(max, zip(*rows)))),
        dict(zip(shared, numbers[len(sums) :])),
    )


def sample_rows(rollout: "Rollout", scored: "Scored", count: int) -> list[dict[str, Any]]:
    """The first `count` responses by their place in the global batch: prompt, response, reward and costs.

    Args:
        rollout: Prompts and responses of this rank.
        scored: Their scores.
        count: Most rows that are returned.
    """
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


def save_batch(cfg: "PPOConfig", step: int, rollout: "Rollout", scored: "Scored") -> Path:
    """Writes the texts and scores of a batch that gave a number that is not finite.

    Args:
        cfg: Settings of the stage, whose output the file is written to.
        step: The step, which the file's name has.
        rollout: Prompts and responses of this rank.
        scored: Their scores.

    Returns:
        The path of this rank's file, in the run's folder.
    """
    path = Path(cfg.output).expanduser() / f"nonfinite_batch_step{step}_rank{engine.rank()}.jsonl"
    rows = sample_rows(rollout, scored, len(rollout))
    disk.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path
