"""Each kind of optimiser in the Engine learns, decays, follows the schedule and has the documented size.

CPU offload changes no number. optimizer_worker.py runs the steps in one and in two processes.
"""

import importlib.util
import json
import math
import sys

import forked
import kit
import pytest
import torch

from saferlhf_fast.config import checks
from saferlhf_fast.config.stages import Optimizer
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import optimizers

pytestmark = pytest.mark.numeric

STAGES = {"adamw": (0, 1, 2, 3), "adamw-8bit": (0, 1, 2, 3), "adafactor": (0,)}
CASES = [(kind, stage) for kind, stages in STAGES.items() for stage in stages]
OFFLOADS = [(1, "states"), (2, "states"), (3, "states"), (3, "weights"), (3, "both")]
WEIGHTS = 63 * 255 + 255 + 255 * 65 + 65


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{processes: the results of optimizer_worker.py}"""
    return {n: launch(tmp_path_factory.mktemp("optimizers") / f"{n}.json", n) for n in (1, 2)}


def launch(out, processes):
    completed = forked.run([kit.SUPPORT / "optimizer_worker.py", out], processes)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "untested optimizer" not in completed.stdout + completed.stderr
    return json.loads(out.read_text())


def needs_package(kind="adamw-8bit"):
    # importing it here would take seconds
    if kind == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'saferlhf-fast[8bit]'")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind, stage", CASES)
def test_each_optimizer_lowers_the_loss_and_follows_the_schedule(results, kind, stage, precision):
    needs_package(kind)
    result = results[1][f"{kind}/{stage}/{precision}/"]
    assert result["class"] == {"adamw": "AdamW", "adamw-8bit": "AdamW8bit", "adafactor": "Adafactor"}[kind]
    assert (
        result["loss"] == sorted(result["loss"], reverse=True)
        and result["loss"][-1] < 0.6 * result["loss"][0]
    )
    assert result["lr"] == pytest.approx([0.002, 0.004, 0.004, 0.004 * 0.5 * (1 + math.cos(math.pi / 8))])


@pytest.mark.parametrize("kind, stage", CASES)
def test_processes_and_zero_stage_change_losses_only_within_tolerance(results, kind, stage):
    """The 8-bit optimiser gets a wider tolerance, since its blocks begin elsewhere in each ZeRO stage."""
    needs_package(kind)
    expected = results[1][f"{kind}/0/fp32/"]
    for result in (results[n][f"{kind}/{stage}/fp32/"] for n in ((1,) if kind == "adafactor" else (1, 2))):
        for name in ("loss", "grad_norm"):
            assert result[name] == pytest.approx(expected[name], rel=2e-3 if kind == "adamw-8bit" else 2e-5)


def test_adamw_8bit_stays_close_to_adamw(results):
    needs_package()
    for stage in STAGES["adamw"]:
        for precision in ("fp32", "bf16"):
            wide, narrow = (results[1][f"{kind}/{stage}/{precision}/"] for kind in ("adamw", "adamw-8bit"))
            assert narrow["loss"] == pytest.approx(wide["loss"], rel=5e-3)
            assert narrow["loss"] != wide["loss"]


@pytest.mark.parametrize("kind, stage", CASES)
def test_only_matrices_decay_and_the_decay_follows_the_schedule(results, kind, stage):
    needs_package(kind)
    result = results[1][f"decay/{kind}/{stage}"]
    (matrices, biases), after = result["weights"]
    factor = math.prod(1 - rate * 0.5 for rate in result["lr"])
    assert after == pytest.approx([matrices * factor, biases], rel=1e-6)
    assert factor < 0.995


@pytest.mark.parametrize("kind, stage", CASES)
def test_the_optimizer_counts_only_the_steps_of_training(results, kind, stage):
    """A step of DeepSpeed itself on gradients of zero once made the first steps too small (ZeRO-0, bf16)."""
    needs_package(kind)
    for precision in ("fp32", "bf16"):
        assert results[1][f"{kind}/{stage}/{precision}/"]["counted"] == [4.0]
    bf16, fp32 = (results[1][f"{kind}/{stage}/{precision}/"]["loss"] for precision in ("bf16", "fp32"))
    assert bf16 == pytest.approx(fp32, rel=4e-3)


def test_optimizer_states_have_the_documented_size(results):
    for processes, stages in ((1, (0, 1, 2, 3)), (2, (1, 2, 3))):
        for stage in stages:
            wide = results[processes][f"adamw/{stage}/fp32/"]["bytes"]
            assert wide == pytest.approx(8 * WEIGHTS / processes, rel=2e-3)
    tiny = results[1]["adafactor/0/fp32/"]["bytes"]
    assert tiny < 0.02 * results[1]["adamw/0/fp32/"]["bytes"]
    needs_package()
    for processes in (1, 2):
        for stage in (0, 1, 2, 3):
            wide, narrow = (
                results[processes][f"{kind}/{stage}/fp32/"]["bytes"] for kind in ("adamw", "adamw-8bit")
            )
            # 2.03 bytes instead of 8, and two tables of 256 numbers, which are counted too
            assert narrow < 0.28 * wide


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage, offload", OFFLOADS)
def test_offload_changes_no_number(results, processes, stage, offload):
    for precision in ("fp32", "bf16") if processes == 1 or stage == 3 else ("fp32",):
        plain, offloaded = (
            results[processes][f"adamw/{stage}/{precision}/{where}"] for where in ("", offload)
        )
        assert offloaded["lr"] == plain["lr"] and offloaded["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert offloaded["grad_norm"] == pytest.approx(
            plain["grad_norm"], rel=1e-6
        )  # the sum has another order
        assert offloaded["weights"][1] == pytest.approx(plain["weights"][1], rel=1e-6)
        assert (offloaded["cpu_offload"] or offloaded["offload_optimizer"]) == (offload != "weights")
        assert offloaded["offload_param"] == (offload != "states")
        assert not any(plain[name] for name in ("cpu_offload", "offload_optimizer", "offload_param"))


def test_offload_of_adamw_8bit_changes_no_number(results):
    needs_package()
    for precision in ("fp32", "bf16"):
        plain, offloaded = (results[1][f"adamw-8bit/2/{precision}/{where}"] for where in ("", "states"))
        assert (
            offloaded["cpu_offload"]
            and offloaded["loss"] == plain["loss"]
            and offloaded["bytes"] == plain["bytes"]
        )


@pytest.mark.parametrize("processes", [1, 2])
def test_offloaded_weights_can_be_read_and_replaced(results, processes):
    ends = {key: value for key, value in results[processes].items() if key.startswith("end/")}
    assert len(ends) == (5 if processes == 1 else 1)
    for result in ends.values():
        assert result["moved"] > 1e-3 and result["back"] == 0.0
        assert result["answers"] < 1e-6 and result["frozen"] < 1e-6
        assert result["skipped"] == 1 and result["after_nan"] == 0.0


def test_adafactor_under_zero_and_a_missing_bitsandbytes_are_refused(monkeypatch):
    net = torch.nn.Linear(3, 2)
    for stage in (1, 2, 3):
        with pytest.raises(
            UserError, match=rf"optim\.kind: adafactor needs engine\.zero_stage 0, got {stage}: .*factor"
        ):
            optimizers.build(net, Optimizer(kind="adafactor"), stage)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"^critic_optim\.kind: .* pip install 'saferlhf-fast\[8bit\]'$"):
        checks.check_optimizer(Optimizer(kind="adamw-8bit"), 0, "critic_optim")
    with pytest.raises(UserError, match="pip install"):
        optimizers.build(net, Optimizer(kind="adamw-8bit"), 0)


def test_frozen_weights_are_in_no_parameter_group():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    net[0].requires_grad_(False)
    groups = optimizers.build(net, Optimizer(weight_decay=0.1), 0).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (1, 0.0)]
    assert groups[0]["params"][0] is net[1].weight and groups[1]["params"][0] is net[1].bias
