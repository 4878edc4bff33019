"""Attention over packed sequences, registered in transformers' attention interface.

transformers recognises packed sequences by their position ids and builds a dense [M, M] mask for them. Here a
forward pass brings a `Layout` instead (`packed=`, which models hand down to their attention function) and a
4-D mask of one element, which transformers passes on unchanged and which nothing reads. Each sequence then
attends to itself alone: on CUDA in half precision by one variable-length kernel (flash-attn where it imports,
else torch's), otherwise by one call for each run of sequences of the same length. Without a `Layout`
(generation, padded batches) a model's own attention runs.

Shapes: legend in rollout/types.py; S counts the sequences of a run here, and L is their length.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .packing import Layout

NAMES = {"sdpa": "saferlhf_fast_sdpa", "eager": "saferlhf_fast_eager"}
"""{a model's own attention: our name for it}. Eager models have what SDPA cannot do (softcap, sinks)."""

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""transformers' form: (module, query, key, value, mask, **settings) -> (output [B, L, A, D], weights)."""


def dummy_mask(device: torch.device) -> torch.Tensor:
    """The 4-D mask that keeps transformers from building one."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def attention(
    own: AttentionFunction,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed: "Layout | None" = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers' interface that knows packed sequences.

    Args:
        own: The attention that runs without a Layout, and for each run of sequences.
        module: The attention layer.
        query: [1, A, M, D].
        key: As query, with as many heads or fewer.
        value: As key.
        attention_mask: Passed to `own` without a Layout, ignored with one.
        packed: Where the sequences begin and end in M.
        **kwargs: What transformers passes on: scaling, dropout, sliding_window, is_causal.

    Returns:
        The output [1, M, A, D], and None in place of attention weights.
    """
    if packed is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    causal, window = _mask_form(module, kwargs)
    varlen = _varlen(query.dtype, query.device.type, query.shape[-1]) if own is _sdpa and causal else None
    # torch's has no dropout
    if varlen is not None and not (varlen is _torch_varlen and kwargs.get("dropout")):
        return varlen(query, key, value, packed, window, kwargs), None
    sizes = [count * length for count, length in packed.runs]
    runs = [tensor.split(sizes, 2) for tensor in (query, key, value)]  # split: its backward is one cat
    outputs = []
    for (count, length), *run in zip(packed.runs, *runs):
        mask = _mask(length, window, causal, query, own)
        q_SALD, k_SALD, v_SALD = (
            tensor.unflatten(2, (count, length)).squeeze(0).transpose(0, 1) for tensor in run
        )
        outputs.append(
            own(module, q_SALD, k_SALD, v_SALD, mask, **kwargs)[0].reshape(
                1, count * length, query.shape[1], -1
            )
        )
    return (torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]), None


def _mask_form(module: torch.nn.Module, kwargs: dict[str, Any]) -> tuple[bool, int | None]:
    """(causal, window or None) of a layer's attention."""
    causal = kwargs.get("is_causal")
    return (getattr(module, "is_causal", True) if causal is None else causal), kwargs.get("sliding_window")


def _mask(
    length: int, window: int | None, causal: bool, query: torch.Tensor, own: AttentionFunction
) -> torch.Tensor | None:
    """Mask of one sequence, or None where SDPA's own causal form does the same."""
    narrow = window is not None and window < length
    if own is _sdpa and not narrow:
        return None
    return _cached_mask(
        length, window if narrow else None, causal, query.device, None if own is _sdpa else query.dtype
    )


@functools.lru_cache(maxsize=256)
def _cached_mask(
    length: int, window: int | None, causal: bool, device: torch.device, dtype: torch.dtype | None
) -> torch.Tensor:
    """[1, 1, L, L]: boolean, or additive in a dtype."""
    position_L = torch.arange(length, device=device)
    distance_LL = position_L[:, None] - position_L[None]  # how many places a key is before its query
    visible_LL = distance_LL >= 0 if causal else torch.ones_like(distance_LL, dtype=torch.bool)
    if window is not None:  # an encoder's window reaches as far to both sides
        visible_LL &= distance_LL.abs() < window
    if dtype is None:
        return visible_LL[None, None]
    return torch.where(visible_LL, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return sys.modules[type(module).__module__].eager_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )


@functools.cache
def _varlen(dtype: torch.dtype, device: str, head_size: int) -> Callable[..., torch.Tensor] | None:
    """The variable-length kernel for this dtype and device, or None."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_size > 256 or head_size % 8:
        return None
    try:
        import flash_attn  # noqa: F401

        return _flash
    except ImportError:
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return None
    return _torch_varlen


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: "Layout",
    window: int | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    left = -1 if window is None else window - 1
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return flash_attn_varlen_func(
        q,
        k,
        v,
        packed.cu_seqlens,
        packed.cu_seqlens,
        packed.longest,
        packed.longest,
        dropout_p=kwargs.get("dropout", 0.0),
        softmax_scale=kwargs.get("scaling"),
        causal=True,
        window_size=(left, 0 if window is not None else -1),
    )[None]


def _torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: "Layout",
    window: int | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:  # torch 2.11
            k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    output = varlen_attn(
        q,
        k,
        v,
        packed.cu_seqlens,
        packed.cu_seqlens,
        packed.longest,
        packed.longest,
        scale=kwargs.get("scaling"),
        window_size=(left, 0),
        **grouped,
    )
    assert isinstance(output, torch.Tensor), "varlen_attn gives a pair only where a caller requests one"
    return output[None]


def install(model: "PreTrainedModel") -> bool:
    """Exchanges a transformers model's attention for `attention`, in place, where that changes no number.

    Returns:
        False, with the model as it was, where the architecture does not allow the exchange, or computes
        something else under another name (models with an index of keys ask what their attention is called).
    """
    from .row_form import architecture_form

    if model.config._attn_implementation in NAMES.values():
        return True
    return architecture_form(model.base_model).exchanges and exchange(model)


def exchange(model: "PreTrainedModel") -> bool:
    """`install` without the question what the exchange changes; row_form.py asks it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for name, own, mask in (("sdpa", _sdpa, sdpa_mask), ("eager", _eager, eager_mask)):
        AttentionInterface.register(NAMES[name], functools.partial(attention, own))
        AttentionMaskInterface.register(NAMES[name], mask)
    current = model.config._attn_implementation
    if current in NAMES.values():
        return True
    if current not in NAMES:
        return False
    model.set_attn_implementation(NAMES[current])
    return model.config._attn_implementation == NAMES[current]


def uninstall(model: "PreTrainedModel") -> None:
    """Puts a model's own attention back."""
    for own, packed_form in NAMES.items():
        if model.config._attn_implementation == packed_form:
            model.set_attn_implementation(own)
