"""Runs a test file again in a process where Triton's interpreter takes CPU tensors (TRITON_INTERPRET is read once)."""

import os
import re
import subprocess
import sys
from pathlib import Path


def run(file, *arguments, timeout=280):
    """The tests of `file` with TRITON_INTERPRET=1 and no GPU; fails when one fails or when none ran."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-m", "pytest", str(file), "-p", "no:cacheprovider", *arguments],
                            env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                            timeout=timeout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", result.stdout), result.stdout[-2000:]
