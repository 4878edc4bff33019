"""linear_ppo_loss on the CPU: torch's products in chunks, C++ on the rows (csrc/ppo_loss_from_logits.cpp)."""

from typing import Any

import torch

from .. import linear
from ..ppo_loss_from_logits import native as rows


def linear_ppo_loss(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, linear.HeadGradients]:
    """See the reference; arguments: its own."""
    return linear.policy_gradients(rows.ppo_loss_from_logits, *arguments, narrow=False)
