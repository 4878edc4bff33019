"""Log-prob and entropy of tokens from hidden states and a head's weight in plain torch: the definition,
logits and all.
"""

import torch

from ..checks import result_dtype
from ..token_logprob import reference as rows


def logits_of(hidden_NH, weight_VH, bias_V):
    dtype = result_dtype(hidden_NH)
    with torch.autocast(hidden_NH.device.type, enabled=False):  # which would round them to bfloat16
        logits_NV = hidden_NH.to(dtype) @ weight_VH.to(dtype).t()
    return logits_NV if bias_V is None else logits_NV + bias_V.to(dtype)


def linear_logprob(
    hidden_NH, weight_VH, ids_N, bias_V, temperature, temperature_N, softcap, entropy, chunk_tokens, gradient
):
    """(logp_N, entropy_N or [0], lse_N). chunk_tokens and gradient change nothing here."""
    return rows.token_logprob(
        logits_of(hidden_NH, weight_VH, bias_V), ids_N, temperature, temperature_N, softcap, entropy
    )


def linear_logprob_backward(
    hidden_NH,
    weight_VH,
    ids_N,
    bias_V,
    logp_N,
    entropy_N,
    lse_N,
    grad_logp_N,
    grad_entropy_N,
    temperature,
    temperature_N,
    softcap,
    wanted,
    chunk_tokens,
):
    """(d hidden, d weight, d bias), None where not wanted; d weight and d bias in float32 (float64)."""
    d_NV = logits_of(hidden_NH, weight_VH, bias_V)
    rows.token_logprob_backward(
        d_NV,
        ids_N,
        logp_N,
        entropy_N,
        lse_N,
        grad_logp_N,
        grad_entropy_N,
        temperature,
        temperature_N,
        softcap,
        d_NV,
    )
    return gradients(d_NV, hidden_NH, weight_VH, wanted, hidden_NH.dtype)


def gradients(d_NV, hidden_NH, weight_VH, wanted, dtype):
    """What d logits mean for hidden states (in `dtype`), weight and bias."""
    with torch.autocast(d_NV.device.type, enabled=False):
        return (
            (d_NV @ weight_VH.to(d_NV.dtype)).to(dtype) if wanted[0] else None,
            d_NV.t() @ hidden_NH.to(d_NV.dtype) if wanted[1] else None,
            d_NV.sum(0) if wanted[2] else None,
        )
