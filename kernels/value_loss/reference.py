"""The clipped value loss of one or two critics and its gradient in plain torch: the definition.

Any float dtype. In this file C is the number of critics.
"""

import torch

from ..checks import result_dtype
from ..layout import layout, shares
from ..losses import statistics, total

STATISTICS = ("clip_fraction", "value", "return", "error", "clipped", "sequences", "tokens")


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    clip_value: float,
    token_mean: bool,
    normalizer: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of each critic, and its gradient without the factor `inverse`.

    Args:
        values: Values of C critics, packed [C, N] or padded [C, B, T], any float dtype.
        old_values: The values before the update, of the same shape.
        returns: The targets, of the same shape and in the values' units.
        cu_seqlens: int32 [B+1], or None with a mask.
        mask: bool [B, T], or None with cu_seqlens.
        clip_value: How far a value may move from the old one, in the values' units; infinity for any.
        token_mean: The mean over tokens; else the mean over sequences of each one's token mean.
        normalizer: 0-d count that the loss is divided by; None for that of this call.

    Returns:
        loss [C], gradient shaped as values without the factor inverse [], which follows, and statistics [C,
        7] in the order of STATISTICS. All are float64 for float64 values, else float32.
    """
    dtype = result_dtype(values)
    critics = values.shape[0]
    rows = layout("value_loss", values[0].numel(), cu_seqlens, mask)
    share_N, inverse = shares(rows, token_mean, normalizer, dtype)

    def read(tensor: torch.Tensor) -> torch.Tensor:
        return torch.where(rows.valid_N, tensor.reshape(critics, -1).to(dtype), 0)

    value_CN, old_CN, return_CN = read(values), read(old_values), read(returns)
    difference_CN = value_CN - old_CN
    clipped_CN = old_CN + difference_CN.clamp(-clip_value, clip_value)
    plain_error_CN, clipped_error_CN = value_CN - return_CN, clipped_CN - return_CN
    plain_square_CN, clipped_square_CN = plain_error_CN.square(), clipped_error_CN.square()
    loss_C = 0.5 * inverse * total(share_N * torch.maximum(plain_square_CN, clipped_square_CN))
    # Where the clipped square is the larger one the loss no longer depends on the value; a tie inside the
    # range does.
    flat_CN = (clipped_square_CN > plain_square_CN) & (difference_CN.abs() > clip_value)
    # Two equal squares outside the range: autograd of maximum gives half to each, and the clipped one has
    # none.
    tie_CN = (clipped_square_CN == plain_square_CN) & (difference_CN.abs() > clip_value)
    gradient_CN = torch.where(flat_CN, 0, share_N * plain_error_CN * torch.where(tie_CN, 0.5, 1.0).to(dtype))
    outside_CN = rows.valid_N & (difference_CN.abs() > clip_value)
    return (
        loss_C,
        gradient_CN.reshape(values.shape),
        inverse,
        statistics(rows, dtype, (outside_CN, value_CN, return_CN, plain_square_CN, rows.valid_N & flat_CN)),
    )
