"""The policy objective's gradients from hidden states and a head's weight in plain torch: the definition.

All logits are made at once.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..linear import HeadGradients, stored_dtype
from ..linear_logprob.reference import gradients, logits_of
from ..policy import Objective
from ..ppo_loss_from_logits import reference as rows


def linear_ppo_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor],
    objective: Objective,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
) -> tuple[torch.Tensor, torch.Tensor, HeadGradients]:
    """Log-probs, entropies and gradients of the weighted policy objective, as `linear.policy_gradients`.

    Args:
        hidden_NH: Any float dtype; finite where the weight is 0, too.
        weight_VH: Of the same dtype.
        ids_N: Integers.
        bias_V: Of the same dtype, or None.
        tokens: old_logp_N, advantage_N, ref_logp_N or None, weight_N.
        objective: As `policy.objective` returns it.
        wanted: Which of the three gradients are wanted; the others are None.
        chunk_tokens: Tokens whose logits exist at once, or None; changes nothing here.

    Returns:
        logp_N, entropy_N (nats) and (d hidden, d weight, d bias).
    """
    d_NV = logits_of(hidden_NH, weight_VH, bias_V)
    arguments: tuple[Any, ...] = (*tokens, *objective, d_NV)
    logp_N, entropy_N = rows.ppo_loss_from_logits(d_NV, ids_N, *arguments)
    return logp_N, entropy_N, gradients(d_NV, hidden_NH, weight_VH, wanted, stored_dtype(hidden_NH.dtype))
