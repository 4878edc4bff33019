"""The clipped value loss of one or two critics and its gradient in one pass in C++ (csrc/value_loss.cpp)."""

import torch

from .. import pointers
from ..checks import result_dtype
from .reference import STATISTICS


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
    """See the reference; CPU tensors."""
    dtype, critics, tokens = result_dtype(values), values.shape[0], values[0].numel()
    inputs = [pointers.flat(tensor, dtype) for tensor in (values, old_values, returns)]
    loss_C, inverse = values.new_empty(critics, dtype=dtype), values.new_empty((), dtype=dtype)
    gradient = values.new_empty(values.shape, dtype=dtype)
    statistics = values.new_empty((critics, len(STATISTICS)), dtype=dtype)
    referenced, row_arguments = pointers.rows(cu_seqlens, mask, tokens)
    arguments = (
        loss_C.data_ptr(),
        gradient.data_ptr(),
        inverse.data_ptr(),
        statistics.data_ptr(),
        *map(pointers.address, (*inputs, normalizer)),
        *row_arguments,
        critics,
        pointers.DTYPE_TAG[dtype],
        clip_value,
        token_mean,
        pointers.threads(tokens * critics),
    )
    pointers.call_on_rows("value_loss", pointers.module().value_loss_cpu, arguments, cu_seqlens, tokens)
    del referenced
    return loss_C, gradient, inverse, statistics
