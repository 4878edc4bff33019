"""A GPU window without a GPU: tiny shapes, and Triton's kernels in its interpreter or compiled and not
launched.

Triton 3.6's interpreter does not run with numpy 2.4 and later, which is what a machine with a GPU may have;
its compiler does. So the second kind puts a driver in the place of CUDA's that knows one GPU, an H200's
architecture, and compiles at each launch.
"""

import importlib
import os

_faked = [0]  # launches that compiled a kernel and ran none


def prepare(kind):
    """Before torch and Triton are imported. kind: "interpreter" or "compiler"."""
    os.environ.update(BENCH_TINY="1", CUDA_VISIBLE_DEVICES="")
    os.environ["TRITON_INTERPRET"] = "1" if kind == "interpreter" else "0"
    if kind == "compiler":
        # an H200's kernels of half precision are the ones to compile
        os.environ["BENCH_TINY_DTYPE"] = "bfloat16"
        fake_launches()


def launches():
    """How many launches were faked so far."""
    return _faked[0]


class _Driver:
    """What triton's launcher asks of a driver before a kernel runs: one GPU of compute capability 9.0, whose
    stream is 0.
    """

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def fake_launches():
    """From here on a launch compiles its kernel for sm_90, as its arguments ask for it, and ends there; CPU
    tensors will do.
    """
    from triton.runtime import driver, jit

    run = jit.JITFunction.run

    def compiled(self, *arguments, grid, warmup, **options):
        _faked[0] += 1
        return run(self, *arguments, grid=grid, warmup=True, **options)

    jit.JITFunction.run = compiled
    driver.set_active(_Driver())
    dispatch = importlib.import_module("saferlhf_fast.kernels.dispatch")
    problem = dispatch._WHY_NOT["triton"]
    dispatch._WHY_NOT["triton"] = lambda op, device, dtype: problem(op, "cuda", dtype)
