"""What a PPO step tells: means over all ranks under the reference implementation's names, and sample rows."""

import torch

from ...runtime import engine

FROM_ADVANTAGES = {"kl_sequence": "kl_divergence", "shaped_reward": "reward_with_kl_penalty",
                   "reward_advantage": "reward_advantage", "reward_return": "reward_return",
                   "shaped_cost": "cost_with_kl_penalty", "cost_advantage": "cost_advantage",
                   "cost_return": "cost_return"}
"""Statistics of ppo_lag_advantage -> metric names."""


def averages(rollout, scored, tally, multiplier, shaping=None):
    """-> {name: float} of one step's global batch: means over sequences. One reduction, one read of the device.

    tally: of the update. kl_divergence and *_with_kl_penalty are summed over a response's tokens; lengths are in tokens;
    tokens is a count. shaping: ν, or None; with it the reward stream is R − ν·C and named shaped_reward_*.
    """
    sequences, tokens = (sum(getattr(m, name) for m in rollout.minibatches) for name in ("sequences", "tokens"))
    sums = {"reward": scored.reward_B.float().sum()}
    if scored.cost_B is not None:
        sums |= {"cost": scored.cost_B.float().sum(), "unsafe_share": (scored.cost_B > 0).float().sum()}
    for stats in tally.advantages:
        for key, name in FROM_ADVANTAGES.items():
            if key in stats:
                sums[name] = sums.get(name, 0.0) + stats[key] * stats["sequences"]
    sums = {name: value / max(1, sequences) for name, value in sums.items()} | tally.sums
    sums, largest, shared = _read(sums, {"max_generated_length": float(max(rollout.lengths, default=0)), **tally.maxima},
                                  _shared(tally, multiplier))
    out = {**sums, **largest, **shared, "tokens": tokens, "mean_generated_length": tokens / max(1, sequences),
           "staleness": rollout.version}
    for stream in ("reward", "cost"):
        if f"{stream}_return" in out:                # returns are advantages + values
            out[f"{stream}_value"] = out[f"{stream}_return"] - out[f"{stream}_advantage"]
    if shaping is None:
        return out
    out["shaped_reward"] = out["reward"] - shaping * out["cost"]
    return {f"shaped_{name}" if name.startswith("reward_") and "critic" not in name else name: value
            for name, value in out.items()}


def _shared(tally, multiplier):
    """What is the same on all ranks."""
    if multiplier is None:
        return tally.shared
    return {**tally.shared, "lambda": multiplier.value, "episode_cost": multiplier.mean_cost}


def _read(sums, maxima, shared):
    """Sums over ranks, maxima over ranks, and what all have -> three dicts of floats: one reduction, one read."""
    world, device = engine.world_size(), engine.device()

    def vector(values):
        return torch.stack([torch.as_tensor(v, dtype=torch.float32).to(device, non_blocking=True) for v in values])

    # One row for each rank: a sum over ranks then gathers the maxima. What all share is given by rank 0 alone.
    gathered = torch.zeros(world, len(maxima), device=device)
    gathered[engine.rank()] = vector(maxima.values())
    given = vector(shared.values()) * (1.0 if engine.rank() == 0 else 0.0) if shared else torch.zeros(0, device=device)
    packed = engine.all_reduce(torch.cat([vector(sums.values()), given, gathered.flatten()]))
    numbers = packed.tolist()
    rows = [numbers[len(sums) + len(shared) + r * len(maxima):][:len(maxima)] for r in range(world)]
    return (dict(zip(sums, numbers)), dict(zip(maxima, map(max, zip(*rows)))), dict(zip(shared, numbers[len(sums):])))


def sample_rows(rollout, scored, count):
    """-> `count` rows, by their place in the batch, as dicts of prompt, response, reward and cost."""
    rows = []
    for i in sorted(range(len(rollout)), key=rollout.order.__getitem__)[:count]:
        row = {"prompt": rollout.prompts[i].text, "response": rollout.texts[i], "reward": scored.reward_B[i].item()}
        if scored.cost_B is not None:
            row["cost"] = scored.cost_B[i].item()
        rows.append(row)
    return rows
