"""Tensors as the native module takes them: addresses, sizes, a dtype tag and a number of threads."""

from contextlib import nullcontext

import torch

from .dispatch import native_module

DTYPE_TAG = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/common.h
PARALLEL_TOKENS = 1 << 15  # below this, waking the other threads takes longer than the work


def module():
    """The native module; the dispatcher has made sure that it is there."""
    loaded, reason = native_module()
    assert loaded is not None, f"native implementation chosen without the native module: {reason}"
    return loaded


def flat(tensor, dtype):
    """Contiguous, of `dtype`, never a gradient: a no-op for what is so already."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def address(tensor):
    """The address of a tensor's first element; 0 (a null pointer) for None."""
    return 0 if tensor is None else tensor.data_ptr()


def unit_rows(out_NV):
    """A matrix to write rows of contiguous elements into: out_NV itself, or a new one to copy from."""
    if out_NV.stride(1) == 1 or out_NV.shape[1] <= 1:
        return out_NV
    return torch.empty_like(out_NV, memory_format=torch.contiguous_format)


def rows(cu_seqlens, mask, tokens):
    """(keep, arguments): the row arguments of every native op, and the tensors that must live until the call
    is over.
    """
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        return cu_seqlens, (cu_seqlens.data_ptr(), 0, tokens, cu_seqlens.shape[0] - 1, 0)
    mask = mask.contiguous()
    # An empty tensor's address is 0, which would say "no mask" to no rows: harmless.
    return mask, (0, mask.data_ptr(), tokens, mask.shape[0], mask.shape[1])


def on(device):
    """A context in which `device` (a GPU) is the current one; costs next to nothing where it already is."""
    return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def stream(device):
    """The address of the current stream of a GPU.

    (The public torch.cuda.current_stream makes an object first: 2 us.)
    """
    return torch._C._cuda_getCurrentRawStream(device.index)


def threads(tokens):
    """Threads worth using for this many tokens."""
    return torch.get_num_threads() if tokens >= PARALLEL_TOKENS else 1
