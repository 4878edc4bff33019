"""The `measure` argument of the benches' functions in a GPU window.

It checks, times and writes a row, and never ends the run.
"""

import statistics
import time

import clock
import exact
import memory
import torch
from gpu import rehearsal
from gpu.outcomes import NotRun


class Measure:
    """Replaces the fixture `measure` of conftest.py: a wrong result is marked and still timed."""

    def __init__(self, window, what, seconds=0.3):
        self.window, self.what, self.seconds, self.error, self.wrong = window, what, seconds, None, ""
        self.faked = rehearsal.launches()

    def ran(self):
        """Raises NotRun if launches were faked since this object was created: nothing can be timed."""
        if rehearsal.launches() > self.faked:
            raise NotRun("its Triton kernels were compiled for sm_90, and not launched")

    def check(self, dtype, *pairs):
        """Stores how much each (got, expected) pair differs."""
        self.ran()
        self.error = max(exact.error(got, expected) for got, expected in pairs)
        self.wrong = (
            "" if self.error <= exact.LIMIT[dtype] else f"wrong: off by {self.error:.1e} of the largest value"
        )

    def __call__(
        self,
        step,
        *,
        op,
        version,
        shape,
        device,
        reads=0,
        writes=0,
        flops=0,
        dtype=torch.float32,
        inputs=(),
        before=None,
        auto=False,
        seconds=None,
    ):
        """Times step(); the arguments are those of conftest.Measure."""
        ready = clock.preparation(device, reads + writes, before)

        ready()
        start = time.perf_counter()
        peak = memory.above(step, inputs, device)
        took = time.perf_counter() - start
        self.ran()
        rounds = (
            1
            if self.window.rehearsal
            else 3
            if took > 1
            else max(5, min(30, int(self.seconds / max(took, 1e-6))))
        )
        if device == "cuda":
            figures = clock.on_device(step, ready, rounds, again=before is None)
        else:
            figures = on_host(step, ready, rounds)
        self.window.emit(
            "row",
            what=self.what,
            op=op,
            version=version,
            shape=shape,
            device=device,
            auto=auto,
            reads=reads,
            writes=writes,
            flops=flops,
            dtype=str(dtype).removeprefix("torch."),
            error=self.error,
            wrong=self.wrong,
            peak=peak,
            **figures,
        )


def on_host(step, ready, rounds):
    """Returns {"seconds", "best"} of a step on a CPU."""
    times = []
    for _ in range(rounds):
        ready()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "best": min(times)}


def bench(window, function, shape, version):
    """Writes one row of a bench file: calls function(measure, device, shape, version) in its own try."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    what = (
        f"{function.__module__.removeprefix('bench_')} {function.__name__.removeprefix('test_')}, {version}"
    )
    if window.wants(what):
        window.attempt(what, function, Measure(window, what), device, shape, version)


def timed(window, step, *, op, version, shape, ready=None, inputs=(), checked=(), **work):
    """Writes a row of a step without a bench file. checked: a dtype and the pairs to compare first."""
    what = f"{op}, {version}"

    def go():
        measure = Measure(window, what)
        if checked:
            measure.check(*checked)
        measure(
            step,
            op=op,
            version=version,
            shape=shape,
            device="cuda" if torch.cuda.is_available() else "cpu",
            before=ready,
            inputs=inputs,
            **work,
        )

    if window.wants(what):
        window.attempt(what, go)
