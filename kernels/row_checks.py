"""Checks of where the rows of token tensors are: offsets, masks, numbers for each row.

`op` is always the name of the op, with which a message begins. Shapes: N packed tokens, B rows, T padded
width.
"""

import torch

from .dispatch import checking, interpreted
from .kinds import is_floating, is_integer
from .kinds import tensor as tensor_argument


def looks(tensor: torch.Tensor) -> bool:
    """Whether values are looked at: on the CPU, or with SAFERLHF_CHECK=1.

    Triton's interpreter counts as a device.
    """
    return tensor.device.type == "cpu" and not interpreted() or checking()


def rows(
    op: str,
    name: str,
    shape: torch.Size,
    device: torch.device,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """Where the rows of token tensors are, packed or padded.

    Args:
        op: Name of the op.
        name: Name of the argument whose shape and device are given.
        shape: [N] packed, or [B, T] padded.
        device: The token tensors' device.
        cu_seqlens: Offsets of packed rows, integers [B+1]. Values are looked at on the CPU alone (or with
            SAFERLHF_CHECK=1), and only those of other dtypes than int32: each must fit int32.
        mask: Valid tokens of padded rows, bool [B, T]. With neither of the two, [N] is one sequence and [B,
            T] has no padding.

    Returns:
        (cu_seqlens, mask, B): one of the first two is None; offsets are int32.

    Raises:
        ValueError: Both are given, or one whose shape, dtype or device does not fit, or on the CPU an int64
            offset that is no int32.
    """
    for option, given in (("cu_seqlens", cu_seqlens), ("mask", mask)):
        if given is not None:
            tensor_argument(op, option, given)
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
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or not is_integer(cu_seqlens):
            raise ValueError(
                f"{op}: cu_seqlens: expected int32 offsets [B+1], got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)}"
            )
        if cu_seqlens.device != device:
            raise ValueError(f"{op}: cu_seqlens: expected device {device} as {name}, got {cu_seqlens.device}")
        return _offsets(op, cu_seqlens), None, cu_seqlens.shape[0] - 1
    assert mask is not None, "one of the two has been made above"
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


def _offsets(op: str, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Offsets as int32, none of which may wrap around into a plausible one.

    One that does not fit raises ValueError on the CPU; on a device it becomes an offset that cannot be.
    """
    if cu_seqlens.dtype == torch.int32:
        return cu_seqlens
    offsets, largest = cu_seqlens.long(), torch.iinfo(torch.int32).max
    if looks(cu_seqlens) and ((offsets < 0) | (offsets > largest)).any():
        raise ValueError(f"{op}: cu_seqlens: expected offsets in 0..{largest}, got {cu_seqlens.tolist()[:8]}")
    return offsets.clamp(-1, largest).to(torch.int32)


def per_row(op: str, name: str, tensor: torch.Tensor, count: int, device: torch.device) -> None:
    """Checks a tensor that has a number for each row.

    Args:
        op: Name of the op.
        name: Name of the argument.
        tensor: Floating point [B].
        count: B.
        device: The token tensors' device.

    Raises:
        ValueError: The tensor is not floating point, or of another shape or on another device.
    """
    tensor_argument(op, name, tensor)
    if tensor.dim() != 1 or tensor.shape[0] != count or not is_floating(tensor):
        raise ValueError(
            f"{op}: {name}: expected floating point [B] = [{count}], got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{op}: {name}: expected device {device}, got {tensor.device}")
