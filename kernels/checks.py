"""Checks of shape, dtype and device of the ops' arguments; a message says what was expected and got.

Those of settings are in setting_checks.py, those of offsets and masks in row_checks.py. Most of the others
look at no values, which would make the host wait for the device. `known_ids`, `known_temperatures` and the
offsets of `rows` look at values on the CPU, and on a device only with SAFERLHF_CHECK=1. `op` is always the
name of the op, with which the message begins. Shapes: N packed tokens, B rows, T padded width, V vocabulary,
H hidden size.
"""

from collections.abc import Sequence

import torch

from .dispatch import NAMES
from .first_order import transformed
from .kinds import flag as flag
from .kinds import is_floating as is_floating
from .kinds import is_integer as is_integer
from .kinds import number as number
from .kinds import shown as shown
from .kinds import tensor as tensor_argument
from .kinds import wrong
from .row_checks import looks
from .row_checks import per_row as per_row
from .row_checks import rows as rows
from .setting_checks import chunk_tokens as chunk_tokens
from .setting_checks import clip as clip
from .setting_checks import coefficient as coefficient
from .setting_checks import fraction as fraction
from .setting_checks import not_negative as not_negative
from .setting_checks import one_of as one_of
from .setting_checks import softcap as softcap


def implementation(op: str, impl: str) -> None:
    """Checks the name of an implementation; `choose` says whether it can run.

    Raises:
        ValueError: It is none of `NAMES`.
    """
    one_of(op, "impl", impl, NAMES)


def result_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype that an op computes in and returns: float64 if the first tensor is float64, else float32."""
    return torch.float64 if tensors[0].dtype == torch.float64 else torch.float32


def detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor without its autograd history; None stays None.

    A tensor without history is returned itself, since detach makes a new tensor even then.
    """
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def scalar(value: float | torch.Tensor | None, like: torch.Tensor, name: str) -> torch.Tensor | None:
    """A scalar argument as a 0-d tensor of the op's dtype; the host never reads a tensor.

    Args:
        value: A number, a tensor of one element, or None, which stays None.
        like: A tensor of the op, whose device and `result_dtype` the scalar gets.
        name: The argument's name in messages.

    Raises:
        ValueError: A tensor of more than one element, of complex numbers, or that is on "meta" alone.
    """
    if value is None:
        return None
    dtype = result_dtype(like)
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.dtype.is_complex or value.is_meta != like.is_meta:
            raise ValueError(
                f"{name}: expected a real number on {like.device}, got {value.dtype} on {value.device}"
            )
        if value.dim() == 0 and value.dtype == dtype and value.device == like.device:
            return detached(value)
        return value.detach().reshape(()).to(device=like.device, dtype=dtype)
    return torch.full((), float(number("", name, value)), dtype=dtype, device=like.device)


def normalizer(op: str, value: float | torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """As `scalar`, for a count of sequences or tokens.

    Args:
        op: Name of the op.
        value: A number, a tensor of one element, or None, which stays None. In a tensor, which is not read, a
            number below 0 or NaN makes the loss NaN.
        like: As in `scalar`.

    Raises:
        ValueError: As `scalar`, or a number that is below 0 or NaN.
    """
    if value is not None and not isinstance(value, torch.Tensor):
        not_negative(op, "normalizer", value)
    return scalar(value, like, "normalizer")


def as_int32_or_int64(ids: torch.Tensor) -> torch.Tensor:
    """Ids as signed integers of 32 or 64 bits: a kernel could not compare narrower ones with V."""
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.long()


def overlaps(tensor: torch.Tensor) -> bool:
    """True if two elements may share memory (an expanded tensor): then nothing may be written into it."""
    reach = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1
    ):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def disposable(tensor: torch.Tensor, flat: torch.Tensor) -> bool:
    """True if an op may write over the tensor: it is an intermediate result in memory of its own.

    A leaf or a view of a leaf is not, since it may be a model's parameter. Under torch.func a
    tensor's memory is not its own.

    Args:
        tensor: What the caller gave, [..., V].
        flat: Its rows, [N, V], which would be written.
    """
    if torch.compiler.is_compiling() or transformed() or tensor.is_leaf:
        return False
    return not (tensor._base is not None and tensor._base.is_leaf) and not overlaps(flat)


def same_tokens(op: str, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """Checks that token tensors fit each other.

    Args:
        op: Name of the op.
        names: Names of the arguments, in the order of the tensors; it may have more.
        tensors: Packed [N] or padded [B, T].

    Raises:
        ValueError: A tensor is not floating point, or not of the first one's shape and device.
    """
    tensor_argument(op, names[0], tensors[0])
    shape, device = tensors[0].shape, tensors[0].device
    for name, tensor in zip(names, tensors):
        tensor_argument(op, name, tensor)
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name}: expected shape {tuple(shape)} as {names[0]}, got {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: {name}: expected device {device} as {names[0]}, got {tensor.device}")
        if not is_floating(tensor):
            raise ValueError(
                f"{op}: {name}: expected a floating point dtype of 16, 32 or 64 bits, got {tensor.dtype}"
            )


def logits_and_ids(op: str, logits: torch.Tensor, ids: torch.Tensor) -> None:
    """Checks that logits and ids fit each other.

    Args:
        op: Name of the op.
        logits: Floating point [..., V].
        ids: Integers [...], on the same device.

    Raises:
        ValueError: Shapes, dtypes or devices are others.
    """
    tensor_argument(op, "logits", logits)
    tensor_argument(op, "ids", ids)
    if logits.dim() < 1 or ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: ids: expected shape {tuple(logits.shape[:-1])} as logits without its last dimension, "
            f"got {tuple(ids.shape)}"
        )
    if not is_floating(logits) or not is_integer(ids):
        raise ValueError(
            f"{op}: expected floating point logits and integer ids, got {logits.dtype}, {ids.dtype}"
        )
    if ids.device != logits.device:
        raise ValueError(f"{op}: ids: expected device {logits.device} as logits, got {ids.device}")


