"""ppo_lag_advantage: from log-probs, scores and values to the advantage that PPO-Lag follows, in one call."""

from typing import Any

import torch

from .. import checks, direct
from ..dispatch import choose
from .reference import STATISTICS

EPSILON = 1e-8  # added to the variance when whitening

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    "ppo_lag_advantage(Tensor logp, Tensor ref_logp, Tensor reward, Tensor? cost, Tensor reward_values, "
    "Tensor? cost_values, Tensor? multiplier, Tensor? cu_seqlens, Tensor? mask, float kl_coeff, float gamma, "
    "float lam, float clip_score, bool carry, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _run(logp: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *arguments, impl = inputs
    function, _ = choose("ppo_lag_advantage", (logp,), impl)
    return function(logp, *arguments)


def _fake(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    reward: torch.Tensor,
    cost: torch.Tensor | None,
    *inputs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = checks.result_dtype(logp)
    cost_shape = (0,) if cost is None else logp.shape
    return (
        logp.new_empty(logp.shape, dtype=dtype),
        logp.new_empty(logp.shape, dtype=dtype),
        logp.new_empty(cost_shape, dtype=dtype),
        logp.new_empty(len(STATISTICS), dtype=dtype),
    )


_lib.impl("ppo_lag_advantage", _run, "CompositeExplicitAutograd")
torch.library.register_fake("saferlhf_fast::ppo_lag_advantage", _fake, lib=_lib)
_call = direct.op("ppo_lag_advantage", _run)


def whitening(
    count: torch.Tensor,
    total: torch.Tensor,
    sum_squares: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift with which `ppo_loss` whitens the advantages of a batch. No host sync.

    Sum the three arguments over ranks first (one all-reduce). A * scale + shift then has mean 0 and variance
    1: population variance, 1e-8 added to it. Nothing to whiten (count 0) gives scale 1e4 and shift 0.

    Args:
        count: Valid tokens, 0-d.
        total: Sum of their advantages, 0-d.
        sum_squares: Sum of the squares, 0-d.

    Returns:
        (scale, shift), 0-d, on the device of the arguments.
    """
    count = count.clamp(min=1)
    mean = total / count
    variance = (sum_squares / count - mean * mean).clamp(min=0)
    scale = (variance + EPSILON).rsqrt()
    return scale, -mean * scale


def ppo_lag_advantage(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    reward: torch.Tensor,
    cost: torch.Tensor | None,
    reward_values: torch.Tensor,
    cost_values: torch.Tensor | None,
    multiplier: float | torch.Tensor | None,
    *,
    kl_coeff: float,
    gamma: float,
    lam: float,
    clip_score: float | None,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    masked: str = "zero",
    whiten: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """KL shaping, both GAE scans and their combination: the advantage of PPO-Lag.

    Means the same as, for one row, with kl = logp - ref_logp and last = 1 at its last valid token and 0
    before::

        # the clamp comes after the score is added
        r = (-kl_coeff * kl + reward * last).clamp(-clip_score, clip_score)
        c = (kl_coeff * kl + cost * last).clamp(-clip_score, clip_score)
        A_r, A_c = gae(r, reward_values)[0], gae(c, cost_values)[0]
        A = (A_r - multiplier * A_c) / (1 + multiplier)

    Without cost, cost_values and multiplier this is plain PPO: A = A_r. Masked entries are never read. No
    gradient flows back.

    Args:
        logp: Log-probs of the policy that sampled, nats; packed [N] or padded [B, T], as in `gae`.
        ref_logp: Log-probs of the reference policy, shaped as logp.
        reward: [B], in the reward model's units.
        cost: [B], in the cost model's units, or None.
        reward_values: Shaped as logp; read at the position that predicts the token.
        cost_values: Shaped as logp, or None.
        multiplier: Number >= 0 or 0-d tensor, which is read on its device; or None.
        kl_coeff: Coefficient of the KL term, in units of the scores per nat.
        gamma: Discount, in 0..1.
        lam: Decay of the sum of differences, in 0..1.
        clip_score: Bound of |r| and |c|; None for none.
        cu_seqlens: Offsets of packed rows, int32 [B+1], or None.
        mask: Valid tokens of padded rows, bool [B, T], or None.
        masked: As in `gae`.
        whiten: Add `advantage_scale` and `advantage_shift` of this call's tokens to stats, for `ppo_loss`.
            The advantages stay as they are, since whitening needs the global batch: with several ranks add up
            `count`, `sum` and `sum_squares` and call `whitening` of saferlhf_fast.kernels.ppo_lag_advantage.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        (advantages, reward_returns, cost_returns or None, stats). The first three are shaped as logp, 0 where
        masked; float64 for float64 logp, else float32. stats are 0-d, over valid tokens: count, sum,
        sum_squares of the advantages; sequences (with a token); kl (mean over sequences of the token mean);
        kl_sequence, shaped_reward, shaped_cost (mean over sequences of the sum over tokens);
        reward_advantage, cost_advantage, reward_return, cost_return (means over sequences of the token mean).
        Names with cost are there only with cost.

    Raises:
        ValueError: Arguments that do not fit, or only some of cost, cost_values and multiplier.
        NotImplementedError: `impl` cannot run here.

    Source:
        Dai et al. (2023), Safe RLHF, arXiv 2310.12773; safe-rlhf's PPOLagTrainer.
    """
    op = "ppo_lag_advantage"
    of_cost = [cost is not None, cost_values is not None, multiplier is not None]
    if any(of_cost) and not all(of_cost):
        raise ValueError(
            f"{op}: expected all of cost, cost_values and multiplier, or none, got "
            + ", ".join(
                f"{name} {'given' if is_given else 'None'}"
                for name, is_given in zip(("cost", "cost_values", "multiplier"), of_cost)
            )
        )
    names = ("logp", "ref_logp", "reward_values", "cost_values")
    tokens = [logp, ref_logp, reward_values]
    if cost_values is not None:
        tokens.append(cost_values)
    checks.same_tokens(op, names, tokens)
    checks.one_of(op, "masked", masked, ("zero", "carry"))
    gamma, lam = checks.fraction(op, "gamma", gamma), checks.fraction(op, "lam", lam)
    kl_coeff = checks.number(op, "kl_coeff", kl_coeff, expected="a finite number", finite=True)
    whiten = checks.flag(op, "whiten", whiten)
    checks.implementation(op, impl)
    if multiplier is not None and not isinstance(multiplier, torch.Tensor):
        checks.not_negative(op, "multiplier", multiplier)
    cu_seqlens, mask, count = checks.rows(op, "logp", logp.shape, logp.device, cu_seqlens, mask)
    checks.per_row(op, "reward", reward, count, logp.device)
    if cost is not None:
        checks.per_row(op, "cost", cost, count, logp.device)
    clip_score = float("inf") if clip_score is None else checks.not_negative(op, "clip_score", clip_score)
    advantages, reward_returns, cost_returns, statistics = _call(
        *map(checks.detached, (logp, ref_logp, reward, cost, reward_values, cost_values)),
        checks.scalar(multiplier, logp, "multiplier"),
        cu_seqlens,
        mask,
        kl_coeff,
        gamma,
        lam,
        clip_score,
        masked == "carry",
        impl,
    )
    stats = dict(zip(STATISTICS, statistics.unbind()))
    if cost is None:
        stats = {name: value for name, value in stats.items() if "cost" not in name}
    if whiten:
        stats["advantage_scale"], stats["advantage_shift"] = whitening(
            stats["count"], stats["sum"], stats["sum_squares"]
        )
    return advantages, reward_returns, None if cost is None else cost_returns, stats
