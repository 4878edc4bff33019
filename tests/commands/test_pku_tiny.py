"""A short slice of recipes/pku_tiny.yaml on real weights and real data; skipped where they are not there."""

import json

import kit
import pytest
import yaml

SHARED = kit.shared()
ROWS = {"sft": 40, "reward": 60, "cost": 60, "ppo-lag": 12}  # of each file of a stage, drawn with the seed
EVALUATED = 8  # prompts


def few(source, count):
    """A source of data that takes `count` rows of its file."""
    return {**(source if isinstance(source, dict) else {"path": source}), "count": count}


def short_recipe(path):
    """Writes the recipe with a few rows of each of its files."""
    recipe = yaml.safe_load((kit.ROOT / "saferlhf_fast/recipes/pku_tiny.yaml").read_text())
    for stage in recipe["stages"]:
        (kind, settings) = next((k, v) for k, v in stage.items() if k != "name")
        if kind in ROWS:
            data = settings["data"]
            settings["data"] = [few(s, ROWS[kind]) for s in (data if isinstance(data, list) else [data])]
        else:
            settings["prompts"] = few(settings["prompts"], EVALUATED)
        if "ptx" in settings:
            settings["ptx"] = few(settings["ptx"], ROWS["sft"])
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.mark.numeric
@pytest.mark.skipif(
    SHARED is None, reason="real data and models are not there: set SAFERLHF_DATA to their folder"
)
def test_slice_of_the_real_run(tmp_path):
    short = [f"{stage}.train.max_steps=3" for stage in ("sft", "reward", "cost")]
    little = [
        "ppo-lag.ppo.max_steps=2",
        "ppo-lag.ppo.batch_size=4",
        "ppo-lag.sampling.max_new_tokens=8",
        "evaluate-sft.sampling.max_new_tokens=8",
        "evaluate.sampling.max_new_tokens=8",
        *[f"{stage}.log.progress=false" for stage in ("sft", "reward", "cost", "ppo-lag")],
    ]
    command = [
        "run",
        short_recipe(tmp_path / "pku_tiny.yaml"),
        f"root={SHARED}",
        f"output={tmp_path / 'run'}",
        *short,
        *little,
    ]
    done = kit.command(*command, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    read = {
        stage: json.loads((tmp_path / "run" / stage / "summary.json").read_text())
        for stage in ("sft", "reward", "cost", "ppo-lag", "evaluate")
    }
    assert 0 <= read["reward"]["eval/accuracy"] <= 1 and read["reward"]["held_out"] > 0
    assert 0 <= read["cost"]["eval/accuracy_sign"] <= 1 and 0.4 < read["cost"]["baseline/accuracy"] <= 1
    assert read["ppo-lag"]["steps"] == 2 and 0 < read["ppo-lag"]["multiplier"] <= 5
    assert (
        read["evaluate"]["reward"]["low"]
        <= read["evaluate"]["reward"]["mean"]
        <= read["evaluate"]["reward"]["high"]
    )
    assert (tmp_path / "run" / "ppo-lag" / "report.html").stat().st_size > 10_000
    again = kit.command(*command, timeout=120)
    assert again.returncode == 0 and "skip" in (again.stdout + again.stderr)
