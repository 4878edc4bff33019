"""Tensors as the native module takes them: addresses, sizes, a dtype tag and a number of threads."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch

from .dispatch import native_module
from .layout import check_offsets

DTYPE_TAG = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/common.h
PARALLEL_TOKENS = 1 << 15  # below this, waking the other threads takes longer than the work


def module() -> ModuleType:
    """The native module, which the dispatcher has found before it chose a native implementation."""
    loaded, reason = native_module()
    assert loaded is not None, f"native implementation chosen without the native module: {reason}"
    return loaded


def flat(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor, contiguous and of `dtype`: itself where it is so already."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def address(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element; 0 (a null pointer) for None."""
    return 0 if tensor is None else tensor.data_ptr()


def unit_rows(out_NV: torch.Tensor) -> torch.Tensor:
    """A matrix with rows of contiguous elements to write into: out_NV itself, or a new one to copy from."""
    if out_NV.stride(1) == 1 or out_NV.shape[1] <= 1:
        return out_NV
    return torch.empty_like(out_NV, memory_format=torch.contiguous_format)


def rows(
    cu_seqlens: torch.Tensor | None, mask: torch.Tensor | None, tokens: int
) -> tuple[torch.Tensor, tuple[int, int, int, int, int]]:
    """The row arguments of every native op, and the tensor that they point into.

    Args:
        cu_seqlens: int32 [B+1], or None with a mask.
        mask: bool [B, T], or None with cu_seqlens.
        tokens: N, or B*T.

    Returns:
        The tensor, which must stay referenced until the call returns, and (address of cu_seqlens or 0,
        address of the mask or 0, tokens, B, T of padded rows or 0).
    """
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        return cu_seqlens, (cu_seqlens.data_ptr(), 0, tokens, cu_seqlens.shape[0] - 1, 0)
    assert mask is not None, "rows need cu_seqlens or a mask"
    mask = mask.contiguous()
    # An empty tensor's address is 0, which would say "no mask" to no rows: harmless.
    return mask, (0, mask.data_ptr(), tokens, mask.shape[0], mask.shape[1])


def call_on_rows(
    op: str,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    cu_seqlens: torch.Tensor | None,
    tokens: int,
) -> None:
    """Calls a CPU function of the native module, which refuses offsets that do not fit.

    The module's message has neither the op nor the offsets. They are looked at again here, only then.

    Args:
        op: Name of the op, for the message.
        function: The native function.
        arguments: Its arguments.
        cu_seqlens: int32 [B+1], or None with a mask.
        tokens: N, or B*T.

    Raises:
        ValueError: Offsets that do not fit.
    """
    try:
        function(*arguments)
    except ValueError:
        if cu_seqlens is not None:
            check_offsets(op, cu_seqlens, tokens)
        raise


def on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device` (a GPU) is the current one; costs almost nothing where it already is."""
    return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def stream(device: torch.device) -> int:
    """The address of the current stream of a GPU.

    (The public torch.cuda.current_stream makes an object first: 2 us.)
    """
    return torch._C._cuda_getCurrentRawStream(device.index)


def threads(tokens: int) -> int:
    """Threads worth using for this many tokens."""
    return torch.get_num_threads() if tokens >= PARALLEL_TOKENS else 1
