"""Attention over packed sequences, put into transformers' attention interface.

transformers tells packed sequences from their position ids and builds a dense [M, M] mask for them. Here a
forward pass brings a `Layout` instead (`packed=`, which models hand down to their attention function) and a
4-D mask of one element, which transformers passes on as it is and nobody reads. Each sequence then attends to
itself alone: on CUDA in half precision by one variable-length kernel (flash-attn where it imports, else
torch's), otherwise by one call for each run of sequences of the same length. Without a `Layout` (generation,
padded batches) everything is as it was.

Shapes: M packed tokens, A attention heads, D head size, R sequences of a run, L their length.
"""

import functools
import inspect
import sys

import torch

NAMES = {"sdpa": "saferlhf_fast_sdpa", "eager": "saferlhf_fast_eager"}
"""What a model's attention was -> our name for it. Eager models are those whose attention SDPA cannot do (softcap, sinks)."""


def dummy_mask(device):
    """The 4-D mask that keeps transformers from building one."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def attention(own, module, query, key, value, attention_mask, packed=None, **kwargs):
    """An attention function of transformers' interface. own: what answers without a Layout, and for one run
    of sequences.

    query [1, A, M, D]; key, value: with as many or fewer heads -> ([1, M, A, D], None).
    """
    if packed is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    causal, window = _shape_of(module, kwargs)
    varlen = _varlen(query.dtype, query.device.type, query.shape[-1]) if own is _sdpa and causal else None
    # torch's has no dropout
    if varlen is not None and not (varlen is _torch_varlen and kwargs.get("dropout")):
        return varlen(query, key, value, packed, window, module, kwargs), None
    sizes = [count * length for count, length in packed.runs]
    parts = [tensor.split(sizes, 2) for tensor in (query, key, value)]  # split: its backward is one cat
    out = []
    for (count, length), *of_run in zip(packed.runs, *parts):
        mask = _mask(length, window, causal, query, own)
        q_RALD, k_RALD, v_RALD = (
            part.unflatten(2, (count, length)).squeeze(0).transpose(0, 1) for part in of_run
        )
        out.append(
            own(module, q_RALD, k_RALD, v_RALD, mask, **kwargs)[0].reshape(
                1, count * length, query.shape[1], -1
            )
        )
    return (torch.cat(out, 1) if len(out) > 1 else out[0]), None


def _shape_of(module, kwargs):
    """(causal, window or None) of a layer's attention."""
    causal = kwargs.get("is_causal")
    return (getattr(module, "is_causal", True) if causal is None else causal), kwargs.get("sliding_window")


def _mask(length, window, causal, query, own):
    """Mask of one sequence, or None where SDPA's own causal form does."""
    narrow = window is not None and window < length
    if own is _sdpa and not (narrow and causal):
        return None
    return _made_mask(
        length, window if narrow else None, causal, query.device, None if own is _sdpa else query.dtype
    )


@functools.lru_cache(maxsize=256)
def _made_mask(length, window, causal, device, dtype):
    """[1, 1, L, L]: boolean, or additive in a dtype."""
    at = torch.arange(length, device=device)
    back = at[:, None] - at[None]  # how far a key lies behind its query
    seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    if window is not None:
        seen &= back < window
    if dtype is None:
        return seen[None, None]
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


def _sdpa(module, query, key, value, attention_mask, **kwargs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _eager(module, query, key, value, attention_mask, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )


@functools.cache
def _varlen(dtype, device, head_size):
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


def _flash(query, key, value, packed, window, module, kwargs):
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


def _torch_varlen(query, key, value, packed, window, module, kwargs):
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    shared = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            shared = {"enable_gqa": True}
        else:  # torch 2.11
            k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    return varlen_attn(
        q,
        k,
        v,
        packed.cu_seqlens,
        packed.cu_seqlens,
        packed.longest,
        packed.longest,
        scale=kwargs.get("scaling"),
        window_size=(left, 0),
        **shared,
    )[None]


def install(model):
    """Gives a transformers model our attention -> True, or False where its architecture does not let it be
    exchanged.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for name, own, mask in (("sdpa", _sdpa, sdpa_mask), ("eager", _eager, eager_mask)):
        AttentionInterface.register(NAMES[name], functools.partial(attention, own))
        AttentionMaskInterface.register(NAMES[name], mask)
    now = model.config._attn_implementation
    if now in NAMES.values():
        return True
    if now not in NAMES:
        return False
    model.set_attn_implementation(NAMES[now])
    return model.config._attn_implementation == NAMES[now]


def uninstall(model):
    """Puts a model's own attention back."""
    for own, ours in NAMES.items():
        if model.config._attn_implementation == ours:
            model.set_attn_implementation(own)
