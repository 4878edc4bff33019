"""Log-prob and entropy of tokens from hidden states and a head's weight in plain torch: the definition.

All logits are made at once.
"""

from collections.abc import Sequence

import torch

from ..checks import result_dtype
from ..linear import HeadGradients
from ..token_logprob import reference as rows


def logits_of(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    """The logits hidden @ weight.T + bias.

    Args:
        hidden_NH: Hidden states, any float dtype.
        weight_VH: The head's weight, of the same dtype.
        bias_V: The head's bias, of the same dtype, or None.

    Returns:
        [N, V], float64 for float64 hidden states, else float32.
    """
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
        hidden_NH: Hidden states before the tokens, any float dtype.
        weight_VH: The head's weight, of the same dtype.
        ids_N: The tokens, integers in 0..V-1.
        bias_V: The head's bias, of the same dtype, or None.
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
    """The gradients of hidden states, weight and bias for any upstream gradient.

    Args:
        hidden_NH: As in the forward pass, and so are weight, ids, bias, temperatures and softcap.
        weight_VH: The head's weight.
        ids_N: The tokens.
        bias_V: The head's bias, or None.
        logp_N: What `linear_logprob` has returned.
        entropy_N: The same.
        lse_N: The same.
        grad_logp_N: Upstream gradient of the log-probs, or None.
        grad_entropy_N: Upstream gradient of the entropies, or None.
        temperature: One for all tokens.
        temperature_N: One for each token, or None.
        softcap: 0 for none.
        wanted: Which of the three gradients are wanted.
        chunk_tokens: Tokens whose logits exist at once, or None; changes nothing here.

    Returns:
        d hidden [N, H] in the dtype of hidden_NH, d weight [V, H] and d bias [V] in float64 for float64
        hidden states, else float32; None where not wanted.
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
    """What d logits mean for hidden states, weight and bias.

    Args:
        d_NV: d logits, float32 or float64.
        hidden_NH: Hidden states.
        weight_VH: The head's weight.
        wanted: Which of the three gradients are wanted.
        dtype: That of d hidden.

    Returns:
        d hidden [N, H], d weight [V, H] and d bias [V], the last two in the dtype of d_NV; None where not
        wanted.
    """
    with torch.autocast(d_NV.device.type, enabled=False):
        return (
            (d_NV @ weight_VH.to(d_NV.dtype)).to(dtype) if wanted[0] else None,
            d_NV.t() @ hidden_NH.to(d_NV.dtype) if wanted[1] else None,
            d_NV.sum(0) if wanted[2] else None,
        )
