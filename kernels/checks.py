"""Shape, dtype and device checks of the public ops: messages with expected and got.

They never look at values.

Looking at values would make the host wait for the device; what can be known without that (on the CPU) is
checked by the implementations. Shapes: N packed tokens, B rows, T padded width, C critics (1 or 2).
"""

import torch

from .dispatch import checking, interpreted
from .first_order import transformed


def result_dtype(*tensors):
    """float64 when the first tensor is float64, else float32: what the ops compute in and return."""
    return torch.float64 if tensors[0].dtype == torch.float64 else torch.float32


def constant(tensor):
    """The tensor without its history; None stays None. (detach makes a new tensor even where there is none.)"""
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def scalar(value, like, name):
    """A 0-d tensor of the ops' dtype on `like`'s device, from a number or a one-element tensor; None stays
    None.

    A tensor that lives on the device stays there: it is never read by the host.
    """
    if value is None:
        return None
    dtype = result_dtype(like)
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.dtype.is_complex or value.is_meta != like.is_meta:
            raise ValueError(
                f"{name}: expected a real number on {like.device}, got {value.dtype} on {value.device}"
            )
        if value.dim() == 0 and value.dtype == dtype and value.device == like.device:
            return constant(value)
        return value.detach().reshape(()).to(device=like.device, dtype=dtype)
    return torch.full((), float(value), dtype=dtype, device=like.device)


def normalizer(op, value, like):
    """As scalar; a number must be >= 0. A tensor's value is not looked at: below 0 or NaN makes the loss NaN."""
    if value is not None and not isinstance(value, torch.Tensor):
        not_negative(op, "normalizer", value)
    return scalar(value, like, "normalizer")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(tensor):
    """Of a floating point type that the ops know: not of 8 bits."""
    return tensor.dtype in FLOATS


def whole(tensor):
    """Of an integer type with values to count or to look up: not bool."""
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


def wide(ids):
    """Integers of 32 or 64 bits, signed: narrower ones could not be compared with the size of a vocabulary in
    a kernel.
    """
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.long()


def overlaps(tensor):
    """Whether two elements may share memory (an expanded tensor): then nothing may be written over it."""
    reach = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1
    ):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def disposable(tensor, flat):
    """Whether something may be written over the tensor, whose rows `flat` are: an intermediate result, in
    memory of its own.

    Not a leaf nor a view of one: that is somebody's parameter. What torch.func holds is no memory of one
    tensor.
    """
    if torch.compiler.is_compiling() or transformed() or tensor.is_leaf:
        return False
    return not (tensor._base is not None and tensor._base.is_leaf) and not overlaps(flat)


