"""metrics.jsonl is valid JSON, only the named trackers are used, and only rank 0 writes."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from saferlhf_fast.config.checks import check_trackers
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime.metrics import Metrics, to_numbers


def cfg(*trackers):
    return SimpleNamespace(trackers=list(trackers), project="p")


def lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not valid JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_each_step_is_written_at_once_as_one_line_of_valid_json(tmp_path):
    metrics = Metrics(tmp_path, cfg(), {}, "sft")
    metrics.log(1, {"train/loss": torch.tensor(1.5), "train/lr": 2e-5})
    assert lines(tmp_path)[0]["train/loss"] == 1.5  # readable before the run ends
    metrics.log(2, {"train/loss": torch.tensor(math.nan), "train/cost": -math.inf, "train/lr": 1e-5})
    metrics.close()
    first, second = lines(tmp_path)
    assert first["step"] == 1 and first["time"] >= 0 and "nonfinite" not in first
    assert second["train/loss"] is None and second["train/cost"] is None and second["train/lr"] == 1e-5
    assert second["nonfinite"] == ["train/loss", "train/cost"]
    assert second["time"] >= first["time"]


def test_numbers_keep_order_and_precision():
    numbers = to_numbers(
        {
            "a": torch.tensor(2**24 + 1),
            "b": 3,
            "c": torch.tensor(0.1, dtype=torch.float64),
            "d": torch.tensor(True),
            "e": True,
            "f": torch.tensor(1.5, dtype=torch.bfloat16),
        }
    )
    assert list(numbers) == list("abcdef")
    assert list(numbers.values()) == [2**24 + 1, 3, 0.1, 1, 1, 1.5]


@pytest.mark.parametrize(
    "value, kind", [(torch.zeros(2), r"shape \[2\]"), ("1.0", "str"), (None, "NoneType")]
)
def test_a_value_that_is_no_number_is_refused_by_name(value, kind):
    with pytest.raises(ValueError, match=f"train/x: expected a number or a 0-d tensor, got .*{kind}"):
        to_numbers({"train/x": value})


def test_all_tensors_are_read_with_one_call(monkeypatch):
    reads = []
    for name in ("tolist", "item"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real: (reads.append(1), real(self))[1])
    to_numbers({str(i): torch.tensor(float(i)) for i in range(20)})
    assert len(reads) == 1


def test_tensorboard_has_the_scalars(tmp_path):
    metrics = Metrics(tmp_path, cfg("tensorboard"), {"seed": 1}, "sft")
    for step in (1, 2):
        metrics.log(step, {"train/loss": 1 / step})
    metrics.close()
    metrics.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [e.value for e in events.Scalars("train/step")] == [1.0, 2.0]


def test_without_tensorboard_its_folder_is_not_made(tmp_path):
    Metrics(tmp_path, cfg(), {}, "sft").close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_ranks_other_than_0_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    metrics = Metrics(tmp_path / "run", cfg("tensorboard"), {}, "sft")
    metrics.log(1, {"train/loss": 1.0})
    metrics.close()
    assert not (tmp_path / "run").exists()


FAKE = """
calls = []
def init(**kw):
    calls.append(("init", kw))
    import sys
    return sys.modules[__name__]
def log(values, step=None): calls.append(("log", values, step))
def finish(): calls.append(("finish",))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function that makes a package with the name of a tracker; the package records its calls."""

    def make(name):
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(FAKE)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield make
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_imported_only_when_it_is_named(name, fake, tmp_path):
    fake(name)
    Metrics(tmp_path / "a", cfg(), {}, "ppo").close()
    assert name not in sys.modules  # imported only when named
    metrics = Metrics(tmp_path / "ppo", cfg(name), {"seed": 3}, "ppo")
    metrics.log(4, {"train/reward": torch.tensor(2.0)})
    metrics.close()
    begin, log, end = sys.modules[name].calls
    assert begin[1]["project"] == "p" and begin[1]["config"] == {"seed": 3} and begin[1]["name"] == "ppo"
    assert log == ("log", {"train/step": 4, "train/reward": 2.0}, 4)
    assert end == ("finish",)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_missing_tracker_names_the_command_on_every_rank(rank, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is named.*pip install wandb"):
        Metrics(tmp_path / "run", cfg("wandb"), {}, "sft")
    assert not (tmp_path / "run").exists()


def test_a_folder_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # no other package can be imported
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError, match="pip install trackio"):
        check_trackers(["trackio"])
