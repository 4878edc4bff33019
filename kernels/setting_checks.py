"""Checks of the ops' settings, which are numbers and names; a message says what was expected and got.

In all functions `op` is the name of the op, with which the message begins.
"""

from collections.abc import Collection
from typing import Any

import torch


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
    if value not in allowed:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(allowed)}, got {value!r}")


def not_negative(op: str, name: str, value: float) -> None:
    """Checks a number that may not be negative.

    Args:
        op: Name of the op.
        name: Name of the argument.
        value: Its value.

    Raises:
        ValueError: The value is below 0 or NaN.
    """
    if not value >= 0:
        raise ValueError(f"{op}: {name}: expected a number >= 0, got {value}")


def fraction(op: str, name: str, value: float) -> None:
    """Checks a number in 0..1.

    Args:
        op: Name of the op.
        name: Name of the argument.
        value: Its value.

    Raises:
        ValueError: The value is below 0, above 1 or NaN.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name}: expected a number in 0..1, got {value}")


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
        ValueError: A negative clip, or dual_clip that is not > 1.
    """
    clip_high = clip_ratio if clip_high is None else clip_high
    not_negative(op, "clip_ratio", clip_ratio)
    not_negative(op, "clip_high", clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"{op}: dual_clip: expected None or a number > 1, got {dual_clip}")
    return clip_ratio, clip_high, float("inf") if dual_clip is None else dual_clip


def softcap(op: str, value: float | None) -> float:
    """The cap of logits as a number.

    Args:
        op: Name of the op.
        value: > 0, a number or a tensor of one element; None for no cap.

    Returns:
        The cap, 0.0 for None.

    Raises:
        ValueError: The value is not > 0.
    """
    if value is None:
        return 0.0
    if isinstance(value, torch.Tensor) and value.numel() != 1 or not value > 0:
        raise ValueError(f"{op}: softcap: expected None or a number > 0, got {value}")
    return float(value)


def chunk_tokens(op: str, value: int | None) -> None:
    """Checks the number of tokens whose logits exist at once.

    Args:
        op: Name of the op.
        value: An integer >= 1, or None.

    Raises:
        ValueError: The value is something else.
    """
    if value is not None and not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{op}: chunk_tokens: expected None or an integer >= 1, got {value!r}")
