"""Which implementation of an op runs here, and why. The one table of the ops.

A room `kernels/<op>/` holds `reference.py`, `triton_impl.py` and `native.py`; each defines a function with
the op's name and one signature. `choose` takes one by name or, for "auto", the first of the op's list that
can run on the given tensors. An implementation is imported when it is chosen: until then neither triton nor
the native module is loaded. This is the only file of kernels/ that reads environment variables
(SAFERLHF_IMPL, SAFERLHF_CHECK).
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

_ABOVE = Path(__file__).resolve().parents[1:3]  # where a checkout or an unpacked sdist has its setup.py
BUILD_COMMAND = (
    "pip install -e . --no-build-isolation --no-deps"
    if any((folder / "setup.py").is_file() for folder in _ABOVE)
    else "pip install --force-reinstall --no-deps --no-binary saferlhf-fast saferlhf-fast"
)
# The version of what _C takes and returns, as each room's native.py expects it. csrc/bindings.cpp has the
# same number; both are raised with any change of an argument or an output.
INTERFACE = 2
ENVIRONMENT = "SAFERLHF_IMPL"
NAMES = ("auto", "reference", "triton", "native")
_FILES = {"reference": "reference", "triton": "triton_impl", "native": "native"}
_PACKAGE = __name__.rpartition(".")[0]


class Op(NamedTuple):
    """One function that the dispatcher chooses an implementation of.

    Attributes:
        room: The folder that implements it. An op that users call has the name of its room.
        order: Its implementations in the order in which "auto" tries them; the reference is the last.
        native_float64: The native version computes float64 in float64. False where it works on rows of
            logits, which it reads in float32 or a narrower type.
        native_cuda: The native version also runs on a GPU (csrc/<op>.cu).
    """

    room: str
    order: tuple[str, ...] = ("triton", "native", "reference")
    native_float64: bool = True
    native_cuda: bool = False


# Every list of ops in this file is derived from this table; kernels/README.md says what else an op needs.
OPS = {
    "token_logprob": Op("token_logprob", native_float64=False),
    "token_logprob_backward": Op("token_logprob", native_float64=False),
    "linear_logprob": Op("linear_logprob", native_float64=False),
    "linear_logprob_backward": Op("linear_logprob", native_float64=False),
    "linear_ppo_loss": Op("linear_ppo_loss", native_float64=False),
    "ppo_loss_from_logits": Op("ppo_loss_from_logits", native_float64=False),
    "gae": Op("gae", native_cuda=True),
    "ppo_lag_advantage": Op("ppo_lag_advantage", native_cuda=True),
    "ppo_loss": Op("ppo_loss"),
    "value_loss": Op("value_loss"),
}
ROOMS = tuple(name for name, op in OPS.items() if name == op.room)  # the ops that users call


class Row(NamedTuple):
    """One line of `table()`.

    Attributes:
        op: The op.
        implementation: "reference", "triton" or "native".
        available: It can run here.
        chosen: "auto" takes it for float32 tensors.
        why: The reason for `available`.
    """

    op: str
    implementation: str
    available: bool
    chosen: bool
    why: str


@lru_cache(maxsize=1)
def native_module() -> tuple[ModuleType | None, str]:
    """The module `_C` with the C++ and CUDA versions, or None, and the reason in words.

    A missing `_C` is a state, not an error: the build leaves its reason in a file.
    """
    package = _PACKAGE.rpartition(".")[0]
    try:
        module = import_module(f"{package}._C")
        if getattr(module, "interface", 1) != INTERFACE:
            return None, f"built from other sources than the Python code; `{BUILD_COMMAND}` builds it again"
        return module, "built"
    except ImportError as error:
        # Beside the package: saferlhf_fast/ is this file's grandparent when installed, its sibling in a
        # checkout.
        here = Path(__file__).resolve().parent.parent
        for note in (here / "_C_failed.txt", here / "saferlhf_fast" / "_C_failed.txt"):
            if note.is_file():
                return None, f"the build failed: {note.read_text().strip()}"
        if util.find_spec(f"{package}._C") is not None:
            return None, f"built, but it does not load: {error}"
        return None, "not built"


def interpreted() -> bool:
    """True when Triton kernels run in triton's interpreter, on CPU tensors; the variable is triton's own."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def checking() -> bool:
    """True when SAFERLHF_CHECK=1 asks for checks of values that make the host wait for the device."""
    return os.environ.get("SAFERLHF_CHECK") == "1"


def _reference_reason(op: str, device: str, dtype: torch.dtype) -> str | None:
    """None: the reference runs everywhere."""
    return None


