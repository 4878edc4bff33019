"""linear_ppo_loss on a GPU: torch's products in chunks, Triton on the rows (ppo_loss_from_logits)."""

from typing import Any

import torch

from .. import linear
from ..ppo_loss_from_logits import triton_impl as rows


def linear_ppo_loss(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, linear.HeadGradients]:
    """See the reference; arguments: its own."""
    return linear.policy_gradients(rows.ppo_loss_from_logits, *arguments, narrow=True)
