"""The clipped value loss of one or two critics and its gradient in plain torch, any float dtype: the
definition.
"""

import torch

from ..checks import result_dtype
from ..layout import layout, shares
from ..losses import statistics, total

STATISTICS = ("clip_fraction", "value", "return", "error", "clipped", "sequences", "tokens")


def value_loss(values, old_values, returns, cu_seqlens, mask, clip_value, token_mean, normalizer):
    """See the op.

    Inputs [C, N] or [C, B, T]; returns loss [C], gradient shaped as values without the factor `inverse` [],
    which follows, and statistics [C, 7].
    """
    dtype = result_dtype(values)
    critics = values.shape[0]
    rows = layout("value_loss", values[0].numel(), cu_seqlens, mask)
    share_N, inverse = shares(rows, token_mean, normalizer, dtype)

    def read(tensor):
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
