"""Runs the recipe within a time limit and writes what is to be kept into one folder, for bench/pku_small.sh.

Every 20 s the folder gets what there is so far, so that it can be read whenever the machine goes away. It
holds 8 files: table.md, summary.json, run.log, metrics.jsonl and samples.jsonl of all stages, and the reports
of the three stages that train.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from pku_small import result  # noqa: E402

ON_A_GPU = (
    "reward.train.micro_tokens=32768",
    "cost.engine.precision=bf16",
    "cost.train.micro_tokens=65536",
    "evaluate-before.batch_size=500",
    "ppo-lag.ppo.batch_size=128",
    "ppo-lag.ppo.micro_batch_size=128",
    "ppo-lag.ppo.prompt_epochs=2",
    "ppo-lag.multiplier.window=512",  # 4 steps, as in the recipe
    "evaluate.batch_size=500",
)
"""Larger batches. Rollouts use continuous batching there by default, and the recipe's precision is bf16."""
REHEARSAL = (
    "reward.train.max_steps=2",
    "cost.train.max_steps=2",
    "ppo-lag.ppo.max_steps=2",
    "ppo-lag.ppo.batch_size=4",
    "ppo-lag.ppo.micro_batch_size=4",
    "ppo-lag.multiplier.window=8",
    "ppo-lag.sampling.max_new_tokens=8",
    "evaluate-before.sampling.max_new_tokens=8",
    "evaluate.sampling.max_new_tokens=8",
)
ROWS_OF_A_REHEARSAL = 24  # of each file
RESERVE, GRACE = (
    12,
    8,
)  # seconds for the end: the last collection, and what a stage gets to write its checkpoint
INTERVAL = 20


def shortened(recipe):
    """The recipe with a few rows of each of its files."""

    def few(sources):
        listed = sources if isinstance(sources, list) else [sources]
        return [{**(s if isinstance(s, dict) else {"path": s}), "count": ROWS_OF_A_REHEARSAL} for s in listed]

    for stage in recipe["stages"]:
        settings = next(value for key, value in stage.items() if key != "name")
        for key in ("data", "prompts"):
            if key in settings:
                settings[key] = few(settings[key])
        if "ptx" in settings:
            settings["ptx"] = few(settings["ptx"])[0]
    return recipe


def write_recipe(name, place, rehearse):
    recipe = yaml.safe_load((ROOT / name).read_text())
    path = place / Path(name).name
    path.write_text(yaml.safe_dump(shortened(recipe) if rehearse else recipe, sort_keys=False))
    return path, [stage.get("name") or next(iter(stage)) for stage in recipe["stages"]]


def command_of(recipe, place, rehearse):
    words = [sys.executable, "-m", "saferlhf_fast", "run", str(recipe)]
    words += [f"root={place / 'root'}", f"models={place / 'models'}", f"output={place / 'run'}"]
    return words + ["resume=auto", "overwrite=true", *(REHEARSAL if rehearse else ON_A_GPU)]


def run(words, log, seconds, collect, interval=INTERVAL):
    """Runs a command and returns (exit code, whether the time was up); `collect` is called again and again.

    At the end of the time the command gets SIGTERM: a stage that trains then writes a checkpoint. It never
    outlives this process, unless this one is killed.
    """
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shown = log.stat().st_size if log.exists() else 0
    with open(log, "ab") as out:
        child = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out, process_group=0)
    try:
        return wait(child, (log, shown), time.monotonic() + seconds, collect, interval)
    finally:
        signal.signal(signal.SIGTERM, previous)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def wait(child, log_and_shown, deadline, collect, interval):
    """Waits for the process and prints its log, of which a part was shown before."""
    (log, shown), collected, late = log_and_shown, time.monotonic(), False
    while child.poll() is None:
        now = time.monotonic()
        shown = show(log, shown)
        if not late and now > deadline:
            late = True
            os.killpg(child.pid, signal.SIGTERM)
        elif late and now > deadline + GRACE:
            os.killpg(child.pid, signal.SIGKILL)
        if now - collected > interval and not late:
            collect(None)
            collected = now
        time.sleep(0.5)
    show(log, shown)
    return child.returncode, late


def show(log, start):
    """Prints what was added to the log; returns its size."""
    with open(log, "rb") as stream:
        stream.seek(start)
        added = stream.read()
    sys.stdout.write(added.decode(errors="replace"))
    sys.stdout.flush()
    return start + len(added)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("again", nargs="?", choices=("again",))
    parser.add_argument("--place", type=Path, required=True, help="the folder of root/, models/ and run/")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(arguments)
    place = given.place.resolve()
    manifest = json.loads(next(given.bundle.glob("*/manifest.json")).read_text())
    recipe, stages = write_recipe(manifest["recipe"], place, given.rehearse)
    words, log = command_of(recipe, place, given.rehearse), place / "run.log"
    if not given.again:
        log.unlink(missing_ok=True)
    facts = result.facts(manifest, given.rehearse)
    begun = time.monotonic()

    def collect(ending):
        took = f"{time.monotonic() - begun:.0f} s of {given.seconds:.0f} s"
        return result.collect(
            result.Kept(given.out, place / "run", log, stages),
            {**facts, "took": took},
            ending or "still running",
        )

    code, late = run(words, log, max(given.seconds - RESERVE - GRACE, 1), collect)
    ending = "all stages are done" if code == 0 else f"failed with exit code {code}; see run.log"
    if late and code:
        ending = f"the time was up; `{result.AGAIN}` continues"
    print(collect(ending))
    return 0 if code == 0 or late else 1


if __name__ == "__main__":
    sys.exit(main())
