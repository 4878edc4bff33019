"""The head of a patched model: its weights, lent inside its own forward, to the ops that make log-probs
without logits.

Shapes: H hidden, V vocabulary, N positions.
"""

import torch

from .shared import learns


def is_open(head):
    """Whether a head lends its weights."""
    from ..models.policy import OpenHead

    return type(head) is OpenHead


def name_of(head):
    """A head's class, with its module."""
    return f"{type(head).__module__}.{type(head).__qualname__}"


def through_head(model, hidden_NH, use):
    """use(hidden, weight, bias) inside the head module's own forward, where ZeRO-3 has gathered its weight.

    Under autocast the two products run in its dtype, as the linear layer's would; everything else stays in
    float32.
    """
    head = model.get_output_embeddings()

    def cast(hidden, weight, bias):
        if hasattr(weight, "placements"):
            raise ValueError("the head's weight is a DTensor; expected a whole weight inside its own forward")
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            return use(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    return head(hidden_NH, cast) if is_open(head) else cast(hidden_NH, head.weight, head.bias)


def scored(hidden_NH, weight_VH, bias_V, ids_N, form, temperature, entropy):
    """Log-probs, or (log-probs, entropies), of N tokens."""
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


def negative_sum(hidden_NH, weight_VH, bias_V, ids_N, form):
    """Sum of −log-prob.

    Where gradients are wanted they are made on the way: three products of the head instead of four.
    """
    if (
        not learns(hidden_NH, weight_VH, bias_V)
        or hidden_NH.dtype == torch.float64
        or torch.compiler.is_compiling()
    ):
        return -scored(hidden_NH, weight_VH, bias_V, ids_N, form, 1.0, False).sum()
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
