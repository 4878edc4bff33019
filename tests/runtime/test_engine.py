"""The engine: the split of a global batch into micro-batches, ranks and ZeRO stages changes no gradient."""

import json
import math

import forked
import kit
import pytest

from saferlhf_fast.config.stages import Engine, Optimizer
from saferlhf_fast.errors import UserError

pytestmark = pytest.mark.numeric


def launch(tmp_path, processes, precision="fp32"):
    out = tmp_path / f"{processes}-{precision}.json"
    completed = forked.run([kit.SUPPORT / "engine_worker.py", out, precision], processes, timeout=200)
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    return {n: launch(folder, n) for n in (1, 2)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_micro_batches_processes_and_zero_stage_change_no_number(results, stage):
    expected = results[1]["runs"]["0/1"]
    for processes in (1, 2):
        for micro_batches in (1, 2, 5):
            rows = results[processes]["runs"][f"{stage}/{micro_batches}"]
            numbers, expected_numbers = ([x for row in table for x in row] for table in (rows, expected))
            assert len(numbers) == len(expected_numbers)
            for a, b in zip(numbers, expected_numbers):
                assert math.isclose(a, b, rel_tol=2e-5), (processes, micro_batches, rows, expected)


def test_gather_keeps_the_global_order(results):
    assert results[1]["gathered"] == results[2]["gathered"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_the_first_step_has_a_learning_rate_above_zero():
    from saferlhf_fast.runtime.deepspeed_config import learning_rate_factor

    factor = learning_rate_factor(Optimizer(schedule="cosine", warmup_ratio=0.1), 100)
    assert factor(0) == pytest.approx(0.1) and factor(9) == 1.0 and factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.5) and factor(100) == pytest.approx(0.0, abs=1e-9)
    constant = learning_rate_factor(Optimizer(schedule="constant", warmup_ratio=0.0), 100)
    assert constant(0) == constant(99) == 1.0


def test_fp16_without_a_gpu_is_refused():
    import torch

    from saferlhf_fast.runtime import engine

    if torch.cuda.is_available():
        pytest.skip("there is a GPU, where fp16 works")
    with pytest.raises(UserError, match=r"engine\.precision: expected fp32 or bf16 without a GPU"):
        engine.Engine(torch.nn.Linear(2, 2), Optimizer(), Engine(precision="fp16"), 1)