def _triton_reason(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton version of `op` cannot run, or None where it can."""
    if util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel takes float32, bfloat16 and float16, not {dtype}"
    if device != "cuda" and not interpreted():
        return f"Triton needs a GPU, the tensors are on {device}"
    return None


def _native_reason(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the native version of `op` cannot run, or None where it can."""
    module, reason = native_module()
    if module is None:
        return f"saferlhf_fast._C: {reason}"
    if dtype == torch.float64 and not OPS[op].native_float64:
        return f"the native version takes float32, bfloat16 and float16, not {dtype}"
    if device == "cuda" and OPS[op].native_cuda:
        return None if module.cuda else f"saferlhf_fast._C was built without CUDA: {module.cuda_note}"
    if device != "cpu":
        return f"the native version runs on the CPU, the tensors are on {device}"
    return None


_WHY_NOT: dict[str, Callable[[str, str, torch.dtype], str | None]] = {
    "reference": _reference_reason,
    "triton": _triton_reason,
    "native": _native_reason,
}


@cache
def _load(op: str, name: str) -> Callable[..., Any]:
    """The function of an implementation; imports its file."""
    module = import_module(f"{_PACKAGE}.{OPS[op].room}.{_FILES[name]}")
    return getattr(module, op)


def _pick(
    op: str, device: str, dtype: torch.dtype, requested: str, from_environment: bool
) -> tuple[str, str]:
    """The name of the implementation and the reason for it; raises as `choose` does."""
    order = OPS[op].order
    if requested not in NAMES:
        source = f"{ENVIRONMENT}={requested}" if from_environment else f"impl={requested!r}"
        raise ValueError(f"{op}: {source} is not one of {', '.join(NAMES)}")
    # The variable is for all ops at once: one that has no such implementation is chosen as with "auto".
    if requested != "auto" and not (from_environment and requested not in order):
        if requested not in order:
            raise NotImplementedError(
                f"{op}: there is no {requested} implementation; there is {', '.join(order)}"
            )
        problem = _WHY_NOT[requested](op, device, dtype)
        if problem is not None:
            remedy = (
                f"; build it with `{BUILD_COMMAND}`"
                if requested == "native" and native_module()[0] is None
                else ""
            )
            raise NotImplementedError(
                f"{op}: implementation {requested!r} cannot run here: {problem}{remedy}"
            )
        return requested, "asked for in " + (ENVIRONMENT if from_environment else "the call")
    passed_over: list[str] = []
    for name in order:
        problem = _WHY_NOT[name](op, device, dtype)
        if problem is None:
            reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
            return name, f"{name}: first that can run{reasons}"
        passed_over.append(f"{name}: {problem}")
    raise AssertionError(f"{op}: the reference must always be able to run")


@cache
def _choose(
    op: str, device: str, dtype: torch.dtype, requested: str, from_environment: bool, interpret: bool
) -> tuple[Callable[..., Any], str]:
    """As `choose`; `interpret` is only a key of the cache."""
    name, why = _pick(op, device, dtype, requested, from_environment)
    return _load(op, name), why


def _requested(impl: str) -> tuple[str, bool]:
    """The name that is asked for, and whether SAFERLHF_IMPL asks for it: only "auto" gives way to it."""
    name = os.environ.get(ENVIRONMENT) or "auto" if impl == "auto" else impl
    return name, impl == "auto" and name != "auto"


def choose(op: str, tensors: Sequence[torch.Tensor], impl: str = "auto") -> tuple[Callable[..., Any], str]:
    """The implementation of an op that runs on the given tensors.

    Args:
        op: A name of `OPS`.
        tensors: The op's inputs; the first one decides device and dtype.
        impl: "auto", "reference", "triton" or "native". "auto" gives way to the variable SAFERLHF_IMPL.

    Returns:
        The function, with the signature of the room's reference, and the reason for it in words.

    Raises:
        NotImplementedError: An implementation that is asked for by name cannot run here. The message has the
            command that builds it, where building helps.
        ValueError: `impl` or SAFERLHF_IMPL is no such name.
    """
    lead = tensors[0]
    return _choose(op, lead.device.type, lead.dtype, *_requested(impl), interpreted())


def explain(op: str, device: str | None = None) -> tuple[str | None, str]:
    """What `choose` takes for float32 tensors, without loading it. SAFERLHF_IMPL counts.

    Args:
        op: A name of `OPS`.
        device: "cpu" or "cuda"; None for "cuda" where there is a GPU.

    Returns:
        The name of the implementation and the reason for it, or None and the message that `choose` would
        raise.
    """
    try:
        return _pick(op, device or _device_here(), torch.float32, *_requested("auto"))
    except (NotImplementedError, ValueError) as error:
        return None, str(error)


def _device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def table(device: str | None = None) -> list[Row]:
    """Every op with every implementation, whether it can run here, and why. SAFERLHF_IMPL does not count.

    Args:
        device: "cpu" or "cuda"; None for "cuda" where there is a GPU.
    """
    device = device or _device_here()
    rows = []
    for op in ROOMS:
        order = OPS[op].order
        chosen = next(name for name in order if _WHY_NOT[name](op, device, torch.float32) is None)
        for name in ("reference", "triton", "native"):
            if name not in order:
                rows.append(Row(op, name, False, False, "does not exist; see kernels/README.md"))
                continue
            problem = _WHY_NOT[name](op, device, torch.float32)
            rows.append(Row(op, name, problem is None, name == chosen, problem or f"can run on {device}"))
    return rows
