"""From scores to what the update learns from: KL shaping, both GAE scans, (A_r − λ·A_c)/(1 + λ)."""

from ...config.sections import REWARD
from ...kernels.ppo_lag_advantage import ppo_lag_advantage
from ...rollout.types import Advantages


def shaped_reward(scored, shaping):
    """The paper's baseline: one reward R − ν·C, clamped once with the KL term. shaping: ν, or None for R."""
    if shaping is None:
        return scored.reward_B
    (cost_B,) = scored.costs.values()
    return scored.reward_B - shaping * cost_B


def advantages(cu_seqlens, scored, lambdas, ppo):
    """-> Advantages. cu_seqlens: of the responses · lambdas: {name of a constraint: λ as a 0-d tensor}, {}
    without one · ppo: a PPO config. ValueError for several constraints.
    """
    if len(lambdas) > 1:
        raise ValueError(f"advantages: expected one constraint or none, got {', '.join(lambdas)}")
    name, value = next(iter(lambdas.items()), (None, None))
    combined, reward_returns, cost_returns, stats = ppo_lag_advantage(
        scored.logp_N,
        scored.ref_logp_N,
        shaped_reward(scored, ppo.shaping),
        scored.costs[name] if name else None,
        scored.values[REWARD],
        scored.values[name] if name else None,
        value,
        kl_coeff=ppo.kl_coeff,
        gamma=ppo.gamma,
        lam=ppo.lam,
        clip_score=ppo.clip_score,
        cu_seqlens=cu_seqlens,
        whiten=ppo.whiten,
    )
    return Advantages(combined, {REWARD: reward_returns} | ({name: cost_returns} if name else {}), stats)
