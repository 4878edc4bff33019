"""Generalised advantage estimation in C++ (csrc/gae.cpp) and CUDA (csrc/gae.cu)."""

import torch

from .. import pointers
from ..checks import result_dtype


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    gamma: float,
    lam: float,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. On a GPU the offsets are trusted."""
    dtype, tokens = result_dtype(rewards), rewards.numel()
    rewards, values = pointers.flat(rewards, dtype), pointers.flat(values, dtype)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    referenced, row_arguments = pointers.rows(cu_seqlens, mask, tokens)
    arguments = (
        advantages.data_ptr(),
        returns.data_ptr(),
        rewards.data_ptr(),
        values.data_ptr(),
        *row_arguments,
        pointers.DTYPE_TAG[dtype],
        gamma,
        lam,
        carry,
    )
    if rewards.is_cuda:
        with pointers.on(rewards.device):
            pointers.module().gae_cuda(*arguments, pointers.stream(rewards.device))
    else:
        on_cpu = (*arguments, pointers.threads(tokens))
        pointers.call_on_rows("gae", pointers.module().gae_cpu, on_cpu, cu_seqlens, tokens)
    del referenced
    return advantages, returns