def head(
    op: str, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Checks that hidden states, a head and ids fit each other. All are on one device.

    Args:
        op: Name of the op.
        hidden: Floating point [..., H].
        weight: [V, H], of the dtype of `hidden`.
        ids: Integers [...].
        bias: [V], of the dtype of `hidden`, or None.

    Raises:
        ValueError: Shapes, dtypes or devices are others.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("ids", ids)):
        tensor_argument(op, name, tensor)
    if bias is not None:
        tensor_argument(op, "bias", bias)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: expected hidden [..., H] and weight [V, H], got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)}"
        )
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and (part.dtype != hidden.dtype or part.device != hidden.device):
            raise ValueError(
                f"{op}: {name}: expected {hidden.dtype} on {hidden.device} as hidden, "
                f"got {part.dtype} on {part.device}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if not is_floating(hidden) or not is_integer(ids):
        raise ValueError(
            f"{op}: expected floating point hidden states and integer ids, got {hidden.dtype}, {ids.dtype}"
        )
    if ids.shape != hidden.shape[:-1] or ids.device != hidden.device:
        raise ValueError(
            f"{op}: ids: expected shape {tuple(hidden.shape[:-1])} on {hidden.device} as hidden without its "
            f"last dimension, got {tuple(ids.shape)} on {ids.device}"
        )


def temperature(
    op: str, value: float | torch.Tensor, shape: torch.Size, like: torch.Tensor
) -> tuple[float, torch.Tensor | None]:
    """A temperature as one number for all tokens, or as a number for each; the host never reads a tensor.

    Args:
        op: Name of the op.
        value: A number > 0, or a tensor of numbers, 0-d or of `shape`.
        shape: Shape of the ids, [...] with N elements.
        like: A tensor of the op, whose device and `result_dtype` a tensor of temperatures gets.

    Returns:
        (number, None), or (1.0, temperatures [N]).

    Raises:
        ValueError: A number that is not > 0, or a tensor of another shape or that is not floating point.
    """
    if not isinstance(value, torch.Tensor):
        expected = "a number > 0 or a tensor of them"
        one = number(op, "temperature", value, expected=expected)
        if not one > 0:
            raise wrong(op, "temperature", expected, value)
        return float(one), None
    if value.dim() and value.shape != shape or not value.dtype.is_floating_point:
        raise ValueError(
            f"{op}: temperature: expected a number > 0, or floating point numbers of shape {tuple(shape)}, "
            f"got {value.dtype} {tuple(value.shape)}"
        )
    if value.is_meta != like.is_meta:
        raise ValueError(
            f"{op}: temperature: expected a number or a tensor on {like.device}, got one on {value.device}"
        )
    value = value.detach().to(device=like.device, dtype=result_dtype(like))
    return 1.0, value.expand(shape).reshape(-1).contiguous()


def known_temperatures(
    op: str, temperature_N: torch.Tensor | None, counted: torch.Tensor | None = None
) -> None:
    """Checks that each token's temperature is > 0, where values are looked at (`known_ids`).

    Args:
        op: Name of the op.
        temperature_N: As `temperature` returns it; None for one number, which has been checked there.
        counted: Tokens whose temperature matters, bool [N]; None for all.

    Raises:
        ValueError: A temperature that counts is not > 0.
    """
    if temperature_N is None or temperature_N.numel() == 0 or not looks(temperature_N):
        return
    wrong = ~(temperature_N > 0)
    if counted is not None:
        wrong &= counted
    if wrong.any():
        raise ValueError(f"{op}: temperature: expected numbers > 0, got {temperature_N[wrong][0].item()}")


def known_ids(op: str, ids: torch.Tensor, vocabulary: int, counted: torch.Tensor | None = None) -> None:
    """Checks that ids are in the vocabulary, where values are looked at.

    That is on the CPU, or anywhere with SAFERLHF_CHECK=1; else looking would make the host wait for the
    device.

    Args:
        op: Name of the op.
        ids: Integers of any shape.
        vocabulary: V; ids are in 0..V-1.
        counted: Tokens whose id matters, bool, shaped as ids; None for all.

    Raises:
        ValueError: An id that counts is outside the vocabulary.
    """
    if ids.numel() == 0 or not looks(ids):
        return
    lowest, highest = ids.aminmax()
    if lowest >= 0 and highest < vocabulary:  # the usual case: one pass, and nothing is left to find out
        return
    outside = (ids < 0) | (ids >= vocabulary)
    if counted is not None:
        outside &= counted
    if outside.any():
        raise ValueError(
            f"{op}: ids: expected 0 <= id < {vocabulary}, got {ids[outside].reshape(-1)[0].item()}"
        )
