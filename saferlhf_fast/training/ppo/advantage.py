"""From scores and values to what the update learns from: KL shaping, GAE twice, (A_r − λ·A_c)/(1 + λ)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ...config.sections import REWARD
from ...kernels.ppo_lag_advantage import ppo_lag_advantage
from ...rollout.types import Advantages

if TYPE_CHECKING:
    from ...config.sections import PPO
    from ...rollout.types import Scored


def shaped_reward(scored: "Scored", shaping: float | None) -> torch.Tensor:
    """[B] reward of each response: R, or R − ν·C for the paper's reward-shaping baseline.

    Args:
        scored: Rewards and costs of a rollout.
        shaping: ν, or None for R. The sum R − ν·C is clamped once, together with the KL term.
    """
    if shaping is None:
        return scored.reward_B
    (cost_B,) = scored.costs.values()
    return scored.reward_B - shaping * cost_B


def advantages(
    cu_seqlens: torch.Tensor, scored: "Scored", lambdas: Mapping[str, torch.Tensor], ppo: "PPO"
) -> Advantages:
    """A = (A_r − λ·A_c)/(1 + λ) of each response token, and the critics' targets.

    In each stream, with kl_t = logp_t − ref_logp_t::

        r_t = clip(−β·kl_t + [t last]·R, ±clip_score)
        c_t = clip(+β·kl_t + [t last]·C, ±clip_score)
        δ_t = x_t + γ·V_{t+1} − V_t,   A_t = δ_t + γ·λ_gae·A_{t+1},   return_t = A_t + V_t

    Without a constraint A is A_r. No gradient flows back.

    Args:
        cu_seqlens: [B+1] int32, where each response begins in N.
        scored: ref_logp_N and logp_N in nats, reward_B and costs in score model units, values by stream.
        lambdas: λ as a 0-d tensor by name of the constraint; empty without one.
        ppo: β (kl_coeff), γ (gamma), λ_gae (lam), clip_score, whiten, and ν (shaping).

    Raises:
        ValueError: If there is more than one constraint.

    Source:
        Dai et al. (2023), Safe RLHF, arXiv 2310.12773, and PPOLagTrainer of its reference implementation;
        GAE by Schulman et al. (2016), arXiv 1506.02438.
    """
    if len(lambdas) > 1:
        raise ValueError(f"advantages: expected one constraint or none, got {', '.join(lambdas)}")
    name, multiplier = next(iter(lambdas.items()), (None, None))
    assert scored.logp_N is not None, "the actor's log-probs are computed before the advantages"
    combined, reward_returns, cost_returns, stats = ppo_lag_advantage(
        scored.logp_N,
        scored.ref_logp_N,
        shaped_reward(scored, ppo.shaping),
        scored.costs[name] if name else None,
        scored.values[REWARD],
        scored.values[name] if name else None,
        multiplier,
        kl_coeff=ppo.kl_coeff,
        gamma=ppo.gamma,
        lam=ppo.lam,
        clip_score=ppo.clip_score,
        cu_seqlens=cu_seqlens,
        whiten=ppo.whiten,
    )
    returns = {REWARD: reward_returns}
    if name is not None and cost_returns is not None:
        returns[name] = cost_returns
    return Advantages(combined, returns, stats)
