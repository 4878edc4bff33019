"""Log-prob and entropy of given tokens in C++ (csrc/token_logprob.cpp): each logit is read once, and once
more for backward.
"""

import torch

from .. import pointers


def rows_of(logits_NV, ids_N, temperature, temperature_N, softcap):
    """(keep, arguments): the tensors that must live until the call is over, and the logit rows as `_C` takes
    them.
    """
    if logits_NV.stride(1) != 1 and logits_NV.shape[1] > 1:
        logits_NV = logits_NV.contiguous()
    ids_N = ids_N.to(torch.int64).contiguous()
    if temperature_N is not None:
        temperature_N = temperature_N.to(torch.float32).contiguous()
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


def token_logprob(logits_NV, ids_N, temperature, temperature_N, softcap, entropy):
    """See the op. CPU tensors, not float64. Returns logp_N, entropy_N or [0], lse_N in float32."""
    count = logits_NV.shape[0]
    logp_N, lse_N = (logits_NV.new_empty(count, dtype=torch.float32) for _ in range(2))
    entropy_N = logits_NV.new_empty(count if entropy else 0, dtype=torch.float32)
    keep, rows = rows_of(logits_NV, ids_N, temperature, temperature_N, softcap)
    pointers.module().token_logprob_cpu(
        logp_N.data_ptr(), entropy_N.data_ptr(), lse_N.data_ptr(), *rows, pointers.threads(logits_NV.numel())
    )
    del keep
    return logp_N, entropy_N, lse_N


def token_logprob_backward(
    logits_NV,
    ids_N,
    logp_N,
    entropy_N,
    lse_N,
    grad_logp_N,
    grad_entropy_N,
    temperature,
    temperature_N,
    softcap,
    out_NV,
):
    """Writes d logits into out_NV, which may lie over logits_NV (see the room's reference)."""
    keep, rows = rows_of(logits_NV, ids_N, temperature, temperature_N, softcap)
    target_NV = pointers.unit_rows(out_NV)
    vectors = [
        None if tensor is None else tensor.to(torch.float32).contiguous()
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
    del keep
    if target_NV is not out_NV:
        out_NV.copy_(target_NV)
    return out_NV
