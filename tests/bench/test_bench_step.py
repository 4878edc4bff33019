"""bench_step.py: the work is the same for everybody and every run, rows have the promised form, the whole of
it runs on a tiny model, what cannot run says why; the reference's side, where it is importable, gives our
numbers.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import forked
import kit
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
FIELDS = {"name", "ours", "other", "ratio", "unit", "note", "device", "commit", "date", "command", "work"}


@pytest.fixture(autouse=True, scope="module")
def bench_modules():
    """The benches import each other by their bare names."""
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """Made-up records in PKU-SafeRLHF's form: prompts of 3 to 8 words, answers of 2 to 20."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    records = [
        {
            "prompt": "word " * (3 + i % 6),
            "safe_response": "word " * (2 + i),
            "unsafe_response": "word " * (20 - i),
        }
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class Forked:
    """In the place of subprocess.Popen: a side in a forked process."""

    def __init__(self, command, env, **_):
        assert command[0] == sys.executable
        self.command, self.env = command[1:], env

    def communicate(self, timeout):
        done = forked.run(self.command, timeout=timeout, env=self.env)
        self.returncode = done.returncode
        return done.stdout, done.stderr


@pytest.fixture
def bench(monkeypatch, capsys):
    """Calls bench_step.py on one thread and no GPU -> (exit code, stdout, stderr)."""
    import bench_step

    for name, value in {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}.items():
        monkeypatch.setenv(name, value)
    popen = types.SimpleNamespace(**{**vars(subprocess), "Popen": Forked})
    monkeypatch.setattr(bench_step, "subprocess", popen)

    def call(*arguments):
        try:
            code = bench_step.main([*map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


def test_the_work_is_the_same_every_time(rows_file):
    import step_work

    def make(count, **more):
        return step_work.make_work("tiny", count, data=rows_file, **more)

    work = make(8)
    assert work == make(8) != make(8, seed=9)
    # growth keeps the first ones
    assert make(16).prompts[:8] == work.prompts and make(16).responses[:8] == work.responses
    # more than there are rows
    assert len(make(40).prompts) == 40
    for ids in work.prompts:
        assert ids[0] == step_work.BOS and min(ids[1:]) >= step_work.FIRST and max(ids) < 64
    for ids in work.responses:
        assert ids[-1] == step_work.EOS and (len(ids) == 1 or min(ids[:-1]) >= step_work.FIRST)
    assert work.tokens == sum(work.limits) == sum(map(len, work.responses))
    short = make(16, max_length=30)
    assert max(len(p) + len(r) for p, r in zip(short.prompts, short.responses)) == 30


def test_lengths_are_those_of_the_rows(rows_file):
    import step_work

    assert step_work.word_lengths("one two three", "one two three four") == (18 + 4, 6 + 1)
    assert step_work.word_lengths("", "")[1] == 2  # an empty text still has a token
    work = step_work.make_work("tiny", 16, data=rows_file)
    expected = {
        step_work.word_lengths("w " * (3 + i % 6), "w " * n) for i in range(16) for n in (2 + i, 20 - i)
    }
    assert {(len(p), len(r)) for p, r in zip(work.prompts, work.responses)} <= expected
    rows = [(len(p), len(r)) for p, r in zip(work.prompts, work.responses)]
    padded = sum(
        4 * (max(p for p, _ in part) + max(r for _, r in part))
        for part in (rows[i : i + 4] for i in range(0, 16, 4))
    )
    assert work.useful(4) == pytest.approx(sum(map(sum, rows)) / padded)


@pytest.mark.skipif(kit.shared() is None, reason="needs the real rows: set SAFERLHF_DATA to their folder")
def test_the_default_work_has_real_lengths(monkeypatch):
    """32 prompts of real PKU lengths: 2,100 response tokens, less than half of a padded batch useful."""
    import step_work

    monkeypatch.setenv("SAFERLHF_DATA", str(kit.shared()))
    work = step_work.make_work("cpu-small", 32)
    assert 2000 < work.tokens < 2200 and 0.3 < work.useful(32) < 0.48 and work.longest < 512


@pytest.mark.parametrize("folder", [None, "", "/nowhere"])
def test_without_real_rows_the_variable_is_named(folder, monkeypatch):
    """No folder beside the checkout is looked for."""
    import step_work

    monkeypatch.delenv("SAFERLHF_DATA", raising=False) if folder is None else monkeypatch.setenv(
        "SAFERLHF_DATA", folder
    )
    with pytest.raises(
        step_work.Lacking, match="over_unsafe.jsonl.gz is not there; --data .* SAFERLHF_DATA the"
    ):
        step_work.read_rows()
    with pytest.raises(step_work.Lacking, match="stories260k is not there; --tokenizer .* SAFERLHF_DATA the"):
        step_work.token_lengths()


@pytest.mark.numeric
def test_models_are_the_same_on_every_side():
    import step_work
    import torch

    shape = step_work.SHAPES["tiny"]
    first, again = step_work.causal_lm(shape), step_work.causal_lm(shape)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    body, head = step_work.backbone(shape, 1)
    other, other_head = step_work.backbone(shape, 2)
    assert head.shape == (1, shape.hidden) and not torch.equal(head, other_head)
    assert not torch.equal(next(body.parameters()), next(other.parameters()))
    big = step_work.SHAPES["8b-lora"]
    # every shape is one that transformers takes
    assert dataclasses.replace(big, layers=1).config().hidden_size == 4096
    for shape in step_work.SHAPES.values():
        assert shape.config().vocab_size == shape.vocabulary


def side(rollout, score, update, peak=1 << 30, tokens=100, **check):
    return {
        "steps": [{"rollout": rollout, "score": score, "update": update, "tokens": tokens}],
        "peak": peak,
        "check": check,
    }


def test_rows_are_other_over_ours():
    import step_rows

    rows = {
        row["name"]: row
        for row in step_rows.against("ref", side(1.0, 1.0, 2.0), side(4.0, 6.0, 12.0, peak=3 << 30))
    }
    assert rows["score+update/ref"]["ratio"] == pytest.approx(6.0) and rows["step/ref"][
        "ratio"
    ] == pytest.approx(5.5)
    assert rows["memory/ref"]["ratio"] == pytest.approx(3.0) and rows["memory/ref"]["ours"] == pytest.approx(
        1.0
    )
    assert rows["tokens per second/ref"]["ours"] == pytest.approx(25.0)
    three = {
        **side(1.0, 1.0, 1.0),
        "steps": [{"rollout": t, "score": 0.0, "update": 0.0, "tokens": 10} for t in (1.0, 9.0, 2.0)],
    }
    assert step_rows.seconds(three, "step") == 2.0  # the median, not the mean
    grown = step_rows.grown(4, side(1.0, 0.0, 0.0), side(2.0, 0.0, 0.0, peak=2 << 30, tokens=400))
    assert [(row["name"], row["ours"], row["other"]) for row in grown] == [
        ("growth/4x", 200.0, 100.0),
        ("growth memory/4x", 2.0, 1.0),
    ]
    (two,) = step_rows.divided(side(1.0, 0.0, 0.0), side(1.0, 0.0, 0.0, tokens=150), 2)
    assert two["ratio"] == pytest.approx(200 / 150) and two["note"].startswith("efficiency 75%")


def test_what_was_not_run_says_so_and_targets_are_judged():
    import step_rows

    rows = step_rows.against("ref", side(1.0, 1.0, 1.0), "not run: safe_rlhf is not importable")
    assert [row["name"] for row in rows] == ["score+update/ref", "step/ref", "memory/ref"]
    assert all(row["ratio"] is None and row["note"] == "not run: safe_rlhf is not importable" for row in rows)
    assert step_rows.outcome(rows[0], "cpu", "cpu-small") == "≥ 5: not measured"
    fast = step_rows.row("step/ref", 1.0, 2.5, "s")
    assert step_rows.outcome(fast, "cpu", "cpu-small") == "≥ 2, aim 3: met"
    assert step_rows.outcome(fast, "cuda", "0.5b") == "≥ 5: missed"
    assert step_rows.outcome(fast, "cpu", "tiny") == ""
    assert step_rows.outcome(step_rows.row("step/trl", 1.0, 2.0, "s"), "cpu", "cpu-small") == ""
    text = "\n".join(step_rows.table([*rows, fast], "cpu", "cpu-small"))
    assert (
        "| step/ref | 1 s | 2.5 s | 2.50 | ≥ 2, aim 3: met |" in text
        and "safe_rlhf is not importable" in text
    )


def test_a_side_that_computes_something_else_has_no_ratio():
    import bench_step

    ours, same, wrong = (
        side(1, 1, 1, logp=-100.0, cost=0.0),
        side(1, 1, 1, logp=-100.01),
        side(1, 1, 1, logp=-101.0, cost=0.0),
    )
    assert bench_step.compared(ours, same, 1e-3) is same
    assert bench_step.compared(ours, wrong, 1e-3) == "failed: computes something else than ours: logp"
    assert bench_step.compared(ours, "not run: x", 1e-3) == "not run: x"


def test_help_teaches(bench):
    code, out, _ = bench("--help")
    assert code == 0
    for word in (
        "--json FILE",
        "--model",
        "--only",
        "--growth",
        "--processes",
        "--quick",
        "safe_rlhf",
        "examples:",
        "other / ours",
    ):
        assert word in out, word


def test_missing_data_is_named(tmp_path, bench):
    code, _, err = bench("--model", "tiny", "--data", tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl is not there" in err


@pytest.mark.numeric
def test_end_to_end(rows_file, tmp_path, bench):
    """Ours, the padded, unfused form and, where it is importable, the reference on a tiny model; they must
    agree.
    """
    code, out, err = bench(
        "--model", "tiny", "--quick", "--data", rows_file, "--json", tmp_path / "rows.json", "--no-trl"
    )
    assert code == 0, out[-2000:] + err[-4000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) == FIELDS for row in rows)
    named = {row["name"]: row for row in rows}
    for part in ("score+update", "step", "memory"):
        unfused = named[f"{part}/unfused"]
        assert unfused["ours"] > 0 and unfused["ratio"] == pytest.approx(unfused["other"] / unfused["ours"])
        reference = named[f"{part}/ref"]
        if importlib.util.find_spec("safe_rlhf") is None:
            assert reference["note"] == "not run: safe_rlhf is not importable"
        else:
            assert reference["ratio"] or reference["note"].startswith("not run: safe_rlhf needs")
        assert named[f"{part}/trl"]["note"] == "not run: not asked for"
    parts = named["rollout/unfused"]["ours"] + named["score+update/unfused"]["ours"]
    assert named["step/unfused"]["ours"] == pytest.approx(parts, rel=1e-6)
    assert "| step/unfused |" in out and "--quick" in named["step/unfused"]["command"]