def same_tokens(op, names, tensors):
    """All of `tensors` have the first one's shape and device and are floating point."""
    shape, device = tensors[0].shape, tensors[0].device
    for name, tensor in zip(names, tensors):
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name}: expected shape {tuple(shape)} as {names[0]}, got {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: {name}: expected device {device} as {names[0]}, got {tensor.device}")
        if not floating(tensor):
            raise ValueError(
                f"{op}: {name}: expected a floating point dtype of 16, 32 or 64 bits, got {tensor.dtype}"
            )


def rows(op, name, shape, device, cu_seqlens, mask):
    """(cu_seqlens, mask, B) for token tensors of `shape`, exactly one of the two given back, the other None.

    Packed [N] takes cu_seqlens (int32, [B+1]), padded [B, T] a boolean mask. With neither, [N] is one
    sequence and [B, T] has no padding. Offsets are not looked at here: on the CPU the implementations do.
    """
    if cu_seqlens is not None and mask is not None:
        raise ValueError(f"{op}: expected cu_seqlens (packed [N]) or mask (padded [B, T]), got both")
    if cu_seqlens is None and mask is None:
        if len(shape) == 1:
            cu_seqlens = torch.arange(2, dtype=torch.int32, device=device) * shape[0]
        else:
            mask = torch.ones(shape, dtype=torch.bool, device=device)
    if cu_seqlens is not None:
        if len(shape) != 1:
            raise ValueError(
                f"{op}: {name}: expected packed tokens [N] with cu_seqlens, got shape {tuple(shape)}"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or not whole(cu_seqlens):
            raise ValueError(
                f"{op}: cu_seqlens: expected int32 offsets [B+1], got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)}"
            )
        if cu_seqlens.device != device:
            raise ValueError(f"{op}: cu_seqlens: expected device {device} as {name}, got {cu_seqlens.device}")
        return _offsets(op, cu_seqlens), None, cu_seqlens.shape[0] - 1
    if len(shape) != 2 or mask.shape != shape:
        raise ValueError(
            f"{op}: expected {name} [B, T] and a mask of that shape, "
            f"got {tuple(shape)} and {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.device != device:
        raise ValueError(f"{op}: mask: expected device {device} as {name}, got {mask.device}")
    return None, mask, shape[0]


def _offsets(op, cu_seqlens):
    """As int32, in which none may come out as another: what does not fit is refused on the CPU, and
    impossible elsewhere.
    """
    if cu_seqlens.dtype == torch.int32:
        return cu_seqlens
    wide, most = cu_seqlens.long(), torch.iinfo(torch.int32).max
    if _looks(cu_seqlens) and ((wide < 0) | (wide > most)).any():
        raise ValueError(f"{op}: cu_seqlens: expected offsets in 0..{most}, got {cu_seqlens.tolist()[:8]}")
    return wide.clamp(-1, most).to(torch.int32)


def per_row(op, name, tensor, count, device):
    """A floating point tensor [B] on `device`."""
    if tensor.dim() != 1 or tensor.shape[0] != count or not floating(tensor):
        raise ValueError(
            f"{op}: {name}: expected floating point [B] = [{count}], got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{op}: {name}: expected device {device}, got {tensor.device}")


def logits_and_ids(op, logits, ids):
    """Floating point logits [..., V] and integer ids [...] on one device."""
    if logits.dim() < 1 or ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: ids: expected shape {tuple(logits.shape[:-1])} as logits without its last dimension, "
            f"got {tuple(ids.shape)}"
        )
    if not floating(logits) or not whole(ids):
        raise ValueError(
            f"{op}: expected floating point logits and integer ids, got {logits.dtype}, {ids.dtype}"
        )
    if ids.device != logits.device:
        raise ValueError(f"{op}: ids: expected device {logits.device} as logits, got {ids.device}")


def head(op, hidden, weight, ids, bias):
    """Hidden [..., H], weight [V, H], bias [V] or None of one floating dtype and device, integer ids [...]."""
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: expected hidden [..., H] and weight [V, H], got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            raise ValueError(
                f"{op}: {name}: expected {hidden.dtype} on {hidden.device} as hidden, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if not floating(hidden) or not whole(ids):
        raise ValueError(
            f"{op}: expected floating point hidden states and integer ids, got {hidden.dtype}, {ids.dtype}"
        )
    if ids.shape != hidden.shape[:-1] or ids.device != hidden.device:
        raise ValueError(
            f"{op}: ids: expected shape {tuple(hidden.shape[:-1])} on {hidden.device} as hidden without its "
            f"last "
            f"dimension, got {tuple(ids.shape)} on {ids.device}"
        )


def chunk_tokens(op, value):
    """None, or an integer >= 1."""
    if value is not None and not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{op}: chunk_tokens: expected None or an integer >= 1, got {value!r}")


def temperature(op, value, shape, like):
    """(number, None) or (1.0, [N]): one temperature for all tokens, or one per token, of `like`'s dtype and
    device.

    A tensor is never read by the host.
    """
    if not isinstance(value, torch.Tensor):
        if not value > 0:
            raise ValueError(f"{op}: temperature: expected a number > 0 or a tensor of them, got {value}")
        return float(value), None
    if value.dim() and value.shape != shape or not value.dtype.is_floating_point:
        raise ValueError(
            f"{op}: temperature: expected a number > 0, or floating point numbers of shape {tuple(shape)}, "
            f"got {value.dtype} {tuple(value.shape)}"
        )
    if value.is_meta != like.is_meta:
        raise ValueError(
            f"{op}: temperature: expected a number or a tensor on {like.device}, got one on {value.device}"
        )
    value = value.detach().to(device=like.device, dtype=result_dtype(like))
    return 1.0, value.expand(shape).reshape(-1).contiguous()


def softcap(op, value):
    """0.0 for None, else the number, which must be > 0."""
    if value is None:
        return 0.0
    if isinstance(value, torch.Tensor) and value.numel() != 1 or not value > 0:
        raise ValueError(f"{op}: softcap: expected None or a number > 0, got {value}")
    return float(value)


def _looks(tensor):
    """Whether values are looked at: on the CPU, or with checks switched on.

    Triton's interpreter stands for a device.
    """
    return tensor.device.type == "cpu" and not interpreted() or checking()


def known_temperatures(op, temperature_N, counted=None):
    """Where known_ids looks at ids: every temperature of a token is > 0, or ValueError.

    None: there is but one, a number.
    """
    if temperature_N is None or temperature_N.numel() == 0 or not _looks(temperature_N):
        return
    wrong = ~(temperature_N > 0)
    if counted is not None:
        wrong &= counted
    if wrong.any():
        raise ValueError(f"{op}: temperature: expected numbers > 0, got {temperature_N[wrong][0].item()}")


def known_ids(op, ids, vocabulary, counted=None):
    """On the CPU, or with checks switched on (SAFERLHF_CHECK=1): every id lies in the vocabulary, or
    ValueError.

    counted: None, or where an id matters at all. Elsewhere nobody looks: knowing would make the host wait for
    the device.
    """
    if ids.numel() == 0 or not _looks(ids):
        return
    outside = (ids < 0) | (ids >= vocabulary)
    if counted is not None:
        outside &= counted
    if outside.any():
        raise ValueError(
            f"{op}: ids: expected 0 <= id < {vocabulary}, got {ids[outside].reshape(-1)[0].item()}"
        )


def one_of(op, name, value, allowed):
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(allowed)}, got {value!r}")


def not_negative(op, name, value):
    """`value` is a number >= 0 (NaN is refused)."""
    if not value >= 0:
        raise ValueError(f"{op}: {name}: expected a number >= 0, got {value}")


def share(op, name, value):
    """`value` is a number in 0..1 (NaN is refused)."""
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name}: expected a number in 0..1, got {value}")


def clip(op, clip_ratio, clip_high, dual_clip):
    """(clip_ratio, clip_high, dual_clip) as numbers: None for clip_high is clip_ratio, for dual_clip infinity
    (no bound).
    """
    clip_high = clip_ratio if clip_high is None else clip_high
    not_negative(op, "clip_ratio", clip_ratio)
    not_negative(op, "clip_high", clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"{op}: dual_clip: expected None or a number > 1, got {dual_clip}")
    return clip_ratio, clip_high, float("inf") if dual_clip is None else dual_clip
