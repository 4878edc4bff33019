"""The kinds of arguments: tensor, number, flag, name. A message says in one line what was expected and got.

In all functions `op` is the name of the op, with which the message begins ("" for none), and `name` that of
the argument.
"""

import math
from numbers import Real
from typing import Any

import torch

LONGEST = 60  # characters of a value in a message


def shown(value: Any) -> str:
    """A value for a message, in one line: the kind of what is long, such as a tensor, not its numbers."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= LONGEST and "\n" not in text else f"a value of type {type(value).__name__}"


def wrong(op: str, name: str, expected: str, value: Any) -> ValueError:
    """The error for an argument that does not fit."""
    return ValueError(f"{op}{': ' * bool(op)}{name}: expected {expected}, got {shown(value)}")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_floating(tensor: torch.Tensor) -> bool:
    """True for the floating point types that the ops know: those of 8 bits are not among them."""
    return tensor.dtype in FLOATS


def is_integer(tensor: torch.Tensor) -> bool:
    """True for integer types, with which one counts or looks up; bool is not among them."""
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


def tensor(op: str, name: str, value: Any) -> None:
    """Checks that a value is a tensor.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, torch.Tensor):
        raise wrong(op, name, "a tensor", value)


def number(op: str, name: str, value: Any, *, expected: str = "a number", finite: bool = False) -> float:
    """A setting as a number.

    Args:
        op: Name of the op.
        name: Name of the argument.
        value: A number, or a tensor of one element, which the host reads.
        expected: What a message says instead of "a number".
        finite: Whether infinity and NaN are refused.

    Returns:
        The number.

    Raises:
        ValueError: The value is something else.
    """
    result: float
    if type(value) in (float, int) or isinstance(value, (torch.SymFloat, torch.SymInt)):
        result = value
    elif isinstance(value, Real):
        result = float(value)
    elif isinstance(value, torch.Tensor) and value.numel() == 1 and _has_a_real_value(value):
        result = float(value)
    else:
        raise wrong(op, name, expected, value)
    if finite and not -math.inf < result < math.inf:
        raise wrong(op, name, "a finite number", value)
    return result


def _has_a_real_value(value: torch.Tensor) -> bool:
    return not (value.dtype.is_complex or value.is_meta or value.layout != torch.strided)


def flag(op: str, name: str, value: Any) -> bool:
    """A setting that is on or off: True or False, or 1 or 0 of any kind that Python counts as equal.

    Raises:
        ValueError: The value is something else.
    """
    if value is True or value is False:
        return value
    if isinstance(value, torch.Tensor) or not isinstance(value, Real) and type(value).__name__ != "bool":
        raise wrong(op, name, "True or False", value)
    if value not in (0, 1):
        raise wrong(op, name, "True or False", value)
    return bool(value)
