"""Stages that train from the cache of tokenised data: as from memory, on one and two processes; mistakes."""

import json

import kit
import pytest

from saferlhf_fast.config import checks, load
from saferlhf_fast.data import token_cache
from saferlhf_fast.errors import UserError

FAST = {"train__batch_size": 4, "train__max_length": 32, "optim__learning_rate": 3e-3, "train__max_steps": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    return {"folder": folder, "model": kit.make_model(folder / "model"), **kit.make_data(folder / "data", 30)}


SLOW = [pytest.param(stage, "pairs", marks=pytest.mark.slow) for stage in ("reward", "dpo")]


@pytest.mark.parametrize("stage, data", [("sft", "sft"), ("cost", "pairs"), *SLOW])
def test_a_stage_learns_the_same_from_the_cache(world, tmp_path, monkeypatch, stage, data):
    monkeypatch.setattr(token_cache, "BLOCK_ROWS", 7)
    settings = {"model": world["model"], "data": world[data], "train__eval_fraction": 0.3, **FAST}
    memory = kit.run(stage, tmp_path / "memory", **settings)
    cached = kit.run(stage, tmp_path / "cached", train__cache=tmp_path / "cache", **settings)
    assert kit.losses(cached) == kit.losses(memory) and len(kit.losses(cached)) == 3
    first, second = kit.summary(memory), kit.summary(cached)
    timed = [key for key in first if "second" in key or "time" in key]
    assert {k: v for k, v in first.items() if k not in timed} == {
        k: v for k, v in second.items() if k not in timed
    }
    blocks = sorted((tmp_path / "cache").rglob("*.arrow"))
    assert len(blocks) == 5 and first["examples"] + first["held_out"] == 30 and first["held_out"]


def test_a_mistake_in_the_data_is_one_line_and_no_block_of_it_stays(world, tmp_path, capsys):
    path = kit.write_rows(
        tmp_path / "bad.jsonl", [{"instruction": "what", "output": "go"}, {"instruction": 3}]
    )
    words = [f"model={world['model']}", f"data={path}", f"train.cache={tmp_path / 'cache'}"]
    assert kit.main("sft", *words, f"output={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {path} line 2") and "\n" not in error
    assert not list((tmp_path / "cache").rglob("block*"))
    words[1:] = [f"data={world['sft']}", f"train.cache={path}"]  # the folder is a file
    assert kit.main("sft", *words, f"output={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: train.cache: {path}") and "\n" not in error
    with pytest.raises(UserError, match="train.cache: expected none"):
        checks.check(
            "moderation",
            load.load("moderation", None, dict(word.split("=", 1) for word in [*words, "output=o"])),
        )


@pytest.mark.slow
def test_two_processes_build_the_cache_together_and_learn_the_same(world, tmp_path):
    words = [f"model={world['model']}", f"data={world['pairs']}", "log.progress=false"]
    words += [
        f"{key.replace('__', '.')}={value}" for key, value in FAST.items() if key != "train__batch_size"
    ]
    losses = {}
    for processes, size in ((1, 4), (2, 2)):
        output, cache = tmp_path / f"run{processes}", tmp_path / f"cache{processes}"
        more = [f"output={output}", f"train.cache={cache}", f"train.batch_size={size}"]
        ended = kit.command("cost", *words, *more, processes=processes)
        assert ended.returncode == 0, ended.stderr
        losses[processes] = kit.losses(output)
        assert json.loads((output / "summary.json").read_text())["examples"] == 30
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
