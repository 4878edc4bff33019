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
        hidden_NH: Hidden states before the tokens, any float dtype; finite where the weight is 0, too.
        weight_VH: The head's weight, of the same dtype.
        ids_N: The tokens, integers in 0..V-1.
        bias_V: The head's bias, of the same dtype, or None.
        tokens: old_logp_N (nats), advantage_N, ref_logp_N (nats) or None, weight_N.
        objective: As `policy.objective` returns it.
        wanted: Which of the three gradients are wanted; the others are None.
        chunk_tokens: Tokens whose logits exist at once, or None; changes nothing here.

    Returns:
        logp_N and entropy_N (nats), 0 where the weight is 0, and (d hidden [N, H], d weight [V, H], d bias
        [V]), None where not wanted; d hidden is in the dtype of `linear.stored_dtype`, the others are float64
        for float64 hidden states, else float32.
    """
    d_NV = logits_of(hidden_NH, weight_VH, bias_V)
    arguments: tuple[Any, ...] = (*tokens, *objective, d_NV)
    logp_N, entropy_N = rows.ppo_loss_from_logits(d_NV, ids_N, *arguments)
    return logp_N, entropy_N, gradients(d_NV, hidden_NH, weight_VH, wanted, stored_dtype(hidden_NH.dtype))
