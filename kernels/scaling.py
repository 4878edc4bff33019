"""Multiplies a large gradient by a scalar that lives on its device, and leaves it alone when the scalar is 1."""


def scale_in_place(tensor, factor):
    """Tensor *= factor (0-d), computed in float32 -> tensor. No host sync.

    A loss whose normaliser counts everything has upstream 1: then nothing is read or written, on the CPU by a
    look at the scalar, on a device by a kernel whose programs look at it first.
    """
    if tensor.device.type == "cpu":
        return tensor if factor.item() == 1 else tensor.mul_(factor)
    from .scaling_triton import scale

    return scale(tensor, factor)
