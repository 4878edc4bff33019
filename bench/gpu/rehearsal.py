"""A GPU window without a GPU: tiny shapes, and Triton's kernels interpreted, or compiled but not launched.

Triton 3.6's interpreter does not run with numpy 2.4 and later, which a machine with a GPU may have; its
compiler does. So the second kind replaces CUDA's driver by one that reports one GPU with an H200's
architecture, and compiles at each launch.
"""

import importlib
import os

_faked = [0]  # number of launches that only compiled their kernel


def prepare(kind):
    """Sets the environment before torch and Triton are imported. kind: "interpreter" or "compiler"."""
    os.environ.update(BENCH_TINY="1", CUDA_VISIBLE_DEVICES="")
    os.environ["TRITON_INTERPRET"] = "1" if kind == "interpreter" else "0"
    if kind == "compiler":
        # compile the half-precision kernels of an H200
        os.environ["BENCH_TINY_DTYPE"] = "bfloat16"
        fake_launches()


def launches():
    """Returns the number of faked launches so far."""
    return _faked[0]


class _Driver:
    """The calls of triton's launcher to a driver: one GPU of compute capability 9.0, stream 0."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def fake_launches():
    """Makes each launch only compile its kernel for sm_90.

    The kernel is specialised for the launch's arguments; CPU tensors are accepted.
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
