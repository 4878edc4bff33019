"""Log-probs of a patched model without logits: its head lends its weights to our ops in its own forward.

Shapes: H hidden, V vocabulary, N positions.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .shared import any_needs_gradient

if TYPE_CHECKING:
    from ..models.policy import LogitForm


def is_open(head: nn.Module) -> bool:
    """Whether a head lends its weights."""
    from ..models.policy import OpenHead

    return type(head) is OpenHead


def name_of(head: object) -> str:
    """The name of a head's class, with its module."""
    return f"{type(head).__module__}.{type(head).__qualname__}"


def through_head(model: Any, hidden_NH: torch.Tensor, use: Callable[..., Any]) -> Any:
    """use(hidden, weight, bias) inside the head module's own forward, where ZeRO-3 has gathered its weight.

    Under autocast the three are in its dtype, as in a linear layer; everything else stays in float32.

    Args:
        model: A Hugging Face causal LM.
        hidden_NH: Hidden states of the positions.
        use: What computes from hidden [N, H], weight [V, H] and bias [V] or None.

    Returns:
        What `use` returns.

    Raises:
        ValueError: The weight is a DTensor.
    """
    head = model.get_output_embeddings()

    # Types in quotes: torch.compile traces this definition.
    def cast(hidden: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor | None") -> "Any":
        if hasattr(weight, "placements"):
            raise ValueError(
                "the head's weight is a DTensor; expected the gathered weight inside its own forward"
            )
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            return use(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    return head(hidden_NH, cast) if is_open(head) else cast(hidden_NH, head.weight, head.bias)


def head_logprobs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_N: torch.Tensor,
    form: "LogitForm",
    temperature: float | torch.Tensor,
    entropy: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of N tokens, and their entropies where these are wanted.

    Args:
        hidden_NH: Hidden states of the positions before the tokens.
        weight_VH: The head's weight.
        bias_V: Its bias.
        ids_N: The tokens.
        form: Scale and softcap of the model's logits.
        temperature: > 0; a number, or one for each token, [N].
        entropy: Also return the entropies.

    Returns:
        Log-probs [N] in nats, or (log-probs, entropies [N]); fp32 (float64 for float64 hidden states).
    """
    from ..kernels.linear_logprob import linear_logprob

    return linear_logprob(
        hidden_NH,
        weight_VH,
        ids_N,
        bias=bias_V,
        temperature=temperature / form.scale,
        softcap=form.softcap,
        return_entropy=entropy,
    )


def negative_sum(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_N: torch.Tensor,
    form: "LogitForm",
) -> torch.Tensor:
    """Sum of −log-prob over N tokens.

    Gradients are computed in the forward, where any are needed: three matrix products of the head instead of
    four.

    Args:
        hidden_NH: Hidden states of the positions before the tokens.
        weight_VH: The head's weight.
        bias_V: Its bias, or None.
        ids_N: The tokens.
        form: Scale and softcap of the model's logits.

    Returns:
        The sum, a scalar in nats, fp32 (float64 for float64 hidden states).
    """
    if (
        not any_needs_gradient(hidden_NH, weight_VH, bias_V)
        or hidden_NH.dtype == torch.float64
        or torch.compiler.is_compiling()
    ):
        from ..kernels.linear_logprob import linear_logprob

        logp_N = linear_logprob(
            hidden_NH, weight_VH, ids_N, bias=bias_V, temperature=1.0 / form.scale, softcap=form.softcap
        )
        return -logp_N.sum()
    from ..kernels.linear import chunk_size
    from ..models.on_policy_loss import on_policy_loss

    most = chunk_size(len(weight_VH), hidden_NH.device)
    counts = [min(most, len(ids_N) - at) for at in range(0, len(ids_N), most)]
    return on_policy_loss(
        hidden_NH,
        weight_VH,
        bias_V,
        ids_N,
        counts,
        lambda _sequences, _tokens, logp_C: (-logp_C.sum(), torch.full_like(logp_C, -1.0)),
        1.0 / form.scale,
        form.softcap,
    )
