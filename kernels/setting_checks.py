"""Checks of the ops' settings, which are numbers and names; a message says what was expected and got.

In all functions `op` is the name of the op, with which the message begins.
"""

from collections.abc import Collection
from typing import Any

from .kinds import number, shown, wrong


def one_of(op: str, name: str, value: Any, allowed: Collection[str]) -> None:
    """Checks a value that is a name.

    Args:
        op: Name of the op.
        name: Name of the argument.
        value: Its value.
        allowed: The names that it may be.

    Raises:
        ValueError: The value is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise wrong(op, name, f"one of {', '.join(allowed)}", value)


def not_negative(op: str, name: str, value: float) -> float:
    """A number that may not be negative.

    Args:
        op: Name of the op.
        name: Name of the argument.
        value: Its value.

    Returns:
        The number.

    Raises:
        ValueError: The value is no number, below 0 or NaN.
    """
    result = number(op, name, value, expected="a number >= 0")
    if not result >= 0:
        raise wrong(op, name, "a number >= 0", result)
    return result


def fraction(op: str, name: str, value: float) -> float:
    """A number in 0..1.

    Args:
        op: Name of the op.
        name: Name of the argument.
        value: Its value.

    Returns:
        The number.

    Raises:
        ValueError: The value is no number, below 0, above 1 or NaN.
    """
    result = number(op, name, value, expected="a number in 0..1")
    if not 0 <= result <= 1:
        raise wrong(op, name, "a number in 0..1", result)
    return result


def clip(
    op: str, clip_ratio: float, clip_high: float | None, dual_clip: float | None
) -> tuple[float, float, float]:
    """The three clips as numbers.

    Args:
        op: Name of the op.
        clip_ratio: >= 0.
        clip_high: >= 0; None for clip_ratio.
        dual_clip: > 1; None for infinity, which bounds nothing.

    Returns:
        (clip_ratio, clip_high, dual_clip).

    Raises:
        ValueError: A clip that is no number or negative, or dual_clip that is not > 1.
    """
    clip_ratio = not_negative(op, "clip_ratio", clip_ratio)
    clip_high = clip_ratio if clip_high is None else not_negative(op, "clip_high", clip_high)
    if dual_clip is None:
        return clip_ratio, clip_high, float("inf")
    dual_clip = number(op, "dual_clip", dual_clip, expected="None or a number > 1")
    if not dual_clip > 1:
        raise wrong(op, "dual_clip", "None or a number > 1", dual_clip)
    return clip_ratio, clip_high, dual_clip


def coefficient(op: str, name: str, value: float, tensor: object) -> float:
    """The finite coefficient of a term of a loss.

    Args:
        op: Name of the op.
        name: Name of the tensor that the term is made from.
        value: Its value; the argument's name is in `COEFFICIENTS`.
        tensor: That tensor; None, where the caller gave none.

    Returns:
        The coefficient.

    Raises:
        ValueError: The value is no finite number, or not 0 although there is no tensor.
    """
    result = number(op, COEFFICIENTS[name], value, expected="a finite number", finite=True)
    if tensor is None and result != 0:
        raise ValueError(f"{op}: {name}: expected a tensor, since its coefficient is {result}, got None")
    return result


COEFFICIENTS = {"ref_logp": "kl_coeff", "entropy": "entropy_coeff"}


def softcap(op: str, value: float | None) -> float:
    """The cap of logits as a number.

    Args:
        op: Name of the op.
        value: > 0, a number or a tensor of one element; None for no cap.

    Returns:
        The cap, 0.0 for None.

    Raises:
        ValueError: The value is no number > 0.
    """
    if value is None:
        return 0.0
    result = number(op, "softcap", value, expected="None or a number > 0")
    if not result > 0:
        raise wrong(op, "softcap", "None or a number > 0", result)
    return float(result)


def chunk_tokens(op: str, value: int | None) -> None:
    """Checks the number of tokens whose logits exist at once.

    Args:
        op: Name of the op.
        value: An integer >= 1, or None.

    Raises:
        ValueError: The value is something else.
    """
    if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ValueError(f"{op}: chunk_tokens: expected None or an integer >= 1, got {shown(value)}")
