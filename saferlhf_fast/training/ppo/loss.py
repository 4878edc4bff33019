"""PPOLagLoss: the actor's loss of PPO-Lag as a module, for loops of your own.

Needs torch alone (no transformers). Use it where the two advantages come from elsewhere: combining them takes
three elementwise launches here, while `ppo_lag_advantage` does that, KL shaping and both GAE scans in one.
"""

import inspect
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import nn

from ...kernels import checks
from ...kernels.dispatch import NAMES
from ...kernels.losses import KL_ESTIMATORS, REDUCTIONS
from ...kernels.ppo_loss import ppo_loss
from .multiplier import LagrangeMultiplier, PIDMultiplier

PER_CALL = {
    "logp",
    "old_logp",
    "advantages",
    "cu_seqlens",
    "mask",
    "ref_logp",
    "entropy",
    "normalizer",
    "advantage_scale",
    "advantage_shift",
}
SETTINGS = inspect.signature(ppo_loss).parameters.keys() - PER_CALL


class PPOLagLoss(nn.Module):
    """The clipped policy loss on the advantage that weighs reward against cost, to be minimised.

    With λ = 0 this is PPO. The module has no parameters and no state. It means the same as, with λ the
    multiplier::

        A = (reward_advantages - λ * cost_advantages) / (1 + λ)
        ratio = (logp - old_logp).clamp(-20, 20).exp()
        loss = mean(-torch.minimum(ratio * A, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * A))

    Source:
        Dai et al. (2023), Safe RLHF, arXiv 2310.12773, section 3.3, and the actor loss of its reference
        implementation.
    """

    def __init__(self, clip_ratio: float = 0.2, **settings: Any) -> None:
        """Checks the settings once.

        Args:
            clip_ratio: ε, the bound on |ratio − 1|.
            **settings: clip_high, dual_clip, reduction ("sequence-mean" or "token-mean"), kl_coeff,
                kl_estimator, entropy_coeff and impl, as in `ppo_loss`, which does the work.

        Raises:
            ValueError: If a setting is unknown, or no call could take its value.
        """
        super().__init__()
        unknown = settings.keys() - SETTINGS
        if unknown:
            raise ValueError(
                f"PPOLagLoss: expected settings out of {', '.join(sorted(SETTINGS))}, got {min(unknown)}"
            )
        _check_settings({"clip_ratio": clip_ratio, **settings})
        self.settings = {"clip_ratio": clip_ratio, **settings}

    def forward(
        self,
        logp: torch.Tensor,
        old_logp: torch.Tensor,
        reward_advantages: torch.Tensor,
        cost_advantages: torch.Tensor,
        multiplier: torch.Tensor | float | LagrangeMultiplier | PIDMultiplier,
        *,
        mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        ref_logp: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
        normalizer: torch.Tensor | float | None = None,
        advantage_scale: torch.Tensor | float | None = None,
        advantage_shift: torch.Tensor | float | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the loss of a batch: packed [N] with cu_seqlens, or padded [B, T] with a mask.

        Masked entries are never read. All token tensors have one shape and any float dtype.

        Args:
            logp: [N] or [B, T] log-probs of the response tokens under the policy, in nats.
            old_logp: The same under the policy that sampled.
            reward_advantages: A_r of each token.
            cost_advantages: A_c of each token.
            multiplier: λ ≥ 0: a number, a 0-d tensor, or the multiplier itself, whose `value` is taken. No
                gradient goes to it. A tensor is checked for its sign on the CPU alone and not under
                torch.compile, because the host would wait for the device.
            mask: [B, T], True at response tokens.
            cu_seqlens: [B+1] int32, where each response begins in N.
            ref_logp: As in `ppo_loss`.
            entropy: As in `ppo_loss`.
            normalizer: As in `ppo_loss`.
            advantage_scale: As in `ppo_loss`.
            advantage_shift: As in `ppo_loss`.

        Returns:
            (loss, stats). loss: [], fp32 (fp64 for fp64 logp), differentiable in logp. stats: those of
            `ppo_loss`, and `multiplier`.

        Raises:
            ValueError: If shapes, dtypes or devices do not match, or λ is no number ≥ 0.
        """
        names = ("logp", "old_logp", "reward_advantages", "cost_advantages")
        checks.same_tokens("PPOLagLoss", names, (logp, old_logp, reward_advantages, cost_advantages))
        value = getattr(multiplier, "value", multiplier)
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)):
            raise ValueError(
                f"PPOLagLoss: multiplier: expected a number, a 0-d tensor or a LagrangeMultiplier, "
                f"got {type(multiplier).__name__}"
            )
        multiplier_value = checks.scalar(value, logp, "PPOLagLoss: multiplier")
        assert multiplier_value is not None, "only None becomes None"
        if not isinstance(value, torch.Tensor):
            checks.not_negative("PPOLagLoss", "multiplier", value)
        elif value.device.type == "cpu" and not torch.compiler.is_compiling():
            checks.not_negative("PPOLagLoss", "multiplier", value.item())
        advantages = combined(reward_advantages, cost_advantages, multiplier_value)
        loss, stats = ppo_loss(
            logp,
            old_logp,
            advantages,
            mask=mask,
            cu_seqlens=cu_seqlens,
            ref_logp=ref_logp,
            entropy=entropy,
            normalizer=normalizer,
            advantage_scale=advantage_scale,
            advantage_shift=advantage_shift,
            **self.settings,
        )
        return loss, {**stats, "multiplier": multiplier_value}

    def extra_repr(self) -> str:
        """The settings, as print shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that no call could take, before the first step."""
    for name in ("clip_ratio", "clip_high", "dual_clip", "kl_coeff", "entropy_coeff"):
        value, optional = settings.get(name), name in ("clip_high", "dual_clip")
        # an infinite bound means no bound, but an infinite weight makes the loss NaN
        coefficient = name.endswith("_coeff")
        if name in settings and not (value is None and optional):
            if (
                isinstance(value, bool)
                or not isinstance(value, Real)
                or coefficient
                and not math.isfinite(value)
            ):
                raise ValueError(
                    f"PPOLagLoss: {name}: expected {'None or ' * optional}a {'finite ' * coefficient}number, "
                    f"got {checks.shown(value)}"
                )
    checks.clip("PPOLagLoss", settings["clip_ratio"], settings.get("clip_high"), settings.get("dual_clip"))
    for name, allowed in (("reduction", REDUCTIONS), ("kl_estimator", KL_ESTIMATORS), ("impl", NAMES)):
        if name in settings:
            checks.one_of("PPOLagLoss", name, settings[name], allowed)


def combined(
    reward_advantages: torch.Tensor, cost_advantages: torch.Tensor, multiplier: torch.Tensor
) -> torch.Tensor:
    """(A_r − λ·A_c) / (1 + λ), without gradient.

    Args:
        reward_advantages: A_r, [N] or [B, T].
        cost_advantages: A_c, in the same shape.
        multiplier: λ, 0-d, whose dtype the result has. An infinite or NaN λ gives NaN.
    """
    dtype = multiplier.dtype
    return (reward_advantages.detach().to(dtype) - multiplier * cost_advantages.detach().to(dtype)) / (
        1 + multiplier
    )
