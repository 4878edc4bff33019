"""Tiny runs that are interrupted and resumed, and the comparison with runs that are not interrupted."""

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
    """Writes the models and data of these runs; returns {name: path}."""
    data = kit.make_data(folder / "data", n=22)
    base = kit.make_model(folder / "model")
    return {"model": base, **data, **kit.make_scores(folder, base)}


def interrupted(output, copy, at=AT):
    """Copies a finished run as it was after step `at`; returns the folder of the copy."""
    shutil.copytree(output, copy)
    for step, path in manifest.listed(copy):
        if step > at:
            shutil.rmtree(path)
    for name in ("finished.json", "summary.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "model")
    return copy


def assert_same(a, b, step=STEPS):
    """Asserts that two finished runs agree bit for bit: files of the checkpoint, model and metrics."""
    files_a, files_b = (manifest.read(manifest.folder_of(folder, step))["files"] for folder in (a, b))
    assert sorted(files_a) == sorted(files_b) and len(files_a) > 3
    differ = [name for name in files_a if name != "state.json" and files_a[name] != files_b[name]]
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
    values["metrics"] = {
        "step": values["metrics"]["step"]
    }  # without the time and the size of metrics.jsonl, which depends on it
    return values


def digest(path):
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def launch(commands, processes, timeout=400, check=True, worker="resume_worker.py", **env):
    """Runs command lines one after the other in the same processes.

    Returns a CompletedProcess with the output of all of them.
    """
    completed = forked.run([kit.SUPPORT / worker, json.dumps(commands)], processes, timeout, env)
    assert not check or completed.returncode == 0, (completed.stdout[-2000:], completed.stderr[-4000:])
    return completed


def together(command, processes, worker="fault_worker.py", timeout=200, **env):
    """Runs one command line in several processes, without a launcher that would end them.

    Returns [(exit code, output, errors)], one for each rank. env: additional environment variables. A process
    that still runs after `timeout` seconds is killed, and the test fails.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="together-") as folder:
        output_files = [
            [Path(folder) / f"{name}{rank}" for name in ("out", "err")] for rank in range(processes)
        ]
        arguments = [kit.SUPPORT / worker, json.dumps(command)]
        ranks = [
            forked.Program(arguments, 1, *files, variables | env)
            for files, variables in zip(output_files, forked.launcher_variables(processes))
        ]
        codes = [rank.wait(max(1.0, deadline - time.monotonic())) for rank in ranks]
        results = [(code, *(path.read_text() for path in files)) for code, files in zip(codes, output_files)]
    assert None not in codes, f"a process did not end within {timeout} s: {results}"
    return results


class Marker:
    """Runs `touch` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)
