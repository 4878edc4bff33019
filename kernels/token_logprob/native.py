"""Log-prob and entropy of given tokens in C++ (csrc/token_logprob.cpp).

Each logit is read once, and once more for backward.
"""

import torch

from .. import pointers


def rows_of(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int | float, ...]]:
    """Rows of logits as `_C` takes them.

    Args:
        logits_NV: Float32, bfloat16 or float16, in any layout.
        ids_N: Integers.
        temperature: One for all rows.
        temperature_N: One for each row, or None.
        softcap: 0 for none.

    Returns:
        The tensors that the arguments point into, which must stay referenced until the call returns, and the
        arguments.
    """
    if logits_NV.stride(1) != 1 and logits_NV.shape[1] > 1:
        logits_NV = logits_NV.contiguous()
    ids_N = pointers.flat(ids_N, torch.int64)
    if temperature_N is not None:
        temperature_N = pointers.flat(temperature_N, torch.float32)
    return (logits_NV, ids_N, temperature_N), (
        logits_NV.data_ptr(),
        logits_NV.stride(0),
        ids_N.data_ptr(),
        *logits_NV.shape,
        pointers.address(temperature_N),
        temperature,
        softcap,
        pointers.DTYPE_TAG[logits_NV.dtype],
    )


def token_logprob(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference; CPU tensors, not float64, in, float32 out."""
    count = logits_NV.shape[0]
    logp_N, lse_N = (logits_NV.new_empty(count, dtype=torch.float32) for _ in range(2))
    entropy_N = logits_NV.new_empty(count if entropy else 0, dtype=torch.float32)
    referenced, rows = rows_of(logits_NV, ids_N, temperature, temperature_N, softcap)
    pointers.module().token_logprob_cpu(
        logp_N.data_ptr(), entropy_N.data_ptr(), lse_N.data_ptr(), *rows, pointers.threads(logits_NV.numel())
    )
    del referenced
    return logp_N, entropy_N, lse_N


def token_logprob_backward(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    logp_N: torch.Tensor,
    entropy_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_logp_N: torch.Tensor | None,
    grad_entropy_N: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    out_NV: torch.Tensor,
) -> torch.Tensor:
    """See the reference; CPU tensors, not float64."""
    referenced, rows = rows_of(logits_NV, ids_N, temperature, temperature_N, softcap)
    target_NV = pointers.unit_target(out_NV)
    vectors = [
        None if tensor is None else pointers.flat(tensor, torch.float32)
        for tensor in (logp_N, entropy_N, lse_N, grad_logp_N, grad_entropy_N)
    ]
    pointers.module().token_logprob_backward_cpu(
        target_NV.data_ptr(),
        target_NV.stride(0),
        pointers.DTYPE_TAG[target_NV.dtype],
        *map(pointers.address, vectors),
        *rows,
        pointers.threads(logits_NV.numel()),
    )
    del referenced
    if target_NV is not out_NV:
        out_NV.copy_(target_NV)
    return out_NV
