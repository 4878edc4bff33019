"""Runs of tiny models that are interrupted and go on, and what must then be the same as without."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import forked
import kit

from saferlhf_fast.runtime.checkpoint import manifest

STEPS, AT = 4, 2
TRAIN = {
    "train.max_steps": STEPS,
    "train.batch_size": 3,
    "train.accumulation": 1,
    "train.epochs": 9,
    "optim.learning_rate": 1e-3,
}
DROPOUT = {"lora.rank": 2, "lora.dropout": 0.2}
PPO = {
    "max_length": 24,
    "ppo.batch_size": 3,
    "ppo.max_steps": STEPS,
    "optim.learning_rate": 1e-3,
    "critic_optim.learning_rate": 1e-3,
}
LAG = {"multiplier.window": 8, "multiplier.lr": 0.5}


def words(stage, world, output, processes=1, **settings):
    """The command line of a tiny run that writes a checkpoint at every second step."""
    base, data = world["model"], world
    if stage in ("ppo", "ppo-lag"):
        common = {
            "model": base,
            "reward": world["reward"],
            "data": data["prompts"],
            "ptx": data["sft"],
            **PPO,
        }
        common |= {"cost": world["cost"], **LAG} if stage == "ppo-lag" else {}
    else:
        common = {"model": base, "data": data["sft" if stage == "sft" else "pairs"], **TRAIN, **DROPOUT}
        if stage == "sft":
            common |= {"train.eval_fraction": 0.2, "train.eval_interval": 1, "train.best_metric": "eval/loss"}
    values = {
        **common,
        "output": output,
        "log.progress": "false",
        "checkpoint.interval": AT,
        "checkpoint.keep": 9,
        **settings,
    }
    return [stage, *(f"{key}={value}" for key, value in values.items())]


def make_world(folder):
    """Models and data of these runs -> {name: path}."""
    data = kit.make_data(folder / "data", n=22)
    base = kit.make_model(folder / "model")
    return {"model": base, **data, **kit.make_scores(folder, base)}


def interrupted(output, copy, at=AT):
    """A copy of a finished run as it was after step `at` -> its folder."""
    shutil.copytree(output, copy)
    for step, path in manifest.listed(copy):
        if step > at:
            shutil.rmtree(path)
    for name in ("finished.json", "summary.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "model")
    return copy


def assert_same(a, b, step=STEPS):
    """Two finished runs agree bit by bit: every file of their checkpoints, model, metrics."""
    one, two = (manifest.read(manifest.folder_of(folder, step))["files"] for folder in (a, b))
    assert sorted(one) == sorted(two) and len(one) > 3
    differ = [name for name in one if name != "state.json" and one[name] != two[name]]
    assert not differ, f"{differ} differ"
    assert _state(a, step) == _state(b, step)
    assert digest(a / "model" / "model.safetensors") == digest(b / "model" / "model.safetensors")
    rows = [
        [{key: value for key, value in row.items() if key != "time"} for row in kit.rows(folder)]
        for folder in (a, b)
    ]
    assert rows[0] == rows[1] and len(rows[0]) >= STEPS


def _state(folder, step):
    values = json.loads((manifest.folder_of(folder, step) / "state.json").read_text())
    values["metrics"] = {"step": values["metrics"]["step"]}  # seconds, and bytes with them
    return values


def digest(path):
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def launch(commands, processes, timeout=400, check=True, worker="resume_worker.py", **env):
    """Runs command lines one after the other in the same processes -> CompletedProcess with all their
    output.
    """
    done = forked.run([kit.SUPPORT / worker, json.dumps(commands)], processes, timeout, env)
    assert not check or done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])
    return done


def together(command, processes, worker="fault_worker.py", timeout=200, **env):
    """Starts one command line in so many processes, without a launcher that would end them -> [(exit code,
    output, errors)].

    env: more of the environment. A process that is still there after `timeout` seconds is killed and fails
    the test.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="together-") as folder:
        texts = [[Path(folder) / f"{name}{rank}" for name in ("out", "err")] for rank in range(processes)]
        arguments = [kit.SUPPORT / worker, json.dumps(command)]
        ranks = [
            forked.Program(arguments, 1, *files, variables | env)
            for files, variables in zip(texts, forked.launcher_variables(processes))
        ]
        codes = [rank.wait(max(1.0, deadline - time.monotonic())) for rank in ranks]
        found = [(code, *(path.read_text() for path in files)) for code, files in zip(codes, texts)]
    assert None not in codes, f"a process did not end within {timeout} s: {found}"
    return found


class Marker:
    """Runs `touch` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)
