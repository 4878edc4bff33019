"""Runs a test file again in a process where Triton's interpreter takes CPU tensors (TRITON_INTERPRET is read
once).
"""

import os
import re
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
        return f"the interpreter of triton {triton} breaks with numpy {numpy}: triton >= 3.7 or numpy < 2.4 is needed"
    return None


def installed(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def run(file, *arguments, timeout=280):
    """The tests of `file` with TRITON_INTERPRET=1 and no GPU; fails when one fails or when none ran, skips by
    `refusal`.
    """
    reason = refusal(torch.cuda.is_available(), installed("triton"), installed("numpy"))
    if reason is not None:
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-p", "no:cacheprovider", *arguments],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", result.stdout), result.stdout[-2000:]
