"""Run by test_engine.py in one or two processes: three steps for each ZeRO stage and micro-batch count."""

import json
import os
import sys

import torch

from saferlhf_fast.config.stages import Engine, Optimizer
from saferlhf_fast.runtime import engine

STAGES, MICRO_BATCHES = (0, 1, 2, 3), (1, 2, 5)


def run(stage, micro_batches, precision):
    cfg = Engine(zero_stage=stage, precision=precision)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    trained = engine.Engine(
        net, Optimizer(learning_rate=1e-2, warmup_ratio=0.0, schedule="constant"), cfg, 10
    )
    data = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(3):
        x, y = torch.randn(20, 8, generator=data), torch.randn(20, 1, generator=data)
        x, y = (t[engine.rank() :: engine.world_size()] for t in (x, y))
        total = torch.zeros(())
        for a, b in zip(x.chunk(micro_batches), y.chunk(micro_batches)):
            loss = (trained(a.to(engine.precision(cfg))).float() - b).square().sum() / 20
            total += loss.detach()
            trained.backward(loss)
        rows.append([engine.all_reduce(total).item(), float(trained.step()["grad_norm"])])
    state = trained.state_dict()
    return rows + [[v.float().abs().sum().item() for v in state.values()]] if state is not None else None


if __name__ == "__main__":
    engine.start(Engine(precision="fp32"), 0)
    out = {f"{s}/{m}": run(s, m, sys.argv[2]) for s in STAGES for m in MICRO_BATCHES}
    own_places = list(range(5))[engine.rank() :: engine.world_size()]
    gathered = engine.all_gather(torch.tensor(own_places, dtype=torch.float32), own_places, 5).tolist()
    if engine.rank() == 0:
        json.dump({"runs": out, "gathered": gathered}, open(sys.argv[1], "w"))
    engine.finish()
    os._exit(0)  # the results are written; the end of gloo's threads is not tested here
