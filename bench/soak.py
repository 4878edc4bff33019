"""Tests whether a long run of PPO-Lag with checkpoints becomes slower or larger.

    python bench/soak.py [--steps 300] [--processes 2] [--output FOLDER]

It uses a tiny Llama and random words, so that the trainer is measured: response tokens per second and the
resident memory of all ranks, in the second and in the last quarter of the run; and the steps that were
skipped and the checkpoints that were written. It prints one line for docs/benchmarks.md. Left out: the memory
of GPUs, which `plan` and bench_step.py cover.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

SETTINGS = [
    "max_length=48",
    "ppo.batch_size=8",
    "ppo.prompt_epochs=100000",
    "optim.schedule=constant",
    "optim.learning_rate=1e-4",
    "checkpoint.interval=10",
    "checkpoint.asynchronous=true",
    "log.progress=false",
    "log.sample_interval=100000",
    "multiplier.threshold_quantile=0.5",
    "engine.zero_stage=2",
    "engine.threads=1",
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.output or Path(temporary) / "run"
        command = recipe(Path(temporary), out, args.steps)
        code, memory, seconds = watched(command, args.processes)
        if code:
            sys.exit(f"the run ended with {code}")
        print(report(out, memory, seconds, args))


def recipe(folder, out, steps):
    """Creates models and data and returns the command line."""
    import plan_memory

    plan_memory.make(folder, SHAPE)
    prompts = folder / "many.jsonl"
    rows = [{"prompt": f"w{4 + i % 60} w{4 + i // 60}"} for i in range(400)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        "ppo-lag",
        f"model={folder / 'lm'}",
        f"reward={folder / 'reward'}",
        f"cost={folder / 'cost'}",
        f"data={prompts}",
        f"output={out}",
        f"ppo.max_steps={steps}",
        *SETTINGS,
    ]


def watched(command, processes):
    """Runs the command; returns (exit code, [(seconds, bytes of all ranks)], seconds)."""
    start = [sys.executable, "-m", "saferlhf_fast", *command, "--processes", str(processes)]
    begun, samples = time.monotonic(), []
    run = subprocess.Popen(start, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    done = threading.Event()

    def look():
        while not done.wait(1.0):
            samples.append((time.monotonic() - begun, resident(run.pid)))

    threading.Thread(target=look, daemon=True).start()
    code = run.wait()
    done.set()
    return code, samples, time.monotonic() - begun


def resident(pid):
    """Returns the resident memory of a process and all its descendants in bytes."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (own := psutil.Process(pid), *own.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # the process has just ended
                total += process.memory_info().rss
    return total


def report(out, memory, seconds, args):
    """Returns the result as text."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/tokens" in row]
    quarter = len(rows) // 4

    def part(number):
        inside = rows[number * quarter : (number + 1) * quarter]
        before = rows[number * quarter - 1]["time"]
        sizes = [size for at, size in memory if before <= at - offset <= inside[-1]["time"]]
        return sum(row["train/tokens"] for row in inside) / (inside[-1]["time"] - before), sum(sizes) / max(
            1, len(sizes)
        ) / 2**30

    offset = seconds - rows[-1]["time"]  # the metrics' clock starts after loading
    (speed, size), (speed_last, size_last) = part(1), part(3)
    summary = json.loads((out / "summary.json").read_text())
    saved = len(rows) // 10
    kept = len(list((out / "checkpoints").glob("*/manifest.json")))
    git = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    tokens = sum(row["train/tokens"] for row in rows)
    return (
        f"long run: {len(rows)} PPO-Lag steps, {tokens:,.0f} response tokens in {seconds:.0f} s, "
        f"{args.processes} "
        f"processes, ZeRO-2; {saved} checkpoints in the background ({kept} kept); last quarter against the "
        f"second: "
        f"{speed_last:.0f} / {speed:.0f} tokens/s, {size_last:.2f} / {size:.2f} GiB; skipped steps: "
        f"{summary['skipped_steps']}\n"
        f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, commit "
        f"{git.stdout.strip()}, "
        f"python bench/soak.py --steps {args.steps} --processes {args.processes}"
    )


if __name__ == "__main__":
    main()
