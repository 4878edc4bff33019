"""TRL's DPO and GRPO trainers for 20 steps on a tiny model: patched and not, the same losses. Needs TRL 1.16.

All of it in `make test-integrations`; in `make test` GRPO, and DPO as the shorter run of
examples/trl_patched.py.
"""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
from integration_kit import RANKS

pytestmark = pytest.mark.numeric

pytest.importorskip("trl", reason="TRL is not installed here")
BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize("side", [pytest.param("dpo", marks=pytest.mark.slow), "grpo"])
def test_twenty_steps_have_the_same_losses(side, monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    spec = importlib.util.spec_from_file_location("trl_run", BENCH / "trl_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = types.SimpleNamespace(vocabulary=300, steps=20, width=32, tokens=12)
    theirs, ours = (module.child(options, side, patched) for patched in (False, True))
    assert len(theirs["steps"]) == len(ours["steps"]) == 20
    assert not theirs["calls"] and ours["calls"]["trl.trainer.utils:_ChunkedLogProbFunction"] >= 20
    losses = [row["loss"] for row in theirs["steps"]]
    assert len(set(losses)) > 10  # something is learned
    for name, value in module.apart(theirs, ours).items():
        assert value < 1e-3 * max(1.0, *(abs(row[name]) for row in theirs["steps"])), name
