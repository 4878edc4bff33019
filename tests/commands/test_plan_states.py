"""What the plan says of weights, gradients and optimiser states, against resident memory under DeepSpeed on
this CPU.
"""

import json

import forked
import kit
import pytest

from saferlhf_fast.commands.plan import zero_memory
from saferlhf_fast.commands.plan.sizes import Count
from saferlhf_fast.config.stages import Engine, Optimizer
from saferlhf_fast.runtime import deepspeed_config

LAYERS, WIDTH = 16, 1024
WEIGHTS = LAYERS * WIDTH * WIDTH
SIZES = Count(WEIGHTS, WEIGHTS, WIDTH * WIDTH, 0, 0)


def measured(tmp_path, processes, stage, precision, offload=0):
    out = tmp_path / "out.json"
    worker = [kit.SUPPORT / "plan_worker.py", out, LAYERS, stage, precision, offload]
    done = forked.run(worker, processes, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def planned(processes, stage, precision, offload=0):
    cfg = Engine(zero_stage=stage, precision=precision, offload_optimizer=bool(offload))
    zero = zero_memory.zero_settings(deepspeed_config.settings(cfg, Optimizer()))
    return zero_memory.trained(SIZES, 4 if precision == "fp32" else 2, zero, processes, on_cpu=True)


def compare(tmp_path, processes, stage, precision, offload=0):
    real, plan = (
        measured(tmp_path, processes, stage, precision, offload),
        planned(processes, stage, precision, offload),
    )
    resident = plan.resident + plan.host
    until_step = 0 if plan.sharded else plan.gradients + plan.bucket
    passing = plan.gathered + max(plan.backward, plan.epilogue - plan.gathered)
    said = {
        "resident": (resident, real["step"][1]),
        "step": (resident + until_step + plan.step, real["step"][0]),
        "backward": (resident + until_step + passing, real["backward 1"][0]),
    }
    for name, (expected, got) in said.items():
        assert expected == pytest.approx(got, rel=0.12), (name, expected / WEIGHTS, got / WEIGHTS)


@pytest.mark.parametrize("stage, precision", [(0, "bf16"), (2, "fp32")])
def test_one_process(tmp_path, stage, precision):
    compare(tmp_path, 1, stage, precision)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "stage, precision, offload",
    [
        (0, "fp32", 0),
        (0, "bf16", 0),
        (1, "fp32", 0),
        (1, "bf16", 0),
        (2, "fp32", 0),
        (2, "bf16", 0),
        (3, "fp32", 0),
        (3, "bf16", 0),
        (1, "bf16", 1),
        (2, "bf16", 1),
        (2, "fp32", 1),
        (3, "bf16", 1),
    ],
)
def test_every_stage(tmp_path, processes, stage, precision, offload):
    compare(tmp_path, processes, stage, precision, offload)


def test_bytes_of_a_parameter_are_those_of_the_table():
    table = {
        0: {"fp32": 4 + 4 + 8, "bf16": 2 + 2 + 4 + 8},
        1: {"fp32": 4 + 4 + 12 / 8, "bf16": 2 + 2 + 12 / 8},
        2: {"fp32": 4 + 16 / 8, "bf16": 2 + 14 / 8},
        3: {"fp32": 20 / 8, "bf16": 16 / 8},
    }
    for stage, row in table.items():
        for precision, expected in row.items():
            plan = planned(8, stage, precision)
            total = plan.weights + plan.gradients + plan.optimizer
            assert total / WEIGHTS == pytest.approx(expected, rel=1e-3), (stage, precision)


def test_a_gpu_pays_for_the_whole_bucket():
    cfg = Engine(zero_stage=2, precision="bf16", config={"zero_optimization": {"reduce_bucket_size": 1000}})
    for config, elements in ((cfg, 1000), (Engine(zero_stage=2, precision="bf16"), 500_000_000)):
        zero = zero_memory.zero_settings(deepspeed_config.settings(config, Optimizer()))
        assert zero_memory.trained(SIZES, 2, zero, 8).backward >= 2 * elements


def test_frozen_models_are_sharded_by_zero_3_alone():
    for stage, expected in ((0, 1.0), (2, 1.0), (3, 1 / 8)):
        zero = zero_memory.zero_settings({"zero_optimization": {"stage": stage}})
        assert zero_memory.frozen(SIZES, 2, zero, 8).weights == pytest.approx(
            2 * WEIGHTS * expected, rel=1e-6
        )
    small = SIZES._replace(small=WEIGHTS // 2)
    assert zero_memory.frozen(small, 2, zero, 8).weights == pytest.approx(
        2 * WEIGHTS * (1 / 8 + 1 / 2), rel=1e-6
    )


def test_offload_moves_states_to_the_host():
    for stage in (1, 2, 3):
        here, there = (planned(8, stage, "bf16", offload) for offload in (0, 1))
        assert here.host == 0 and there.optimizer == 0
        assert there.host >= here.optimizer and there.resident < here.resident


@pytest.mark.parametrize("kind, per_weight", [("adamw", 8), ("adamw-8bit", 2.03), ("adafactor", 0.02)])
def test_optimisers_remember_what_they_remember(kind, per_weight):
    zero = zero_memory.zero_settings({"zero_optimization": {"stage": 0}})
    plan = zero_memory.trained(SIZES, 4, zero, 1, kind)
    assert plan.optimizer == pytest.approx(per_weight * WEIGHTS, rel=1e-6)


def test_what_a_real_optimiser_remembers_is_what_the_table_says():
    import optimizer_worker
    import torch

    from saferlhf_fast.runtime import optimizers

    net = torch.nn.Linear(512, 512, bias=False)
    for kind, per_weight in zero_memory.MOMENTS.items():
        if kind == "adamw-8bit" and not pytest.importorskip(
            "bitsandbytes", reason="bitsandbytes is not installed"
        ):
            continue
        optimizer = optimizers.build(net, Optimizer(kind=kind), 0)
        net.weight.grad = torch.randn_like(net.weight)
        optimizer.step()
        found = optimizer_worker.state_bytes(optimizer) / net.weight.numel()
        assert found == pytest.approx(per_weight, rel=0.02, abs=0.015), kind
