"""A short slice of recipes/pku_tiny.yaml on real weights and real data; skipped where they are not there."""

import json

import kit
import pytest

SHARED = kit.shared()


@pytest.mark.numeric
@pytest.mark.skipif(
    SHARED is None, reason="real data and models are not there: set SAFERLHF_DATA to their folder"
)
@pytest.mark.timeout(600)
def test_slice_of_the_real_run(tmp_path):
    short = [f"{stage}.train.max_steps=3" for stage in ("sft", "reward", "cost")]
    few = [
        "ppo-lag.ppo.max_steps=2",
        "ppo-lag.ppo.batch_size=4",
        "ppo-lag.sampling.max_new_tokens=8",
        "evaluate-sft.sampling.max_new_tokens=8",
        "evaluate.sampling.max_new_tokens=8",
        *[f"{stage}.log.progress=false" for stage in ("sft", "reward", "cost", "ppo-lag")],
    ]
    command = [
        "run",
        "saferlhf_fast/recipes/pku_tiny.yaml",
        f"root={SHARED}",
        f"output={tmp_path / 'run'}",
        *short,
        *few,
    ]
    done = kit.command(*command, timeout=580)
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
