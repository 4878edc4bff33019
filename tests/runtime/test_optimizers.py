"""The kinds of optimiser through our Engine: they learn, decay, follow the schedule and are as small as they
say; and CPU offload changes no number. One and two processes; see optimizer_worker.py for what runs.
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
    """{processes: what optimizer_worker.py has written}"""
    return {n: launch(tmp_path_factory.mktemp("optimizers") / f"{n}.json", n) for n in (1, 2)}


def launch(out, processes):
    done = forked.run([kit.SUPPORT / "optimizer_worker.py", out], processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "untested optimizer" not in done.stdout + done.stderr
    return json.loads(out.read_text())


def needs_package(kind="adamw-8bit"):
    # importing it here would take seconds
    if kind == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'saferlhf-fast[8bit]'")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind, stage", CASES)
def test_each_optimizer_lowers_the_loss_and_follows_the_schedule(results, kind, stage, precision):
    needs_package(kind)
    got = results[1][f"{kind}/{stage}/{precision}/"]
    assert got["class"] == {"adamw": "AdamW", "adamw-8bit": "AdamW8bit", "adafactor": "Adafactor"}[kind]
    assert got["loss"] == sorted(got["loss"], reverse=True) and got["loss"][-1] < 0.6 * got["loss"][0]
    assert got["lr"] == pytest.approx([0.002, 0.004, 0.004, 0.004 * 0.5 * (1 + math.cos(math.pi / 8))])


@pytest.mark.parametrize("kind, stage", CASES)
def test_processes_and_zero_stage_change_losses_only_within_tolerance(results, kind, stage):
    """The same losses in two processes and in every ZeRO stage; the blocks of 8 bits lie elsewhere in
    each.
    """
    needs_package(kind)
    expected = results[1][f"{kind}/0/fp32/"]
    for got in (results[n][f"{kind}/{stage}/fp32/"] for n in ((1,) if kind == "adafactor" else (1, 2))):
        for name in ("loss", "grad_norm"):
            assert got[name] == pytest.approx(expected[name], rel=2e-3 if kind == "adamw-8bit" else 2e-5)


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
    got = results[1][f"decay/{kind}/{stage}"]
    (matrices, biases), after = got["weights"]
    kept = math.prod(1 - rate * 0.5 for rate in got["lr"])
    assert after == pytest.approx([matrices * kept, biases], rel=1e-6)
    assert kept < 0.995


@pytest.mark.parametrize("kind, stage", CASES)
def test_the_optimizer_counts_only_the_steps_of_training(results, kind, stage):
    """DeepSpeed's own, on gradients of zero, made the first ones too small in ZeRO-0 and bf16."""
    needs_package(kind)
    for precision in ("fp32", "bf16"):
        assert results[1][f"{kind}/{stage}/{precision}/"]["counted"] == [4.0]
    low, whole = (results[1][f"{kind}/{stage}/{precision}/"]["loss"] for precision in ("bf16", "fp32"))
    assert low == pytest.approx(whole, rel=4e-3)


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
            # 2.03 of 8, and two tables of 256 numbers, which count here
            assert narrow < 0.28 * wide


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage, offload", OFFLOADS)
def test_offload_changes_no_number(results, processes, stage, offload):
    for precision in ("fp32", "bf16") if processes == 1 or stage == 3 else ("fp32",):
        whole, off = (results[processes][f"adamw/{stage}/{precision}/{where}"] for where in ("", offload))
        assert off["lr"] == whole["lr"] and off["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert off["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-6)  # added up in another order
        assert off["weights"][1] == pytest.approx(whole["weights"][1], rel=1e-6)
        assert (off["cpu_offload"] or off["offload_optimizer"]) == (offload != "weights")
        assert off["offload_param"] == (offload != "states")
        assert not any(whole[name] for name in ("cpu_offload", "offload_optimizer", "offload_param"))


def test_offload_of_adamw_8bit_changes_no_number(results):
    needs_package()
    for precision in ("fp32", "bf16"):
        whole, off = (results[1][f"adamw-8bit/2/{precision}/{where}"] for where in ("", "states"))
        assert off["cpu_offload"] and off["loss"] == whole["loss"] and off["bytes"] == whole["bytes"]


@pytest.mark.parametrize("processes", [1, 2])
def test_offloaded_weights_can_be_read_and_replaced(results, processes):
    ends = {key: value for key, value in results[processes].items() if key.startswith("end/")}
    assert len(ends) == (5 if processes == 1 else 1)
    for got in ends.values():
        assert got["moved"] > 1e-3 and got["back"] == 0.0
        assert got["answers"] < 1e-6 and got["frozen"] < 1e-6
        assert got["skipped"] == 1 and got["after_nan"] == 0.0


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
