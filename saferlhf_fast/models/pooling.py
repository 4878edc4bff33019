"""The state of a sequence that its score is computed from.

Needs torch alone.

Shapes: legend in rollout/types.py; S counts sequences.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .packing import Layout

POOLINGS = ("last", "cls", "mean")
"""Where a score is read: at the last token, at the first, or from the mean of all tokens' hidden states."""


def pool(hidden_MH: torch.Tensor, layout: "Layout", pooling: str) -> torch.Tensor:
    """The state of each packed sequence that its score is computed from.

    Args:
        hidden_MH: Hidden states of packed tokens.
        layout: Where the sequences begin and end; none is empty.
        pooling: "cls" or "mean".

    Returns:
        pooled_SH in the dtype of the hidden states.
    """
    bounds = layout.cu_seqlens.long()
    if pooling == "cls":
        return hidden_MH.index_select(0, bounds[:-1])
    # One sum for each segment, in a fixed order; in fp32, since long sequences lose digits in half precision.
    means_SH = torch.segment_reduce(hidden_MH.float(), "mean", lengths=bounds.diff(), axis=0, unsafe=True)
    return means_SH.to(hidden_MH.dtype)


def pool_rows(hidden_BLH: torch.Tensor, mask_BL: torch.Tensor, pooling: str) -> torch.Tensor:
    """As `pool`, of rows with padding on either side: pooled_BH; a row without a token is finite."""
    if pooling == "cls":
        first_B = mask_BL.argmax(1)
        return hidden_BLH[torch.arange(len(hidden_BLH), device=hidden_BLH.device), first_B]
    real_BL1 = mask_BL[..., None] != 0
    sums_BH = hidden_BLH.float().where(real_BL1, 0.0).sum(1)
    return (sums_BH / real_BL1.sum(1).clamp(min=1)).to(hidden_BLH.dtype)
