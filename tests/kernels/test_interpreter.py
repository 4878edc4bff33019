"""The Triton kernels in Triton's interpreter, on the CPU, where no GPU is at hand: the tests of all ops that
give numbers by them, in one process of their own (TRITON_INTERPRET is read once per process).

By hand, one op:  TRITON_INTERPRET=1 python -m pytest tests/kernels/test_gae.py
In such a process the places that the tests run at (tests/support/naive.py) are the Triton version on CPU
tensors alone, and the sizes are small. Registers and grids are for test_compile.py and test_launches.py.
"""

import re
from pathlib import Path

import interpret
import pytest

from saferlhf_fast.kernels import dispatch

HERE = Path(__file__).parent
OPS = sorted({op.room for op in dispatch.OPS.values() if "triton" in op.order})
FILES = [HERE / f"test_{name}.py" for name in (*OPS, "triton_logits", "op_inputs", "ties")]
# What runs no Triton kernel, by parts of names; the process without the interpreter has it.
OTHERS = (
    "wrong_arguments",
    "gradcheck",
    "library",
    "refused",
    "triton_launches",
    "threads",
    "reference_holds",
)
SELECTION = " and ".join(f"not {name}" for name in OTHERS)


@pytest.mark.timeout(900)
def test_triton_kernels_in_the_interpreter():
    done = interpret.run(FILES, "-k", SELECTION, "-rpf", timeout=850)
    failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
    assert not failed and done.returncode == 0, "\n".join([*failed, done.stdout[:8000], done.stderr[-2000:]])
    passed = re.findall(r"^PASSED tests/kernels/(\w+\.py)", done.stdout, re.MULTILINE)
    assert set(passed) == {file.name for file in FILES}
