"""From scores to what the update learns from: KL shaping, both GAE scans, (A_r − λ·A_c)/(1 + λ)."""

from ...kernels.ppo_lag_advantage import ppo_lag_advantage
from ...rollout.types import Advantages


def shaped_reward(scored, shaping):
    """The paper's baseline: one reward R − ν·C, clamped once with the KL term. shaping: ν, or None for R."""
    return scored.reward_B if shaping is None else scored.reward_B - shaping * scored.cost_B


def advantages(cu_seqlens, scored, multiplier, ppo):
    """-> Advantages. cu_seqlens: of the responses · multiplier: λ as a 0-d tensor, or None without a constraint · ppo: a PPO
    config."""
    constrained = scored.cost_values_N is not None
    combined, reward_returns, cost_returns, stats = ppo_lag_advantage(
        scored.logp_N, scored.ref_logp_N, shaped_reward(scored, ppo.shaping),
        scored.cost_B if constrained else None, scored.reward_values_N, scored.cost_values_N,
        multiplier if constrained else None, kl_coeff=ppo.kl_coeff, gamma=ppo.gamma, lam=ppo.lam,
        clip_score=ppo.clip_score, cu_seqlens=cu_seqlens, whiten=ppo.whiten)
    return Advantages(combined, reward_returns, cost_returns, stats)
