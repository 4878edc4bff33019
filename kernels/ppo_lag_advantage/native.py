"""KL shaping, both scans, their combination and the statistics in one pass, in C++ and CUDA.

The sources are csrc/ppo_lag_advantage.cpp and csrc/ppo_lag_advantage.cu.
"""

import torch

from .. import pointers
from ..checks import result_dtype
from ..counters import counter
from .reference import STATISTICS


def ppo_lag_advantage(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    reward: torch.Tensor,
    cost: torch.Tensor | None,
    reward_values: torch.Tensor,
    cost_values: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    kl_coeff: float,
    gamma: float,
    lam: float,
    clip_score: float,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. On a GPU it is one launch, and the offsets are trusted."""
    dtype, tokens, device, module = result_dtype(logp), logp.numel(), logp.device, pointers.module()
    flat_logp = pointers.flat(logp, dtype)
    inputs = [
        None if tensor is None else pointers.flat(tensor, dtype)
        for tensor in (flat_logp, ref_logp, reward, cost, reward_values, cost_values, multiplier)
    ]
    advantages, reward_returns = torch.empty_like(flat_logp), torch.empty_like(flat_logp)
    cost_returns = torch.empty_like(flat_logp) if cost is not None else logp.new_empty(0, dtype=dtype)
    statistics = logp.new_empty(len(STATISTICS), dtype=dtype)
    # A null address says "no cost"; an empty tensor has one too, but without rows no cost is read.
    referenced, row_arguments = pointers.rows(cu_seqlens, mask, tokens)
    arguments = (
        advantages.data_ptr(),
        reward_returns.data_ptr(),
        pointers.address(cost_returns if cost is not None else None),
        statistics.data_ptr(),
        *map(pointers.address, inputs),
        *row_arguments,
        pointers.DTYPE_TAG[dtype],
        kl_coeff,
        gamma,
        lam,
        clip_score,
        carry,
    )
    if logp.is_cuda:
        with pointers.on(device):
            partials = torch.empty(module.partials, dtype=torch.float64, device=device)
            module.ppo_lag_advantage_cuda(
                *arguments, partials.data_ptr(), counter(device).data_ptr(), pointers.stream(device)
            )
    else:
        on_cpu, function = (*arguments, pointers.threads(tokens)), module.ppo_lag_advantage_cpu
        pointers.call_on_rows("ppo_lag_advantage", function, on_cpu, cu_seqlens, tokens)
    del referenced
    return advantages, reward_returns, cost_returns, statistics
