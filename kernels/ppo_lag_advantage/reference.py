"""KL shaping, two GAE scans, their combination and the statistics in plain torch: the definition.

Any float dtype.
"""

import torch

from ..checks import result_dtype
from ..gae.reference import scan
from ..layout import layout, per_token, shares

# The order of the statistics vector; every implementation fills it like this.
STATISTICS = (
    "count",
    "sum",
    "sum_squares",
    "sequences",
    "kl",
    "kl_sequence",
    "shaped_reward",
    "shaped_cost",
    "reward_advantage",
    "cost_advantage",
    "reward_return",
    "cost_return",
)


def ppo_lag_advantage(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    reward: torch.Tensor,
    cost: torch.Tensor | None,
    reward_values: torch.Tensor,
    cost_values: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    kl_coeff: float,
    gamma: float,
    lam: float,
    clip_score: float,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Advantages, returns and statistics.

    cost, cost_values and multiplier are None together.

    Args:
        logp: Log-probs of the response tokens, nats, packed [N] or padded [B, T].
        ref_logp: Log-probs of the reference policy, nats, shaped as logp.
        reward: Score of each sequence, [B].
        cost: Cost of each sequence, [B], above 0 where it is unsafe; or None.
        reward_values: The reward critic's value before each token, shaped as logp, in units of the reward.
        cost_values: The cost critic's, shaped as logp, in units of the cost; or None.
        multiplier: The Lagrange multiplier, 0-d, >= 0; or None.
        cu_seqlens: int32 [B+1], or None with a mask.
        mask: bool [B, T], or None with cu_seqlens.
        kl_coeff: Coefficient of the KL term in the rewards, per nat.
        gamma: Discount.
        lam: Decay of GAE's sum of differences.
        clip_score: Bound of the shaped rewards and costs; infinity for none.
        carry: A masked token between valid ones is skipped; else its reward and value count as 0.

    Returns:
        advantages, reward_returns and cost_returns ([0] without cost), shaped as logp and 0 where masked, and
        statistics [12] in the order of STATISTICS. All are float64 for float64 logp, else float32.
    """
    dtype = result_dtype(logp)
    rows = layout("ppo_lag_advantage", logp.numel(), cu_seqlens, mask)
    share_N, inverse = shares(rows, False, None, dtype)
    weight_N = share_N * inverse
    kl_N = torch.where(rows.valid_N, (logp.to(dtype) - ref_logp.to(dtype)).reshape(-1), 0)

    def stream(
        score_B: torch.Tensor, values: torch.Tensor, sign: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(shaped, advantage, return) of one score; sign is that of the KL term.

        The clamp comes after the score.
        """
        score_N = torch.where(rows.final_N, per_token(score_B.to(dtype), rows), 0)
        shaped_N = (sign * kl_coeff * kl_N + score_N).clamp(-clip_score, clip_score)
        value_N = torch.where(rows.valid_N, values.reshape(-1).to(dtype), 0)
        return shaped_N, *scan(shaped_N, value_N, rows, gamma, lam, carry)

    def per_sequence(value_N: torch.Tensor) -> torch.Tensor:
        """Mean over sequences of the sum over a sequence's tokens."""
        return value_N.sum() / (rows.count_B > 0).sum().clamp(min=1)

    shaped_reward_N, reward_advantage_N, reward_return_N = stream(reward, reward_values, -1.0)
    zero = torch.zeros((), dtype=dtype, device=logp.device)
    if cost is None or cost_values is None or multiplier is None:
        advantage_N, cost_return_N = reward_advantage_N, logp.new_empty(0, dtype=dtype)
        cost_statistics = (zero, zero, zero)
    else:
        shaped_cost_N, cost_advantage_N, cost_return_N = stream(cost, cost_values, 1.0)
        advantage_N = (reward_advantage_N - multiplier * cost_advantage_N) / (1 + multiplier)
        cost_statistics = (
            per_sequence(shaped_cost_N),
            (weight_N * cost_advantage_N).sum(),
            (weight_N * cost_return_N).sum(),
        )
    statistics = torch.stack(
        [
            rows.count_B.sum().to(dtype),
            advantage_N.sum(),
            (advantage_N * advantage_N).sum(),
            (rows.count_B > 0).sum().to(dtype),
            (weight_N * kl_N).sum(),
            per_sequence(kl_N),
            per_sequence(shaped_reward_N),
            cost_statistics[0],
            (weight_N * reward_advantage_N).sum(),
            cost_statistics[1],
            (weight_N * reward_return_N).sum(),
            cost_statistics[2],
        ]
    )
    if cost is not None:
        cost_return_N = cost_return_N.reshape(logp.shape)
    # Without cost the combination is the reward's advantage itself: a copy, since an op's outputs may not
    # share memory.
    return (
        advantage_N.clone().reshape(logp.shape),
        reward_return_N.reshape(logp.shape),
        cost_return_N,
        statistics,
    )
