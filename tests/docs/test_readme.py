"""The README's figures are the stored ones, its Python runs on the base installation, and it stays short."""

import json
import re
import subprocess
import sys

import kit

README = (kit.ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (kit.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
RESULTS = kit.ROOT / "bench" / "results"
STEP = RESULTS / "step-amd-epyc-2-thread-s-2026-11-21.json"
KERNELS = RESULTS / "intel-xeon-processor-2-thread-s-2026-11-21.md"
BASE = {"torch", "triton", "numpy", "saferlhf_fast"}
# The extras' packages are there where tests run: the library must do without them, torch may take what it
# likes of its own.
WITHOUT_EXTRAS = """
import sys
class Refuse:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {foreign!r}:
            raise ImportError(f"{{name}} is not in the base installation")
sys.meta_path.insert(0, Refuse)
"""
EXTRAS = (
    "transformers",
    "deepspeed",
    "datasets",
    "peft",
    "pydantic",
    "omegaconf",
    "rich",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "matplotlib",
    "accelerate",
)


def cells(text, heading):
    """Rows of the first table under a heading, as lists of cells without the two head lines."""
    lines = text.split(heading, 1)[1].splitlines()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[: lines.index("", 8)]
        if line.startswith("|")
    ]
    return table[2:]


def stored_step():
    return {row["name"]: row for row in json.loads(STEP.read_text(encoding="utf-8"))}


def test_the_headline_is_a_stored_figure():
    step, memory = (stored_step()[f"{name}/ref"] for name in ("step", "memory"))
    headline = " ".join(re.search(r"\*\*On (?s:.*?)\n\n", README)[0].split())
    for said in (
        f"On {step['date']} a PPO-Lag step took {step['ours']:.2f} s; safe-rlhf e8cca16,",
        f"took {step['other']:.2f} s ({step['ratio']:.1f}×)",
        f"{memory['ours']:.2f} GiB instead of {memory['other']:.2f} GiB",
        f"commit {step['commit']}",
        step["device"].replace(" thread(s)", " threads"),
    ):
        assert said in headline, said


def test_the_table_of_a_step_is_the_stored_one():
    rows, stored = cells(BENCHMARKS, "## A PPO-Lag step"), stored_step()
    assert [row[0].split(" (")[0] for row in rows] == [
        "rollout",
        "score",
        "update",
        "score+update",
        "step",
        "memory",
    ]
    for part, *others in rows:
        for side, cell in zip(("ref", "trl", "unfused"), others, strict=True):
            row = stored[f"{part.split(' (')[0]}/{side}"]
            assert cell == f"{row['other']:.2f} → {row['ours']:.2f} ({row['ratio']:.1f}×)", (part, side)
    assert all(row["commit"] in BENCHMARKS and row["command"] in BENCHMARKS for row in stored.values())


def test_the_table_of_kernels_is_the_stored_one():
    sections = {
        section.splitlines()[0]: section for section in KERNELS.read_text(encoding="utf-8").split("### ")[1:]
    }
    rows = cells(BENCHMARKS, "## Kernels")
    assert [f"{op}, {shape}" for op, shape, *_ in rows] == list(sections)
    for op, shape, eager, compiled, ours, faster, of_floor, eager_memory, memory in rows:
        stored = {
            cell[0]: cell
            for cell in (
                [part.strip() for part in line.strip("|").split("|")]
                for line in sections[f"{op}, {shape}"].splitlines()
                if line.startswith("| ")
            )
        }
        (auto,) = (row for name, row in stored.items() if "(auto)" in name)
        compiles = [row[1] for name, row in stored.items() if "torch.compile" in name]
        assert [eager, eager_memory] == [stored["eager"][1], stored["eager"][6]], (op, shape)
        assert [ours, faster, of_floor, memory] == [auto[1], auto[2], auto[4], auto[6]], (op, shape)
        assert compiled == (compiles[0] if compiles else "–"), (op, shape)


def test_the_python_runs_on_the_base_installation():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 14
    code = (
        WITHOUT_EXTRAS.format(foreign=EXTRAS)
        + code
        + (
            "\nassert multiplier.value.shape == loss.shape == () and advantages.shape == "
            "reward_returns.shape == logp.shape"
            "\nassert loss.requires_grad and loss.isfinite() and 'clip_fraction' in stats\nprint('ran')"
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=kit.ROOT, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "ran\n", done.stderr


def test_the_demo_s_time_is_said_in_the_same_words():
    """README and Makefile said 8 minutes and 5."""
    makefile = (kit.ROOT / "Makefile").read_text(encoding="utf-8")
    said = [
        re.search(r"^make demo +# .*: (under .*)$", README, re.M),
        re.search(r"^demo: .*## .*: (under .*)$", makefile, re.M),
    ]
    assert all(said) and said[0][1] == said[1][1], said


def test_it_stays_a_first_screen():
    assert len(README.splitlines()) <= 120
