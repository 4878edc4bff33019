"""Which implementation of an op runs here, and why. The one place that reads SAFERLHF_IMPL.

A room `kernels/<op>/` holds `reference.py` and, where they exist, `triton_impl.py` and `native.py`; each
defines a function with the op's name and one signature. `choose` picks one by name or, for "auto", the first
of the op's list that can run on the tensors at hand. Nothing is imported before it is chosen: neither triton
nor the native module.
"""

import os
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module, util
from pathlib import Path
from typing import NamedTuple

import torch

_ABOVE = Path(__file__).resolve().parents[1:3]  # where a checkout or an unpacked sdist has its setup.py
BUILD_COMMAND = (
    "pip install -e . --no-build-isolation --no-deps"
    if any((folder / "setup.py").is_file() for folder in _ABOVE)
    else "pip install --force-reinstall --no-deps --no-binary saferlhf-fast saferlhf-fast"
)
INTERFACE = 2  # of _C: its arguments and outputs as the native.py of the rooms know them (csrc/bindings.cpp)
ENVIRONMENT = "SAFERLHF_IMPL"
NAMES = ("auto", "reference", "triton", "native")
_FILES = {"reference": "reference", "triton": "triton_impl", "native": "native"}
_PACKAGE = __name__.rpartition(".")[0]


class Op(NamedTuple):
    """room: folder. order: implementations in the order that "auto" tries them; the reference is always last."""

    room: str
    order: tuple[str, ...]


OPS = {
    "token_logprob": Op("token_logprob", ("triton", "native", "reference")),
    "token_logprob_backward": Op("token_logprob", ("triton", "native", "reference")),
    "linear_logprob": Op("linear_logprob", ("triton", "native", "reference")),
    "linear_logprob_backward": Op("linear_logprob", ("triton", "native", "reference")),
    "linear_ppo_loss": Op("linear_ppo_loss", ("triton", "native", "reference")),
    "ppo_loss_from_logits": Op("ppo_loss_from_logits", ("triton", "native", "reference")),
    "gae": Op("gae", ("triton", "native", "reference")),
    "ppo_lag_advantage": Op("ppo_lag_advantage", ("triton", "native", "reference")),
    "ppo_loss": Op("ppo_loss", ("triton", "native", "reference")),
    "value_loss": Op("value_loss", ("triton", "native", "reference")),
}


# Rooms whose fast versions work on rows of logits: in float32, whatever narrower type comes in.
LOGIT_ROOMS = ("token_logprob", "linear_logprob", "ppo_loss_from_logits", "linear_ppo_loss")

# Ops whose native version also runs on a GPU (csrc/*.cu).
CUDA_OPS = ("gae", "ppo_lag_advantage")


class Row(NamedTuple):
    """One line of `table()`. why: the reason for `available`, and whether "auto" takes it for float32 on
    `device`.
    """

    op: str
    implementation: str
    available: bool
    chosen: bool
    why: str


@lru_cache(maxsize=1)
def native_module():
    """(module or None, reason).

    A missing `_C` is a state, not an error: the build's reason is kept in a file.
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


def interpreted():
    """True when Triton kernels run in triton's interpreter, on CPU tensors (the variable belongs to triton)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def checking():
    """True when SAFERLHF_CHECK=1 asks for checks that make the host wait for the device: ids outside the
    vocabulary.
    """
    return os.environ.get("SAFERLHF_CHECK") == "1"


def _triton_reason(op, device, dtype):
    if util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel takes float32, bfloat16 and float16, not {dtype}"
    if device != "cuda" and not interpreted():
        return f"Triton needs a GPU, the tensors are on {device}"
    return None


def _native_reason(op, device, dtype):
    module, reason = native_module()
    if module is None:
        return f"saferlhf_fast._C: {reason}"
    if dtype == torch.float64 and OPS[op].room in LOGIT_ROOMS:
        return f"the native version takes float32, bfloat16 and float16, not {dtype}"
    if device == "cuda" and op in CUDA_OPS:
        return None if module.cuda else f"saferlhf_fast._C was built without CUDA: {module.cuda_note}"
    if device != "cpu":
        return f"the native version runs on the CPU, the tensors are on {device}"
    return None


