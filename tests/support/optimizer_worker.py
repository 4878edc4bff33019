"""Run by test_optimizers.py in one or two processes: each optimiser, ZeRO stage, precision and offload.

Writes {"kind/stage/precision/offload": the result of `run`, "decay/kind/stage": the same with gradients of
zero, "end/stage/offload": the result of `end_of_a_run`}. Offload is "states", "weights" or "both". Two
processes run only a part of this.
"""

import importlib.util
import json
import os
import sys

import torch

from saferlhf_fast.config.stages import Engine, Optimizer
from saferlhf_fast.runtime import engine

STAGES = {"adamw": (0, 1, 2, 3), "adamw-8bit": (0, 1, 2, 3), "adafactor": (0,)}
OFFLOADS = {0: (), 1: ("states",), 2: ("states",), 3: ("states", "weights", "both")}


def net():
    """Two matrices of more than 4096 elements, in sizes that 256 does not divide, and their biases."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(63, 255), torch.nn.Tanh(), torch.nn.Linear(255, 65))


def config(stage, precision, offload):
    return Engine(
        zero_stage=stage,
        precision=precision,
        offload_optimizer=offload in ("states", "both"),
        offload_parameters=offload in ("weights", "both"),
    )


def optimizer(kind):
    return Optimizer(kind=kind, learning_rate=4e-3, weight_decay=0.5, warmup_ratio=0.2)


def batch():
    """This rank's share of the one global batch."""
    data = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 63, generator=data), torch.randn(20, 65, generator=data)
    return [t[engine.rank() :: engine.world_size()] for t in (x, y)]


def run(kind, stage, precision, offload, zero=False):
    """Trains four steps.

    Returns losses, gradient norms, learning rates, mean magnitudes of matrices and of biases (before and
    after), the bytes of the optimiser's state on this rank and the steps that it has counted. zero: the
    gradients are zero, so that weights only decay.
    """
    cfg = config(stage, precision, offload)
    trained = engine.Engine(net(), optimizer(kind), cfg, 10)
    out = {"loss": [], "grad_norm": [], "lr": [], "weights": [magnitudes(trained)]}
    x, y = batch()
    for _ in range(4):
        total = torch.zeros(())
        for a, b in zip(x.chunk(2), y.chunk(2)):
            loss = (trained(a.to(engine.precision(cfg))).float() - b).square().sum() / (20 * 65)
            total += loss.detach()
            trained.backward(0 * loss if zero else loss)
        values = trained.step()
        out["loss"].append(engine.all_reduce(total).item())
        out["grad_norm"].append(float(values["grad_norm"]))
        out["lr"].append(values["lr"])
    out["weights"].append(magnitudes(trained))
    inner, wrapper = trained.deepspeed.basic_optimizer, trained.deepspeed.optimizer
    out["counted"] = sorted({float(state["step"]) for state in inner.state.values()})
    flags = {
        name: bool(getattr(wrapper, name, False))
        for name in ("cpu_offload", "offload_optimizer", "offload_param")
    }
    return {**out, **flags, "bytes": state_bytes(inner), "class": type(inner).__name__}


def state_bytes(optimizer):
    """Bytes of the tensors in an optimiser's state, each counted once (bitsandbytes shares its tables)."""
    tensors = {
        id(value): value
        for state in optimizer.state.values()
        for value in state.values()
        if hasattr(value, "numel")
    }
    return sum(value.numel() * value.element_size() for value in tensors.values())


def magnitudes(trained):
    """Mean magnitude of the gathered matrices and of the gathered biases."""
    with trained.gathered():
        weights = [p.detach().double().cpu() for p in trained.module.parameters()]
    return [
        torch.cat([p.abs().flatten() for p in weights if (p.dim() > 1) == matrix]).mean().item()
        for matrix in (True, False)
    ]


def end_of_a_run(stage, offload):
    """Reads and restores weights, runs a frozen model, and takes a step that is not finite."""
    cfg = config(stage, "fp32", offload)
    trained = engine.Engine(net(), optimizer("adamw"), cfg, 10)
    x, y = batch()
    states = [trained.state_dict()]
    trained.backward((trained(x) - y).square().mean())
    trained.step()
    states.append(trained.state_dict())
    trained.load_state_dict(states[0])
    states.append(trained.state_dict())
    with torch.no_grad():
        answers = (trained(x) - net()(x)).abs().max().item()
    frozen = (engine.Frozen(net(), cfg)(x) - net()(x)).abs().max().item()
    trained.backward((trained(x) * float("nan")).mean())
    trained.step()
    states.append(trained.state_dict())
    if engine.rank():
        return None

    def distance(i):
        return max((states[0][name] - states[i][name]).abs().max().item() for name in states[0])

    return {
        "moved": distance(1),
        "back": distance(2),
        "after_nan": distance(3),
        "answers": answers,
        "frozen": frozen,
        "skipped": trained.skipped_steps,
    }


def everything(alone):
    out = {}
    for kind, stages in STAGES.items():
        if kind == "adamw-8bit" and not importlib.util.find_spec("bitsandbytes"):
            continue
        if kind == "adafactor" and not alone:
            continue
        for stage in stages:
            for precision in ("fp32", "bf16"):
                if alone or precision == "fp32" or stage in (0, 3):
                    for offload in (
                        "",
                        *(OFFLOADS[stage] if kind == "adamw" or (alone and stage == 2) else ()),
                    ):
                        out[f"{kind}/{stage}/{precision}/{offload}"] = run(kind, stage, precision, offload)
            if alone:
                out[f"decay/{kind}/{stage}"] = run(kind, stage, "fp32", "", zero=True)
    for stage, offloads in OFFLOADS.items():
        for offload in offloads if alone else offloads[2:]:
            out[f"end/{stage}/{offload}"] = end_of_a_run(stage, offload)
    return out


if __name__ == "__main__":
    engine.start(Engine(precision="fp32"), 0)
    results = everything(engine.world_size() == 1)
    if engine.rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    engine.finish()
    os._exit(0)  # the results are written; the end of gloo's threads is not tested here
