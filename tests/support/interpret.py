"""Runs test files where Triton's interpreter takes CPU tensors (TRITON_INTERPRET is read once a process)."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.version import Version


def refusal(gpu, triton, numpy):
    """Why the interpreter is not tried, or None where it is. gpu: whether there is one; versions as text,
    None for what is not installed.
    """
    if gpu:
        return "there is a GPU, on which the Triton versions run"
    if triton is None or numpy is None:
        return f"{'numpy' if triton else 'triton'} is not installed"
    if Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        return (
            f"the interpreter of triton {triton} breaks with numpy {numpy}: "
            "triton >= 3.7 or numpy < 2.4 is needed"
        )
    return None


def installed(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def run(files, *arguments, timeout=280):
    """pytest on `files` with TRITON_INTERPRET=1 and no GPU -> CompletedProcess; skips by `refusal`."""
    reason = refusal(torch.cuda.is_available(), installed("triton"), installed("numpy"))
    if reason is not None:
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, files), "-p", "no:cacheprovider", *arguments],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def patch_once():
    """A launch in the interpreter patches triton.language once, and not again at each call of a device
    function: that finds nothing left to patch and takes half of the time. Where TRITON_INTERPRET=1.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    running = []  # the modules that each launch that runs has patched; None: not yet

    def patch_lang(fn):
        seen = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if running and running[-1] is not None and seen <= running[-1]:
            return None
        if running and running[-1] is None:
            running[-1] = seen
        return patch(fn)

    def call(executor, *arguments, **options):
        running.append(None)
        try:
            return launch(executor, *arguments, **options)
        finally:
            running.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call
