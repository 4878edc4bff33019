"""Commands in two processes give the losses of one process with the same global batch (fp32).

test_matrix.py compares the losses of every stage under every other setting.
"""

import kit
import pytest

pytestmark = pytest.mark.numeric

STEPS = "train.max_steps=3"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, data, and reward and cost models on its backbone."""
    folder = tmp_path_factory.mktemp("two")
    data = kit.make_data(folder / "data", n=22)
    base = kit.make_model(folder / "model")
    return base, data, kit.make_scores(folder, base)


def assert_close(a, b, tolerance=2e-5):
    assert len(a) == len(b) and a, (a, b)
    assert all(abs(x - y) <= tolerance * max(1.0, abs(x)) for x, y in zip(a, b)), (a, b)


@pytest.mark.parametrize(
    "stage, key, zero",
    [
        ("reward", "pairs", 3),
        *(
            pytest.param(*cell, marks=pytest.mark.matrix)
            for cell in (
                ("sft", "sft", 0),
                ("sft", "sft", 3),
                ("reward", "pairs", 0),
                ("cost", "pairs", 0),
                ("dpo", "pairs", 0),
            )
        ),
    ],
)
def test_supervised_losses_equal_those_of_one_process(world, tmp_path, stage, key, zero):
    """Through torchrun and the command line."""
    base, data, _ = world
    common = [
        stage,
        f"model={base}",
        f"data={data[key]}",
        STEPS,
        "optim.learning_rate=1e-3",
        "log.progress=false",
        "train.eval_fraction=0.2",
    ]
    assert kit.main(*common, f"output={tmp_path / 'one'}", "train.batch_size=6") == 0
    two = kit.command(
        *common,
        f"output={tmp_path / 'two'}",
        "train.batch_size=3",
        f"engine.zero_stage={zero}",
        processes=2,
        fresh=True,
    )
    assert two.returncode == 0, two.stderr[-3000:]
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert_close(kit.losses(tmp_path / "one", name), kit.losses(tmp_path / "two", name))


def test_ppo_lag_runs_in_two_processes(world, tmp_path):
    base, data, scores = world
    completed = kit.command(
        "ppo-lag",
        f"model={base}",
        f"reward={scores['reward']}",
        f"cost={scores['cost']}",
        f"data={data['prompts']}",
        f"ptx={data['sft']}",
        f"output={tmp_path / 'lag'}",
        "max_length=32",
        "ppo.batch_size=3",
        "ppo.micro_batch_size=2",
        "ppo.max_steps=2",
        "engine.zero_stage=3",
        processes=2,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert len(kit.losses(tmp_path / "lag", "train/actor_loss")) == 2
    assert (tmp_path / "lag" / "model" / "model.safetensors").exists()
