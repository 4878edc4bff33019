"""Log-prob and entropy of tokens from hidden states and a head's weight in plain torch: the definition.

All logits are made at once.
"""

from collections.abc import Sequence

import torch

from ..checks import result_dtype
from ..linear import HeadGradients
from ..token_logprob import reference as rows


def logits_of(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    """[N, V]: hidden @ weight.T + bias, in float64 for float64 hidden states, else in float32."""
    dtype = result_dtype(hidden_NH)
    with torch.autocast(hidden_NH.device.type, enabled=False):  # which would round them to bfloat16
        logits_NV = hidden_NH.to(dtype) @ weight_VH.to(dtype).t()
    return logits_NV if bias_V is None else logits_NV + bias_V.to(dtype)


def linear_logprob(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
    chunk_tokens: int | None,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of each token, and the log-sum-exp that the backward pass needs.

    Args:
        hidden_NH: Any float dtype.
        weight_VH: Of the same dtype.
        ids_N: Integers.
        bias_V: Of the same dtype, or None.
        temperature: One for all tokens.
        temperature_N: One for each token, or None.
        softcap: 0 for none.
        entropy: Whether the entropy is wanted.
        chunk_tokens: Tokens whose logits exist at once, or None; changes nothing here.
        gradient: Whether a backward pass will follow; changes nothing here.

    Returns:
        logp_N, entropy_N ([0] if not wanted) and lse_N, in nats; float64 for float64, else float32.
    """
    return rows.token_logprob(
        logits_of(hidden_NH, weight_VH, bias_V), ids_N, temperature, temperature_N, softcap, entropy
    )


def linear_logprob_backward(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    logp_N: torch.Tensor,
    entropy_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_logp_N: torch.Tensor | None,
    grad_entropy_N: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
) -> HeadGradients:
    """(d hidden, d weight, d bias), None where not wanted; d weight and d bias are float32 (float64).

    The arguments are those of `linear_logprob`, what it has returned, the upstream gradients of log-probs and
    entropies (or None), and which of the three gradients are wanted.
    """
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


def gradients(
    d_NV: torch.Tensor,
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    wanted: Sequence[bool],
    dtype: torch.dtype,
) -> HeadGradients:
    """What d logits mean for hidden states (in `dtype`), weight and bias; None where not wanted."""
    with torch.autocast(d_NV.device.type, enabled=False):
        return (
            (d_NV @ weight_VH.to(d_NV.dtype)).to(dtype) if wanted[0] else None,
            d_NV.t() @ hidden_NH.to(d_NV.dtype) if wanted[1] else None,
            d_NV.sum(0) if wanted[2] else None,
        )
