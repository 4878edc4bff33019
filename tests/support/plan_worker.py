"""Memory of one DeepSpeed engine over a stack of linear layers: plan_worker.py OUT LAYERS STAGE
PRECISION OFFLOAD.

Writes {phase: [peak, end]} in bytes above what was resident before, of rank 0: resident memory, with the C
library told to hand large blocks back at once.
"""

import contextlib
import ctypes
import gc
import json
import sys

import torch

from saferlhf_fast.config.stages import Engine, Optimizer
from saferlhf_fast.runtime import engine

WIDTH = 1024
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Net(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.float().sum()


def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def main(out, layers, stage, precision, offload):
    libc = ctypes.CDLL(None)
    for what in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        assert libc.mallopt(what, 65536) == 1
    cfg = Engine(zero_stage=int(stage), precision=precision, offload_optimizer=offload == "1", threads=1)
    engine.start(cfg, 0)
    # imports, and what libraries keep
    toy = engine.Engine(torch.nn.Linear(WIDTH, WIDTH), Optimizer(), cfg, 10)
    toy.backward(toy(torch.ones(4, WIDTH, dtype=engine.precision(cfg))).float().sum())
    toy.step()
    gc.collect()
    before, found = resident("VmRSS"), {}

    @contextlib.contextmanager
    def phase(name):
        libc.malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        yield
        found[name] = [resident("VmHWM") - before, resident("VmRSS") - before]

    with phase("load"):
        model = engine.Engine(Net(int(layers)), Optimizer(), cfg, 10)
    for _ in range(2):  # the second step finds the optimiser's states there
        for k in range(2):
            with phase(f"forward {k}"):
                loss = model(torch.ones(4, WIDTH, dtype=engine.precision(cfg)) / WIDTH)
            with phase(f"backward {k}"):
                model.backward(loss)
        del loss
        with phase("step"):
            model.step()
    if engine.rank() == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    engine.finish()


main(*sys.argv[1:])
