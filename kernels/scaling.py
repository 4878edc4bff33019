"""Multiplies a large gradient by a scalar that is on its device; where the scalar is 1, nothing is done."""

import torch


def scale_in_place(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiplies a tensor by a 0-d factor in place, in float32. No host sync on a device.

    A loss whose normaliser counts everything has upstream 1: then nothing is read or written. On the CPU the
    host looks at the scalar; on a device a kernel does, whose programs look at it first.

    Args:
        tensor: Of any shape and float dtype; it is written.
        factor: 0-d, on the tensor's device.

    Returns:
        The tensor.
    """
    if tensor.device.type == "cpu":
        return tensor if factor.item() == 1 else tensor.mul_(factor)
    from .scaling_triton import scale

    return scale(tensor, factor)
