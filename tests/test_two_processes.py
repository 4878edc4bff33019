"""Every stage in two processes gives the losses of one process with the same global batch (fp32)."""

import json
import subprocess
import sys

import kit
import pytest

STEPS = "train.max_steps=3"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, data, and reward and cost models trained for three steps in one process."""
    folder = tmp_path_factory.mktemp("two")
    data = kit.make_data(folder / "data", n=22)
    base = kit.make_model(folder / "model")
    for kind in ("reward", "cost"):
        done = kit.command(kind, f"model={base}", f"data={data['pairs']}", f"output={folder / kind}", STEPS,
                           "train.batch_size=6")
        assert done.returncode == 0, done.stderr[-3000:]
    return folder, base, data


def close(a, b, tolerance=2e-5):
    assert len(a) == len(b) and a, (a, b)
    assert all(abs(x - y) <= tolerance * max(1.0, abs(x)) for x, y in zip(a, b)), (a, b)


@pytest.mark.parametrize("stage, key", [("sft", "sft"), ("reward", "pairs"), ("cost", "pairs"), ("dpo", "pairs")])
@pytest.mark.parametrize("zero", [0, 3])
def test_supervised(world, tmp_path, stage, key, zero):
    folder, base, data = world
    if zero and stage in ("cost", "dpo"):
        pytest.skip("ZeRO-3 is shared with sft and reward; the full product is the next issues' matrix")
    common = [stage, f"model={base}", f"data={data[key]}", STEPS, "optim.learning_rate=1e-3", "log.progress=false",
              "train.eval_fraction=0.2"]
    one = kit.command(*common, f"output={tmp_path / 'one'}", "train.batch_size=6")
    two = kit.command(*common, f"output={tmp_path / 'two'}", "train.batch_size=3", f"engine.zero_stage={zero}",
                      processes=2)
    assert one.returncode == 0, one.stderr[-3000:]
    assert two.returncode == 0, two.stderr[-3000:]
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        close(kit.losses(tmp_path / "one", name), kit.losses(tmp_path / "two", name))


@pytest.mark.parametrize(("zero", "ppo"), [
    (0, {"micro_batch_size": 2, "whiten": True, "epochs": 2}), (2, {"micro_tokens": 9}), (3, {"micro_tokens": 20}),
    (3, {"micro_tokens": 20, "minibatches": 2, "reduction": "token-mean"})])
def test_ppo_lag_on_the_same_rollouts(world, tmp_path, zero, ppo):
    """Rollouts are stored once; scoring, advantages, λ and updates then run in one and in two processes. Passes of few
    tokens leave a rank without sequences in some of them, which it joins all the same."""
    folder, base, _ = world
    results = []
    for processes, stage in ((1, 0), (2, zero)):
        out = tmp_path / f"{processes}.json"
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([*start, str(kit.ROOT / "tests" / "ppo_worker.py"), base, str(folder), str(out), str(stage),
                               json.dumps(ppo)],
                              capture_output=True, text=True, timeout=200,
                              env={**kit.os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{kit.ROOT}:{kit.ROOT}/tests"})
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
    one, two = results
    assert [sorted(step) for step in one] == [sorted(step) for step in two]
    for a, b in zip(one, two):
        close([a[k] for k in sorted(a)], [b[k] for k in sorted(b)], 1e-4)


def test_ppo_lag_runs_in_two_processes(world, tmp_path):
    folder, base, data = world
    done = kit.command("ppo-lag", f"model={base}", f"reward={folder}/reward/model", f"cost={folder}/cost/model",
                       f"data={data['prompts']}", f"ptx={data['sft']}", f"output={tmp_path / 'lag'}", "max_length=32",
                       "ppo.batch_size=3", "ppo.micro_batch_size=2", "ppo.max_steps=2", "engine.zero_stage=3",
                       processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(kit.losses(tmp_path / "lag", "train/actor_loss")) == 2
    assert (tmp_path / "lag" / "model" / "model.safetensors").exists()
