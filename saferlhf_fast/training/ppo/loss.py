"""PPOLagLoss: the actor's loss of PPO-Lag as a module, for loops of your own.

Needs torch alone (no transformers).

The combination of the two advantages is three elementwise launches here; `ppo_lag_advantage` does it, with KL
shaping and both GAE scans, in one. Use this where the two advantages come from elsewhere.
"""

import inspect
import math
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

    Means the same as, with λ the multiplier::

        A = (reward_advantages - λ * cost_advantages) / (1 + λ)
        ratio = (logp - old_logp).clamp(-20, 20).exp()
        loss = mean(-torch.minimum(ratio * A, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * A))

    Source: Safe RLHF (Dai et al., arXiv 2310.12773), section 3.3, and the actor loss of its reference
    implementation; with λ = 0 this is PPO. clip_ratio, clip_high, dual_clip, reduction ("sequence-mean" or
    "token-mean"), kl_coeff, kl_estimator, entropy_coeff, impl: as in `ppo_loss`, which does the work. The
    module has no parameters and no state. ValueError for a setting that cannot be.
    """

    def __init__(self, clip_ratio: float = 0.2, **settings: Any) -> None:
        super().__init__()
        unknown = settings.keys() - SETTINGS
        if unknown:
            raise ValueError(
                f"PPOLagLoss: expected settings out of {', '.join(sorted(SETTINGS))}, got {min(unknown)}"
            )
        _refuse({"clip_ratio": clip_ratio, **settings})
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
    ) -> tuple[torch.Tensor, dict]:
        """-> (loss, stats): loss [], fp32 (fp64 for fp64 logp), differentiable in logp; stats as `ppo_loss`,
        and `multiplier`.

        logp, old_logp (nats) and both advantages: packed [N] with cu_seqlens (int32 [B+1]) or padded [B, T]
        with a boolean mask, any float dtype; masked entries are never read. multiplier: λ ≥ 0 as a number, a
        0-d tensor (read, to refuse a negative one, on the CPU alone: on a device the host does not wait for
        it, nor under torch.compile) or a LagrangeMultiplier or PIDMultiplier, whose `value` it is; no
        gradient goes to it. ref_logp, entropy, normalizer, advantage_scale, advantage_shift: as in
        `ppo_loss`. ValueError for what does not fit.
        """
        names = ("logp", "old_logp", "reward_advantages", "cost_advantages")
        checks.same_tokens("PPOLagLoss", names, (logp, old_logp, reward_advantages, cost_advantages))
        value = getattr(multiplier, "value", multiplier)
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)):
            raise ValueError(
                f"PPOLagLoss: multiplier: expected a number, a 0-d tensor or a LagrangeMultiplier, "
                f"got {type(multiplier).__name__}"
            )
        given, value = value, checks.scalar(value, logp, "PPOLagLoss: multiplier")
        if (
            not isinstance(given, torch.Tensor)
            or given.device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            checks.not_negative(
                "PPOLagLoss", "multiplier", given if not isinstance(given, torch.Tensor) else given.item()
            )
        advantages = combined(reward_advantages, cost_advantages, value)
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
        return loss, {**stats, "multiplier": value}

    def extra_repr(self) -> str:
        """Its settings, as print shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _refuse(settings):
    """ValueError for a setting that no call could take: known when the module is made, not in the first step."""
    for name in ("clip_ratio", "clip_high", "dual_clip", "kl_coeff", "entropy_coeff"):
        value, optional = settings.get(name), name in ("clip_high", "dual_clip")
        # an infinite bound is none; an infinite weight is NaN
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
                    f"got {value!r}"
                )
    checks.clip("PPOLagLoss", settings["clip_ratio"], settings.get("clip_high"), settings.get("dual_clip"))
    for name, allowed in (("reduction", REDUCTIONS), ("kl_estimator", KL_ESTIMATORS), ("impl", NAMES)):
        if name in settings:
            checks.one_of("PPOLagLoss", name, settings[name], allowed)


def combined(reward_advantages, cost_advantages, multiplier):
    """(A_r − λ·A_c) / (1 + λ) in λ's dtype, without gradient; an infinite or NaN λ gives NaN."""
    dtype = multiplier.dtype
    return (reward_advantages.detach().to(dtype) - multiplier * cost_advantages.detach().to(dtype)) / (
        1 + multiplier
    )
