"""TRL's DPO and GRPO trainers on a tiny model: patched and not, the same losses. Needs TRL 1.16.

20 steps of both in `make test-integrations`; in `make test` six of GRPO, and DPO as the shorter run of
examples/trl_patched.py.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import forked
import pytest
from integration_kit import RANKS

pytestmark = pytest.mark.numeric

pytest.importorskip("trl", reason="TRL is not installed here")
BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def trl_run(monkeypatch):
    """bench/trl_run.py as a module."""
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    spec = importlib.util.spec_from_file_location("trl_run", BENCH / "trl_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(trl_run, theirs, ours, steps):
    """theirs, ours: what two runs said."""
    assert len(theirs["steps"]) == len(ours["steps"]) == steps
    assert not theirs["calls"] and ours["calls"]["trl.trainer.utils:_ChunkedLogProbFunction"] >= steps
    losses = [row["loss"] for row in theirs["steps"]]
    assert len(set(losses)) > steps // 2  # something is learned
    for name, value in trl_run.apart(theirs, ours).items():
        assert value < 1e-3 * max(1.0, *(abs(row[name]) for row in theirs["steps"])), name


@pytest.mark.slow
@pytest.mark.parametrize("side", ["dpo", "grpo"])
def test_twenty_steps_have_the_same_losses(side, trl_run):
    options = types.SimpleNamespace(vocabulary=300, steps=20, width=32, tokens=12)
    compare(trl_run, *(trl_run.child(options, side, patched) for patched in (False, True)), 20)


def test_six_steps_of_grpo_have_the_same_losses(trl_run):
    words = "--side grpo --vocabulary 300 --steps 6 --width 32 --tokens 12".split()
    said = []
    for more in ([], ["--patched"]):
        done = forked.run([BENCH / "trl_run.py", *words, *more])
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(json.loads(done.stdout.splitlines()[-1]))
    compare(trl_run, *said, 6)
