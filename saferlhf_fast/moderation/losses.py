"""The losses of a moderator's heads, masked where a label is unknown.

    categories   Σ_k m_k · BCE(z_k, y_k; pos_weight w_k),   w_k = min(cap, negatives_k / positives_k)
    severity     Σ_k m_k · BCE(s + b_k, 1[y > k]; w_k), k = 0, 1, 2         (CORAL)
    refusal      m · BCE(z, y; w)

Each sum is divided by the number of the head's outputs, so that nineteen categories do not outweigh severity.

Source: Cao, Mirjalili and Raschka (2020), Rank consistent ordinal regression, arXiv 1901.07884.

Shapes: S examples, X outputs of `ModeratorSpec.outputs`.
"""

import torch
from torch.nn import functional as F

from ..models.moderator_spec import ModeratorSpec
from .labels import Labels


def masked_bce(
    logits_SX: torch.Tensor,
    labels: Labels,
    pos_weight_X: torch.Tensor | None = None,
) -> torch.Tensor:
    """Binary cross entropy of each output [S, X] (nats); exactly 0, with gradient 0, where unknown.

    Args:
        logits_SX: Logits.
        labels: True and known.
        pos_weight_X: Weight of the positives; None: 1.
    """
    # where() before the loss: an unknown label must not touch the gradient, whatever its logit is
    logits_SX = logits_SX.where(labels.known_SX, 0.0)
    loss_SX = F.binary_cross_entropy_with_logits(
        logits_SX, labels.true_SX.to(logits_SX.dtype), pos_weight=pos_weight_X, reduction="none"
    )
    return loss_SX.where(labels.known_SX, 0.0)


def moderation_losses(
    logits_SX: torch.Tensor, labels: Labels, log_weight_X: torch.Tensor, spec: ModeratorSpec
) -> dict[str, torch.Tensor]:
    """{head: loss_S} of a moderator's calibrated logits.

    Args:
        logits_SX: What the moderator returns.
        labels: True and known.
        log_weight_X: `ModeratorHead.log_weight`, which the logits are without and the weighted loss needs.
        spec: The moderator's.
    """
    log_weight_X = log_weight_X.to(logits_SX.dtype)
    loss_SX = masked_bce(logits_SX + log_weight_X, labels, log_weight_X.exp())
    return {head: loss_SX[:, place].mean(1) for head, place in spec.heads.items()}
