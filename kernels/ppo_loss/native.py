"""The policy loss and its gradients in one pass in C++ (csrc/ppo_loss.cpp)."""

import torch

from .. import pointers
from ..checks import result_dtype
from .reference import STATISTICS


def ppo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    ref_logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    clip_ratio: float,
    clip_high: float,
    dual_clip: float,
    kl_coeff: float,
    k1: bool,
    entropy_coeff: float,
    token_mean: bool,
    normalizer: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference; CPU tensors."""
    dtype, tokens = result_dtype(logp), logp.numel()
    inputs = [
        None if tensor is None else pointers.flat(tensor, dtype)
        for tensor in (logp, old_logp, advantages, ref_logp, entropy)
    ]
    loss, inverse = logp.new_empty((), dtype=dtype), logp.new_empty((), dtype=dtype)
    gradient = logp.new_empty(logp.shape, dtype=dtype)
    entropy_gradient = logp.new_empty(0 if entropy is None else logp.shape, dtype=dtype)
    statistics = logp.new_empty(len(STATISTICS), dtype=dtype)
    referenced, row_arguments = pointers.rows(cu_seqlens, mask, tokens)
    arguments = (
        loss.data_ptr(),
        gradient.data_ptr(),
        entropy_gradient.data_ptr(),
        inverse.data_ptr(),
        statistics.data_ptr(),
        *map(pointers.address, inputs),
        *map(pointers.address, (normalizer, scale, shift)),
        *row_arguments,
        pointers.DTYPE_TAG[dtype],
        clip_ratio,
        clip_high,
        dual_clip,
        kl_coeff,
        k1,
        entropy_coeff,
        token_mean,
        pointers.threads(tokens),
    )
    pointers.call_on_rows("ppo_loss", pointers.module().ppo_loss_cpu, arguments, cu_seqlens, tokens)
    del referenced
    return loss, gradient, entropy_gradient, inverse, statistics
