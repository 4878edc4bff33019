"""What is kept of a run of pku_small, whole or cut short: 8 files of at most 16 MiB in one flat folder."""

import datetime
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 16_000_000
REPORTS = ("reward", "cost", "ppo-lag")
AGAIN = "bash bench/pku_small.sh OUT again"
SCORES = ("reward", "cost", "unsafe_share", "kl", "length")
CURVES = ("reward", "cost", "unsafe_share", "lambda", "kl_divergence", "mean_generated_length")
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft")


class Kept(NamedTuple):
    """Where everything is.

    Attributes:
        out: The folder to keep.
        run: The output of the recipe, a folder for each stage.
        log: What the run printed.
        stages: Names of the stages, in order.
    """

    out: Path
    run: Path
    log: Path
    stages: list


def facts(manifest, rehearse):
    """What the table says about the machine and the code."""
    return {
        "device": device(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(manifest),
        "command": os.environ.get("BENCH_COMMAND", "python bench/pku_small/run.py"),
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "native": native(),
        "rehearse": rehearse,
    }


def device():
    try:
        if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
            found = subprocess.run(words, capture_output=True, text=True).stdout.strip()
            if found:
                return found.replace("\n", "; ")
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return f"{model}, {os.cpu_count()} threads"
    except (OSError, StopIteration):
        return platform.machine()


def commit(manifest):
    """That of the checkout; without git that of BENCH_COMMIT, or the one at which the bundle was packed."""
    try:
        words = ["git", "describe", "--always", "--dirty"]
        described = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        described = ""
    packed = f"not known here; the bundle was packed at {manifest.get('commit', 'an unknown commit')}"
    return described or os.environ.get("BENCH_COMMIT") or packed


def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def native():
    if any((ROOT / "saferlhf_fast").glob("_C.*")):
        return "built"
    note = ROOT / "saferlhf_fast" / "_C_failed.txt"
    return "not built: " + (note.read_text().strip() if note.exists() else "see the output of the build")


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def read_rows(path):
    """The rows of a JSONL file; the last one may be half written."""
    rows = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return rows
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def collect(kept, facts, ending):
    """Writes the files; returns the table."""
    kept.out.mkdir(parents=True, exist_ok=True)
    notes = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = ({"stage": s, **row} for s in kept.stages for row in read_rows(kept.run / s / name))
        notes += write_lines(kept.out / name, rows)
    for stage in REPORTS:
        notes += copy(kept.run / stage / "report.html", kept.out / f"report-{stage}.html")
    notes += copy(kept.run / "summary.json", kept.out / "summary.json")
    notes += write_lines(kept.out / kept.log.name, log_lines(kept.log), as_json=False)
    text = table(kept, facts, ending, notes)
    partial = kept.out / "table.md.partial"
    partial.write_text(text)
    partial.replace(kept.out / "table.md")
    return text


def log_lines(path):
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def write_lines(path, rows, as_json=True):
    """Writes rows as far as they fit; returns notes on what was left out."""
    size, left_out = 0, 0
    with open(path, "w", encoding="utf-8") as out:
        for row in rows:
            line = (json.dumps(row) if as_json else row) + "\n"
            size += len(line.encode())
            if size > MOST_BYTES:
                left_out += 1
            else:
                out.write(line)
    return [f"{path.name}: the last {left_out} lines were left out, to stay below 16 MiB"] if left_out else []


def copy(source, target):
    target.unlink(missing_ok=True)
    if not source.is_file():
        return []
    if source.stat().st_size > MOST_BYTES:
        return [f"{target.name}: left out, it has {source.stat().st_size / 2**20:.1f} MiB"]
    shutil.copyfile(source, target)
    return []


def table(kept, facts, ending, notes):
    """The table in Markdown: the run, its stages, the policy before and after, the course of PPO-Lag."""
    heading = [
        "# pku_small",
        "",
        f"Device: {facts['device']}. Date: {facts['date']}. Commit: {facts['commit']}. "
        f"Command: `{facts['command']}`. "
        f"{facts['versions']}. Native module: {facts['native']}.",
        "",
        f"Run: {ending} ({facts['took']}).",
    ]
    if facts["rehearse"]:
        heading += ["", "**A rehearsal, with two steps per stage: these are no figures.**"]
    parts = [heading, stage_table(kept), before_after(kept), course(kept), notes]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def stage_table(kept):
    done = read_json(kept.run / "summary.json").get("stages", {})
    lines = ["| stage | state | seconds | steps | result |", "|---|---|---:|---:|---|"]
    for name in kept.stages:
        folder = kept.run / name
        rows = read_rows(folder / "metrics.jsonl")
        steps = max((row.get("step", 0) for row in rows), default="")
        state = "done" if (folder / "finished.json").exists() else "unfinished"
        if not folder.exists():
            state = "not started"
        summary = read_json(folder / "summary.json") if state == "done" else {}
        shown = {k: v for k, v in summary.items() if isinstance(v, float) and k.split("/")[0] in SHOWN}
        seconds = done.get(name, {}).get("seconds")
        cells = (
            name,
            state,
            "" if seconds is None else f"{seconds:.0f}",
            steps,
            ", ".join(map(pair, shown.items())),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


SHOWN = ("eval", "baseline", "threshold", "multiplier")


def pair(item):
    return f"{item[0]} {item[1]:.4g}"


def before_after(kept):
    """The two evaluations side by side, each mean with its 95 % interval."""
    names = [name for name in kept.stages if name.startswith("evaluate")]
    found = {name: read_json(kept.run / name / "summary.json") for name in names}
    found = {name: values for name, values in found.items() if values}
    if not found:
        return []
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "---:|" * len(found)]
    for key in SCORES:
        if any(isinstance(values.get(key), dict) for values in found.values()):
            cells = [interval(values.get(key)) for values in found.values()]
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return lines


def interval(value):
    if not isinstance(value, dict):
        return ""
    return f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}], n = {value['n']}"


def course(kept, most=8):
    """Some steps of PPO-Lag, the first and the last among them."""
    rows = [row for row in read_rows(kept.run / "ppo-lag" / "metrics.jsonl") if "train/cost" in row]
    if not rows:
        return []
    chosen = sorted({round(i * (len(rows) - 1) / max(most - 1, 1)) for i in range(most)})
    keys = [key for key in CURVES if any(f"train/{key}" in row for row in rows)]
    lines = ["| step | " + " | ".join(keys) + " |", "|---:|" + "---:|" * len(keys)]
    for at in chosen:
        cells = [f"{rows[at][f'train/{key}']:.4g}" if f"train/{key}" in rows[at] else "" for key in keys]
        lines.append(f"| {rows[at]['step']} | " + " | ".join(cells) + " |")
    return lines
