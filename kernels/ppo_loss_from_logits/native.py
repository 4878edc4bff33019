"""The gradient of the policy objective over rows of logits in C++ (csrc/ppo_loss_from_logits.cpp)."""

import torch

from .. import pointers
from ..token_logprob.native import rows_of


def ppo_loss_from_logits(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    old_logp_N: torch.Tensor,
    advantage_N: torch.Tensor,
    ref_logp_N: torch.Tensor | None,
    weight_N: torch.Tensor,
    clip_ratio: float,
    clip_high: float,
    dual_clip: float,
    kl_coeff: float,
    k1: bool,
    entropy_coeff: float,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    out_NV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference; CPU tensors, not float64."""
    logp_N, entropy_N = (logits_NV.new_empty(logits_NV.shape[0], dtype=torch.float32) for _ in range(2))
    referenced, rows = rows_of(logits_NV, ids_N, temperature, temperature_N, softcap)
    target_NV = pointers.unit_target(out_NV)
    vectors = [
        None if tensor is None else pointers.flat(tensor, torch.float32)
        for tensor in (old_logp_N, advantage_N, ref_logp_N, weight_N)
    ]
    pointers.module().ppo_rows_cpu(
        logp_N.data_ptr(),
        entropy_N.data_ptr(),
        target_NV.data_ptr(),
        target_NV.stride(0),
        pointers.DTYPE_TAG[target_NV.dtype],
        *map(pointers.address, vectors),
        *rows,
        clip_ratio,
        clip_high,
        dual_clip,
        kl_coeff,
        k1,
        entropy_coeff,
        pointers.threads(logits_NV.numel()),
    )
    del referenced
    if target_NV is not out_NV:
        out_NV.copy_(target_NV)
    return logp_N, entropy_N
