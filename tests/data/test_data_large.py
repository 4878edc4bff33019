"""Large files: 100,000 rows with planted duplicates and mistakes; memory and speed with millions (slow)."""

import json
import subprocess
import sys

import pytest
from kit import ROOT

from saferlhf_fast.cli import main

WORDS = (
    "the quick river stone harbour lamp paper winter glass story cloud bridge orange silent market".split()
)


def prompt(i):
    """A prompt of 15 words that no other number has, nor nearly has."""
    return " ".join(f"{WORDS[(i >> k) % 15]}{(i * 2654435761 >> 3 * k) % 97}" for k in range(15))


def write(path, rows, answer=30):
    """Writes v0 rows: each 100th repeats the row before, each 1000th contradicts it, each 5000th is cut."""
    with path.open("w") as file:
        for i in range(rows):
            n = i - 1 if i % 100 == 99 else i
            text = " ".join(WORDS[(n * 7 + k * k) % 15] for k in range(answer))
            safe = "false" if i % 1000 == 999 else "true"
            end = "" if i % 5000 == 4 else "}"
            file.write(
                f'{{"prompt": "{prompt(n)}", "response_0": "no, {text}", "response_1": "yes, {text}", '
                f'"is_response_0_safe": {safe}, "is_response_1_safe": false, "better_response_id": {i % 2}, '
                f'"safer_response_id": 0{end}\n'
            )
    return path


def check_inspection(result, rows):
    good = rows - rows // 5000
    (file,) = result["files"]
    assert (file["in"], file["kept"], file["skipped"]) == (rows, good, rows // 5000)
    assert file["reasons"] == {"not JSON": rows // 5000} and result["rows"] == good
    assert result["duplicates"] == {
        "rows": rows // 100,
        "prompts": rows // 100,
        "distinct_prompts": good - rows // 100,
        "answers": rows // 50,
    }
    assert result["contradictions"]["labelled_both_ways"] == rows // 1000
    assert result["answers"]["unsafe"] == {"no": good - rows // 1000, "yes": good + rows // 1000}
    assert result["lengths"]["rows"] == 20_000 and result["lengths"]["sampled"]
    assert abs(result["better_is_safer"]["agree"] / good - 0.5) < 0.01


def test_100_000_rows_are_counted_exactly(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", 100_000, answer=3)
    assert main(["data", "inspect", str(path), f"output={tmp_path / 'o'}"]) == 0
    check_inspection(json.loads((tmp_path / "o" / "inspection.json").read_text()), 100_000)
    assert len((tmp_path / "o" / "bad.jsonl").read_text().splitlines()) == 20
    assert main(["data", "convert", str(path), "to=safe-over-unsafe", f"output={tmp_path / 'c.jsonl'}"]) == 0
    assert sum(1 for _ in (tmp_path / "c.jsonl").open()) == 100_000 - 20 - 100
    assert "99880" in capsys.readouterr().out


SCRIPT = """
import json, sys, time
import saferlhf_fast.commands.data.cli, numpy, rich.console, rich.table
from saferlhf_fast.cli import main
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before, began = peak(), time.process_time()
code = main(["data", *sys.argv[1:]])
print(json.dumps({"code": code, "MB above": peak() - before, "seconds": time.process_time() - began}))
"""


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("rows", [500_000, 10_000_000])
def test_memory_and_speed_of_millions_of_rows(tmp_path, rows):
    path = write(tmp_path / "rows.jsonl", rows)
    size = path.stat().st_size / 1e6
    for words in (
        ["inspect", path, f"output={tmp_path / 'o'}"],
        ["inspect", path, f"output={tmp_path / 'o'}", "near=0.8", f"against={path}"],
        ["convert", path, "to=safe-over-unsafe", f"output={tmp_path / 'c.jsonl'}"],
        ["split", path, f"output={tmp_path / 's'}", "test=0.1"],
    ):
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, words)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert ended.returncode == 0, ended.stderr
        values = json.loads(ended.stdout.splitlines()[-1])
        print(words[0], *words[3:], values, f"{size:.0f} MB, {size / values['seconds']:.0f} MB/s of CPU time")
        assert values["code"] == 0 and values["MB above"] < 1024
        if len(words) == 3:
            check_inspection(json.loads((tmp_path / "o" / "inspection.json").read_text()), rows)
    parts = {name: sum(1 for _ in (tmp_path / "s" / f"{name}.jsonl").open()) for name in ("train", "test")}
    assert sum(parts.values()) == rows - rows // 5000 and abs(parts["test"] / rows - 0.1) < 0.001
