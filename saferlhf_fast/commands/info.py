"""`saferlhf-fast info`: versions, the device, and which implementation of each op runs here and why.

Only the standard library is needed; torch is imported when it is installed. Nothing here raises: the line of
something that is missing says so.
"""

import importlib
import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from saferlhf_fast.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saferlhf_fast.kernels.dispatch import Row

HELP = """usage: saferlhf-fast info
       saferlhf-fast info --cluster [--folder DIR] [--limit SECONDS]

Prints versions, the device, which implementation of each op runs here and why, and which optional packages
are installed. It works without any of them.

--cluster checks whether the machines of a run work together. Start it on all of them, as the run will be
started. At the first check that fails it ends with exit code 1 and "rank 3 (host): reason". It checks that
  every rank shows up within the limit;
  versions, drivers and GPUs are equal;
  collectives give right sums (it prints their latency and bandwidth);
  all ranks see and write the shared folder, and renames in it are atomic.
It warns when clocks differ or little disk is free.

  --folder DIR     the shared folder that runs write to
  --limit SECONDS  how long to wait for a rank, at each step; default: 60

examples:
  saferlhf-fast info --cluster --processes 2
  torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr node1 --master-port 29500 \\
      -m saferlhf_fast info --cluster --folder /shared/runs
  srun saferlhf-fast info --cluster --folder /shared/runs"""

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "tokenizers",
    "datasets",
    "deepspeed",
    "peft",
    "accelerate",
    "safetensors",
    "pydantic",
    "omegaconf",
    "rich",
    "tensorboard",
    "scikit-learn",
    "flash-attn",
    "wandb",
    "trackio",
    "bitsandbytes",
    "vllm",
)


def text() -> str:
    """Returns the whole report."""
    lines = [
        f"saferlhf-fast {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"install: {install()}",
        f"device: {device()}",
        "",
        "packages:",
    ]
    lines += [f"  {name:14} {version or 'not installed'}" for name, version in versions().items()]
    lines += [
        "",
        "ops, for float32 tensors (impl= in a call or SAFERLHF_IMPL forces reference, triton or native):",
        *ops(),
        "",
        f"_C: {compiled()}",
        f"deepspeed: {deepspeed()}",
        f"flash-attn: {flash_attention()}",
    ]
    return "\n".join(lines)


def versions() -> dict[str, str | None]:
    """Returns {package: version, or None when it is not installed}."""
    by_package: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            by_package[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            by_package[name] = None
    return by_package


def device() -> str:
    """Names the device that stages use."""
    try:
        import torch
    except ImportError as e:
        return f"unknown: torch cannot be imported ({e})"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"cuda: {', '.join(names)} (torch built for CUDA {torch.version.cuda})"
    why = f"CUDA {torch.version.cuda} build, no usable GPU" if torch.version.cuda else "CPU build of torch"
    return f"cpu, {torch.get_num_threads()} threads ({why})"


def ops() -> list[str]:
    """Returns a line for each op.

    It names the implementation that runs here, why it does, and which others could run or could not.
    """
    try:
        from saferlhf_fast.kernels import dispatch

        rows = dispatch.table()
        names = list(dict.fromkeys(row.op for row in rows))
        lines = [_op_line(op, *dispatch.explain(op), [row for row in rows if row.op == op]) for op in names]
    except Exception as e:  # a broken kernel must not hide the rest of the report
        return [f"  not available: {type(e).__name__}: {e}"]
    width = max(map(len, names))
    return [f"  {op.ljust(width)}  {line}" for op, line in zip(names, lines, strict=True)]


def _op_line(op: str, implementation: str | None, why: str, rows: "Sequence[Row]") -> str:
    """Returns the line of an op, without its name.

    An implementation that `why` names already is not named again. rows: this op's rows of `dispatch.table`.
    """
    others = [row for row in rows if row.implementation != implementation]
    runnable = [row.implementation for row in others if row.available]
    others_missing = [
        f"{row.implementation}: {row.why}" for row in others if not row.available and row.why not in why
    ]
    if implementation is None:
        first = f"none, a call raises: {why.removeprefix(f'{op}: ')}"
    else:
        first = f"{implementation.ljust(9)}  {why.removeprefix(f'{implementation}: ')}"
    return "; ".join([first, *([f"{' and '.join(runnable)} could run"] if runnable else []), *others_missing])


def install() -> str:
    """Says which form of the package runs here: a wheel, by its tag, or a checkout."""
    package = Path(__file__).resolve().parents[1]
    try:
        distribution = importlib.metadata.distribution("saferlhf-fast")
    except importlib.metadata.PackageNotFoundError:
        return f"a checkout, not installed: {package.parent}"
    if Path(str(distribution.locate_file("saferlhf_fast"))).resolve() != package:
        return f"a checkout: {package.parent}"
    tag = next(
        (
            line.split()[1]
            for line in (distribution.read_text("WHEEL") or "").splitlines()
            if line.startswith("Tag:")
        ),
        "unknown",
    )
    return f"wheel {tag}, " + (
        "the one for every platform, made without _C" if tag.endswith("-any") else "for this platform"
    )


def compiled() -> str:
    """Says whether the compiled module is available, or why it is not and how to get it."""
    try:
        from saferlhf_fast.kernels import dispatch

        module, why = dispatch.native_module()
    except ImportError as e:
        return f"unknown: {e}"
    if module is None:
        return f"{why}; to get it (needs a C++ compiler): {dispatch.BUILD_COMMAND}"
    return "present, with CUDA" if module.cuda else f"present, for the CPU: {module.cuda_note}"


def deepspeed() -> str:
    """Says whether the trainer's engine is installed."""
    version = versions()["deepspeed"]
    return f"{version}" if version else "not installed: pip install 'saferlhf-fast[train]'"


def flash_attention() -> str:
    """Says whether flash-attn can be used; without it attention is torch's own."""
    if versions()["flash-attn"] is None:
        return (
            "not installed; attention is torch's scaled_dot_product_attention. "
            "pip install 'saferlhf-fast[flash]'"
        )
    try:
        importlib.import_module("flash_attn")
    except ImportError as e:
        return f"installed, but cannot be imported ({e}); attention is torch's own"
    return "present"
