"""From padded rows to packed tokens and back, for a caller's own loops; packing.py has what models take.

    packed, cu_seqlens = pack(padded, mask)               # [B, T, …] -> [N, …] and int32 [B+1]
    padded = unpack(packed, cu_seqlens, mask=mask)        # back to the places that the mask marks
    padded = unpack(packed, cu_seqlens)                   # to the left of each row, padding behind

Every op of this package takes packed tokens and padded rows alike. Needs torch alone.

Shapes: legend in rollout/types.py; B rows of T columns, with N real tokens in all.
"""

import math
from numbers import Complex, Integral, Real
from typing import Any

import torch

from ..kernels import kinds


def pack(
    padded: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...], mask: torch.Tensor
) -> tuple[Any, torch.Tensor]:
    """The real tokens of padded rows, one row behind the other.

    Differentiable; masked entries get gradient 0. The host has to count N: on a device this waits for it.

    Args:
        padded: [B, T, …] of any dtype, or a list or tuple of such tensors.
        mask: [B, T], boolean or integers 0 and 1, on the tensors' device, in any pattern: padding on either
            side, holes, rows without a token.

    Returns:
        packed [N, …], a tuple of them for a list or tuple, and cu_seqlens, int32 [B+1]: cu_seqlens[b] is the
        place of row b's first token in N.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree.
    """
    tensors = list(padded) if isinstance(padded, (list, tuple)) else [padded]
    for tensor in tensors:
        kinds.tensor("pack", "padded", tensor)
    mask = boolean("pack", mask)
    for i, tensor in enumerate(tensors):
        name = "padded" if tensor is padded else f"padded[{i}]"
        if tensor.shape[:2] != mask.shape:
            raise ValueError(
                f"pack: {name}: expected shape [B, T, …] with the mask's [B, T] = {list(mask.shape)}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != mask.device:
            raise ValueError(f"pack: {name}: expected device {mask.device} as mask, got {tensor.device}")
    place_N = mask.reshape(-1).nonzero().squeeze(1)
    packed = tuple(
        tensor.reshape(mask.numel(), *tensor.shape[2:]).index_select(0, place_N) for tensor in tensors
    )
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(mask.sum(1), 0, dtype=torch.int32, out=cu_seqlens[1:])
    return (packed if isinstance(padded, (list, tuple)) else packed[0]), cu_seqlens


def unpack(
    packed: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...],
    cu_seqlens: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    width: int | None = None,
    fill: float = 0,
) -> Any:
    """Packed tokens in padded rows; with the mask of `pack` its inverse.

    Differentiable. On a device this waits for the lengths.

    Args:
        packed: [N, …], or a list or tuple of such tensors.
        cu_seqlens: int32 [B+1]: each row's first token in N.
        mask: [B, T], boolean or integers 0 and 1, with as many ones in each row as cu_seqlens says; row b's
            tokens go to its ones, in order. Without it they go to the left of each row.
        width: T, where no mask gives it; None: the longest row's.
        fill: The value at every other place. The dtype has to hold it: an int exactly, a float as nearly as
            the dtype can.

    Returns:
        [B, T, …], a tuple of them for a list or tuple.

    Raises:
        ValueError: Shapes, devices, counts or the fill do not agree.
    """
    tensors = list(packed) if isinstance(packed, (list, tuple)) else [packed]
    for tensor in tensors:
        kinds.tensor("unpack", "packed", tensor)
    kinds.tensor("unpack", "cu_seqlens", cu_seqlens)
    offsets = _offsets(cu_seqlens)
    device = cu_seqlens.device
    lengths_B = torch.tensor([b - a for a, b in zip(offsets, offsets[1:])], dtype=torch.long)
    for i, tensor in enumerate(tensors):
        name = "packed" if tensor is packed else f"packed[{i}]"
        if tensor.dim() < 1 or tensor.shape[0] != offsets[-1]:
            raise ValueError(
                f"unpack: {name}: expected shape [N, …] with N = cu_seqlens[-1] = {offsets[-1]}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"unpack: {name}: expected device {device} as cu_seqlens, got {tensor.device}")
        _require_representable(name, tensor.dtype, fill)
    if mask is None:
        mask = _left_mask(width, lengths_B).to(device)
    elif width is not None:
        raise ValueError("unpack: expected mask or width, got both")
    else:
        mask = _checked_mask(mask, lengths_B, device)
    place_N = mask.reshape(-1).nonzero().squeeze(1)
    padded = tuple(
        tensor.new_full((mask.numel(), *tensor.shape[1:]), fill)
        .index_copy(0, place_N, tensor)
        .reshape(*mask.shape, *tensor.shape[1:])
        for tensor in tensors
    )
    return padded if isinstance(packed, (list, tuple)) else padded[0]


def _left_mask(width: int | None, lengths_B: torch.Tensor) -> torch.Tensor:
    """[B, width] booleans on the host, the ones of each row on its left."""
    longest = int(lengths_B.max()) if len(lengths_B) else 0
    width = longest if width is None else width
    if isinstance(width, bool) or not isinstance(width, (Integral, torch.SymInt)):
        raise ValueError(f"unpack: width: expected a whole number of columns, got {kinds.shown(width)}")
    if width < longest:
        raise ValueError(f"unpack: width: expected at least the longest row's {longest}, got {width}")
    return torch.arange(width) < lengths_B[:, None]


def _checked_mask(mask: torch.Tensor, lengths_B: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The caller's mask as booleans; ValueError where its ones do not agree with the lengths."""
    mask = boolean("unpack", mask)
    if mask.device != device:
        raise ValueError(f"unpack: mask: expected device {device} as cu_seqlens, got {mask.device}")
    counts = mask.sum(1).tolist()
    if counts != lengths_B.tolist():
        row = next((b for b, (ones, n) in enumerate(zip(counts, lengths_B.tolist())) if ones != n), None)
        raise ValueError(
            f"unpack: mask: expected {len(lengths_B)} rows, got {len(counts)}"
            if row is None
            else f"unpack: mask: expected {int(lengths_B[row])} ones in row {row}, got {counts[row]}"
        )
    return mask


def _require_representable(name: str, dtype: torch.dtype, fill: Any) -> None:
    """Raises a ValueError for a fill that is no number, or one that `dtype` cannot hold.

    It would wrap a number out of its range, or round an int.
    """
    if isinstance(fill, torch.Tensor) and fill.numel() == 1 and not fill.is_meta:
        fill = fill.item()
    is_number, is_integral = (
        isinstance(fill, Complex if dtype.is_complex else Real),
        isinstance(fill, Integral),
    )
    if not is_number:
        raise ValueError(
            f"unpack: fill: expected a {'' if dtype.is_complex else 'real '}number for {name} of dtype "
            f"{dtype}, got {kinds.shown(fill)}"
        )
    if dtype.is_complex:
        for component in (fill.real, fill.imag):
            _require_representable(name, dtype.to_real(), component)
    elif dtype.is_floating_point:
        _require_representable_float(name, dtype, fill)
    else:
        if not is_integral and not float(fill).is_integer():
            raise ValueError(f"unpack: fill: expected an integer for {name} of dtype {dtype}, got {fill}")
        least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        if not least <= fill <= most:
            raise ValueError(
                f"unpack: fill: expected {least} … {most} for {name} of dtype {dtype}, got {_shown(fill)}"
            )


def _require_representable_float(name: str, dtype: torch.dtype, fill: Any) -> None:
    """Raises a ValueError for a real fill that a floating point dtype cannot hold, or an int it would round.

    Such an int is a marker, as -100, that a later search would not find.
    """
    most, is_integral = torch.finfo(dtype).max, isinstance(fill, Integral)
    if is_integral and abs(fill) > most or math.isfinite(fill) and abs(fill) > most:
        raise ValueError(
            f"unpack: fill: expected at most {most:g} either way for {name} of dtype {dtype}, got "
            f"{_shown(fill)}"
        )
    if is_integral:
        rounded = int(torch.tensor(float(fill), dtype=torch.float64).to(dtype).item())
        if rounded != fill:
            raise ValueError(
                f"unpack: fill: expected an integer that {dtype} holds for {name}, got {fill}, "
                f"which would become {rounded}"
            )


def _shown(fill: Any) -> str:
    """A number for a message; one of hundreds of digits by its size."""
    is_long = isinstance(fill, Integral) and abs(int(fill)) >= 10**30
    return f"a number of {int(fill).bit_length()} bits" if is_long else str(fill)


def boolean(op: str, mask: torch.Tensor) -> torch.Tensor:
    """A mask as booleans.

    Args:
        op: The caller's name, for messages.
        mask: [B, T], booleans or integers 0 and 1.

    Returns:
        [B, T] booleans.

    Raises:
        ValueError: Another shape, dtype or value, or a mask on meta, whose values cannot be read.
    """
    kinds.tensor(op, "mask", mask)
    if mask.dim() != 2 or mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise ValueError(
            f"{op}: mask: expected booleans (or integers 0 and 1) [B, T], got {mask.dtype} {list(mask.shape)}"
        )
    if mask.is_meta:
        raise ValueError(f"{op}: mask: expected a device with values, got meta")
    if mask.dtype == torch.bool:
        return mask
    ones = mask != 0
    if not torch.equal(ones, mask == 1):
        raise ValueError(f"{op}: mask: expected booleans or integers 0 and 1, got other integers")
    return ones


def _offsets(cu_seqlens: torch.Tensor) -> list[int]:
    """Offsets as host integers, checked: they start at 0 and never fall."""
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"unpack: cu_seqlens: expected int32 offsets [B+1], got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}"
        )
    if cu_seqlens.is_meta:
        raise ValueError("unpack: cu_seqlens: expected a device with values, got meta")
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or any(b < a for a, b in zip(offsets, offsets[1:])):
        raise ValueError(
            f"unpack: cu_seqlens: expected offsets that start at 0 and never fall, got {offsets[:8]}"
        )
    return offsets
