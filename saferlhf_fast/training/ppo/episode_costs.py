"""J_C: the mean cost of the last episodes, which moves λ. Needs torch alone.

An episode is one response. Shapes: B episodes of the newest global batch.
"""

from collections.abc import Mapping

import torch

from ...kernels.kinds import shown

LARGEST_VALID_SCORE = 1e6


class CostWindow:
    """The costs of the last `window` episodes of all ranks, on the device, and their mean.

    Invalid costs (see `mask_invalid_scores`) take a place in the window but do not count in the mean.
    """

    def __init__(self, window: int, device: torch.device | str) -> None:
        if isinstance(window, bool) or not (isinstance(window, int) and window >= 1):
            raise ValueError(f"window: expected a number of episodes >= 1, got {shown(window)}")
        self.costs = torch.zeros(window, device=device)
        self.kept = torch.zeros((), device=device)  # how many of `costs` are filled, from the end

    def add(self, costs_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the newest episodes and drops the oldest ones.

        Args:
            costs_B: [B] costs of the newest episodes of all ranks, real, of any dtype, on any device.

        Returns:
            (J_C, whether the window holds any valid cost), 0-d tensors on the device. Without a valid cost
            J_C is 0.

        Raises:
            ValueError: If costs_B is no tensor [B] of real numbers.
        """
        if not isinstance(costs_B, torch.Tensor) or costs_B.dim() != 1:
            got = (
                f"shape {list(costs_B.shape)}"
                if isinstance(costs_B, torch.Tensor)
                else type(costs_B).__name__
            )
            raise ValueError(f"costs: expected a tensor [B], one cost for each episode, got {got}")
        if (
            costs_B.dtype.is_complex
            or costs_B.dtype == torch.bool
            or costs_B.is_meta
            and not self.costs.is_meta
        ):
            raise ValueError(
                f"costs: expected real numbers, on a device with values, got {costs_B.dtype} on "
                f"{costs_B.device}"
            )
        # The newest costs are last. Invalid ones become NaN, which the mean below leaves out.
        fresh = mask_invalid_scores(costs_B.detach())
        self.costs = torch.cat([self.costs, fresh.to(self.costs.device)])[-self.costs.numel() :]
        self.kept = (self.kept + costs_B.numel()).clamp(max=self.costs.numel())
        age = torch.arange(self.costs.numel(), 0, -1, device=self.costs.device)
        counts = (age <= self.kept) & ~torch.isnan(self.costs)
        return torch.where(counts, self.costs, 0.0).sum() / counts.sum().clamp(min=1), counts.any()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State for a checkpoint."""
        return {"costs": self.costs, "kept": self.kept}

    def load_state_dict(self, values: Mapping[str, torch.Tensor]) -> None:
        """Takes the state of a checkpoint; the device stays the same.

        Args:
            values: What `state_dict` returned: `costs`, [window], and `kept`, [].
        """
        self.costs, self.kept = (values[name].to(self.costs.device) for name in ("costs", "kept"))


def mask_invalid_scores(score_B: torch.Tensor) -> torch.Tensor:
    """Scores in fp32, with NaN in place of those that no working score model gives.

    Args:
        score_B: [B] scores of any real dtype. Invalid ones are NaN, infinite or beyond ±1e6.
    """
    score_B = score_B.float()  # first: the most negative integer is its own abs()
    return score_B.where(score_B.abs() <= LARGEST_VALID_SCORE, float("nan"))
