"""The device's version of scaling.scale_in_place."""

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def scale_kernel(tensor_N, factor, count, BLOCK_N: tl.constexpr):
    """One block of the tensor; it ends at once where the factor is 1."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_N = at_N < count
        x_N = tl.load(tensor_N + at_N, mask=inside_N, other=0.0).to(tl.float32)
        tl.store(tensor_N + at_N, (x_N * by).to(tensor_N.dtype.element_ty), mask=inside_N)


def scale(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiplies a tensor by a 0-d factor in place and returns it; does nothing where the factor is 1."""
    if not tensor.is_contiguous():
        return tensor.mul_(factor)
    if tensor.numel():
        with torch.cuda.device(tensor.get_device()):
            scale_kernel[(triton.cdiv(tensor.numel(), BLOCK),)](tensor, factor, tensor.numel(), BLOCK_N=BLOCK)
    return tensor
