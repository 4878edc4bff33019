"""KL shaping, both scans, their combination and the statistics in one pass, in C++ and CUDA
(csrc/ppo_lag_advantage.*).
"""

import torch

from .. import pointers
from ..checks import result_dtype
from ..counters import counter
from .reference import STATISTICS


def ppo_lag_advantage(
    logp,
    ref_logp,
    reward,
    cost,
    reward_values,
    cost_values,
    multiplier,
    cu_seqlens,
    mask,
    kl_coeff,
    gamma,
    lam,
    clip_score,
    carry,
):
    """See the op.

    Returns advantages, reward_returns, cost_returns (empty without cost), statistics [12]. On a GPU one
    launch, and the offsets are trusted.
    """
    dtype, tokens, device, module = result_dtype(logp), logp.numel(), logp.device, pointers.module()
    inputs = [
        None if tensor is None else pointers.flat(tensor, dtype)
        for tensor in (logp, ref_logp, reward, cost, reward_values, cost_values, multiplier)
    ]
    advantages, reward_returns = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    cost_returns = torch.empty_like(inputs[0]) if cost is not None else logp.new_empty(0, dtype=dtype)
    statistics = logp.new_empty(len(STATISTICS), dtype=dtype)
    # No rows means no row to read a cost of; the native side tells "no cost" by a null address, which an
    # empty tensor has.
    keep, row_arguments = pointers.rows(cu_seqlens, mask, tokens)
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
        module.ppo_lag_advantage_cpu(*arguments, pointers.threads(tokens))
    del keep
    return advantages, reward_returns, cost_returns, statistics