_WHY_NOT = {"reference": lambda op, device, dtype: None, "triton": _triton_reason, "native": _native_reason}


@cache
def _load(op, name):
    module = import_module(f"{_PACKAGE}.{OPS[op].room}.{_FILES[name]}")
    return getattr(module, op)


def _pick(op, device, dtype, asked, from_environment):
    """(name of the implementation, the reason for it); raises as `choose` does."""
    order = OPS[op].order
    if asked not in NAMES:
        source = f"{ENVIRONMENT}={asked}" if from_environment else f"impl={asked!r}"
        raise ValueError(f"{op}: {source} is not one of {', '.join(NAMES)}")
    # The variable speaks for all ops at once: one that has no such implementation goes on as with "auto".
    if asked != "auto" and not (from_environment and asked not in order):
        if asked not in order:
            raise NotImplementedError(
                f"{op}: there is no {asked} implementation; there is {', '.join(order)}"
            )
        problem = _WHY_NOT[asked](op, device, dtype)
        if problem is not None:
            remedy = (
                f"; build it with `{BUILD_COMMAND}`"
                if asked == "native" and native_module()[0] is None
                else ""
            )
            raise NotImplementedError(f"{op}: implementation {asked!r} cannot run here: {problem}{remedy}")
        return asked, "asked for in " + (ENVIRONMENT if from_environment else "the call")
    passed_over = []
    for name in order:
        problem = _WHY_NOT[name](op, device, dtype)
        if problem is None:
            return name, f"{name}: first that can run" + (
                f" ({'; '.join(passed_over)})" if passed_over else ""
            )
        passed_over.append(f"{name}: {problem}")
    raise AssertionError(f"{op}: the reference must always be able to run")


@cache
def _choose(op, device, dtype, asked, from_environment, interpret):
    name, why = _pick(op, device, dtype, asked, from_environment)
    return _load(op, name), why


def _asked(impl):
    """(name that is asked for, whether the variable asks): `impl` comes first, "auto" gives way to
    SAFERLHF_IMPL.
    """
    asked = os.environ.get(ENVIRONMENT) or "auto" if impl == "auto" else impl
    return asked, impl == "auto" and asked != "auto"


def choose(op: str, tensors, impl: str = "auto") -> tuple[Callable, str]:
    """The implementation of `op` for `tensors` (the first one decides device and dtype) and the reason for
    it.

    impl: "auto", "reference", "triton" or "native"; "auto" gives way to the variable SAFERLHF_IMPL.
    Raises NotImplementedError when an implementation asked for by name is missing here, with the build
    command.
    """
    lead = tensors[0]
    return _choose(op, lead.device.type, lead.dtype, *_asked(impl), interpreted())


def explain(op: str, device: str | None = None) -> tuple[str | None, str]:
    """(implementation, reason): what `choose` takes for float32 tensors on `device`, without loading it.

    device: "cpu" or "cuda"; default: what is here. SAFERLHF_IMPL counts. (None, message): `choose` would
    raise the message.
    """
    try:
        return _pick(op, device or _device_here(), torch.float32, *_asked("auto"))
    except (NotImplementedError, ValueError) as error:
        return None, str(error)


def _device_here():
    return "cuda" if torch.cuda.is_available() else "cpu"


def table(device: str | None = None) -> list[Row]:
    """Op x implementation x available x why; SAFERLHF_IMPL does not count. device: "cpu" or "cuda"; default:

    what is here.
    """
    device = device or _device_here()
    rows = []
    for op, (room, order) in OPS.items():
        if op != room:
            continue
        taken = next(name for name in order if _WHY_NOT[name](op, device, torch.float32) is None)
        for name in ("reference", "triton", "native"):
            if name not in order:
                rows.append(Row(op, name, False, False, "does not exist; see kernels/README.md"))
                continue
            problem = _WHY_NOT[name](op, device, torch.float32)
            rows.append(Row(op, name, problem is None, name == taken, problem or f"can run on {device}"))
    return rows
