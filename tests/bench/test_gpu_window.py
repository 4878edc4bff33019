"""bench/gpu_window.py without a GPU: rehearsed whole, and what it does with sections that raise, run out of
time or hang.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}


@pytest.fixture(autouse=True, scope="module")
def bench_modules():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def rehearse(out, kind, *more):
    """(rows, what was printed) of a whole rehearsal."""
    result = subprocess.run(
        [sys.executable, str(BENCH / "gpu_window.py"), str(out), "--rehearse", kind, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()], result.stdout


def of_kind(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def names(rows):
    return {(row["op"].split(",")[0].split(" ")[0], row["version"]) for row in of_kind(rows, "row")}


OURS = {
    "token_logprob",
    "linear_logprob",
    "linear_ppo_loss",
    "ppo_loss_from_logits",
    "gae",
    "ppo_lag_advantage",
    "ppo_loss",
    "value_loss",
}


def in_the_interpreter(out, *more):
    """(rows, {section: how it ended}, the rows of checks) of a rehearsal in which nothing may be wrong."""
    rows, printed = rehearse(out, "interpreter", "--seconds", "560", *more)
    assert not of_kind(rows, "failure") and not of_kind(rows, "test")
    ended = {row["section"]: row["ended"] for row in of_kind(rows, "section")}
    assert {ended[name] for name in ended if name != "counters"} == {"done"} and "ncu" in ended["counters"]
    for section in ended:
        assert any(row["section"] == section and row["kind"] != "section" for row in rows), section
    assert all(row["wrong"] == "" for row in of_kind(rows, "row"))
    checks = of_kind(rows, "check")
    assert {row["op"] for row in checks} == OURS and {row["result"] for row in checks} == {"right"}
    assert {row["impl"] for row in checks} == {"triton", "native"}
    table = (out / "table.md").read_text()
    assert printed.endswith(table) and len(table) < 10_000 and "A rehearsal (interpreter)" in table
    figures = of_kind(rows, "figure")
    assert any(row["what"] == "tests on the device" and "1 passed" in row["value"] for row in figures)
    return rows, ended


@pytest.mark.timeout(600)
def test_tests_checks_and_rows_of_tokens_run_in_the_interpreter(tmp_path):
    sections = ["device", "build and tests", "rows of tokens", "counters"]
    rows, ended = in_the_interpreter(tmp_path, "--only", *sections)
    assert list(ended) == sections
    scans = {"gae", "ppo_lag_advantage", "ppo_loss", "value_loss"}
    assert {op for op, version in names(rows) if version == "triton"} == scans


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_section_gives_rows_in_the_interpreter(tmp_path):
    rows, ended = in_the_interpreter(tmp_path)
    import gpu.sections

    assert list(ended) == [name for name, *_ in gpu.sections.first()]
    assert {op for op, version in names(rows) if version == "triton"} >= OURS
    variants = {
        "triton, threads first",
        "triton, 16 warps",
        "triton, 4 warps",
        "triton, hints to the cache",
        "triton, chunks",
        "triton, 1 tiles a program",
        "triton, 8 tiles a program",
        "triton, chunks of 2",
    }
    assert {version for _, version in names(rows)} >= variants


def test_kernels_are_compiled_where_the_interpreter_cannot_run(tmp_path):
    """Each Triton row says that it was not run; the others are there; a wrong kernel source would be a
    failure.
    """
    rows, printed = rehearse(tmp_path, "compiler", "--only", "device", "linear", "logits", "rows of tokens")
    assert not of_kind(rows, "failure")
    assert not any("triton" in version for _, version in names(rows)), "a launch that was faked has no time"
    assert {op for op, version in names(rows) if version == "native"} >= OURS - {"token_logprob"}
    reasons = {row["what"]: row["reason"] for row in of_kind(rows, "not run")}
    compiled = {what for what, reason in reasons.items() if "compiled for sm_90" in reason}
    assert {what.split()[0] for what in compiled} >= OURS
    assert any("threads first" in what for what in compiled) and any("hints" in what for what in compiled)
    assert "not run" in printed and "A rehearsal (compiler)" in printed


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {bench!r})
import gpu_window
gpu_window.GRACE, gpu_window.RESERVE = 0.5, 0.5

def fine(window):
    window.emit("figure", what="fine", value=1)

def raises(window):
    window.attempt("a row", lambda: 1 / 0)      # costs itself alone
    window.emit("figure", what="after it", value=1)
    raise RuntimeError("broken\\nin two lines")

def slow(window):
    time.sleep(60)

def deaf(window):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    child = window.start(["sleep", "60"], "child.log")
    window.emit("figure", what="child", value=child.pid)
    time.sleep(60)

sections = [
    ("first", 1, fine), ("raises", 1, raises), ("slow", 1, slow), ("deaf", 1, deaf), ("last", 20, fine)
]
sys.exit(gpu_window.main(sections=sections))
"""


def test_a_section_costs_its_own_rows_alone(tmp_path):
    """One raises, one sleeps past its time, one does not hear the alarm: the others have their rows, and no
    child is left.
    """
    script = tmp_path / "window.py"
    script.write_text(SCRIPT.format(bench=str(BENCH)))
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, str(script), str(out), "--seconds", "30", "--commit", "abc"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    ended = {row["section"]: row["ended"] for row in of_kind(rows, "section")}
    assert list(ended) == ["first", "raises", "slow", "deaf", "last"]
    assert (
        ended["first"] == ended["last"] == "done" and ended["raises"] == "RuntimeError: broken in two lines"
    )
    assert "out of time" in ended["slow"] and ended["deaf"] == "hung"
    figures = {(row["section"], row["what"]): row["value"] for row in of_kind(rows, "figure")}
    assert figures["first", "fine"] == figures["last", "fine"] == figures["raises", "after it"] == 1
    assert "ZeroDivisionError: division by zero" in {row["error"] for row in of_kind(rows, "failure")}
    with pytest.raises(ProcessLookupError):
        os.kill(figures["deaf", "child"], 0)
    assert len(of_kind(rows, "run")) == 1 and rows[0]["commit"] == "abc"
    assert "hung" in result.stdout and "broken in two lines" in result.stdout


BROKEN = """
import sys
sys.path.insert(0, {bench!r})
import gpu_window
gpu_window.RESERVE, gpu_window.START = 0.5, 0
gpu_window.answers = lambda: not broken     # as a process whose kernel has read where nothing is
broken = []

def breaks():
    broken.append(1)
    raise RuntimeError("an illegal memory access was encountered")

def row(what):
    return lambda: window.emit("figure", what=what, value=1)

def rows(given):
    global window
    window = given
    window.attempt("first", row("first"))
    window.attempt("around", lambda: window.attempt("breaks", breaks))
    window.attempt("first", row("first of another shape"))
    window.attempt("last", row("last"))

def outside(window):
    window.emit("figure", what="outside", value=1)
    breaks()

def after(window):
    window.emit("figure", what="after", value=1)

sections = [("rows", 20, rows), ("outside", 20, outside), ("after", 20, after)]
sys.exit(gpu_window.main(sections=sections))
"""


def test_a_broken_context_costs_one_row_and_a_new_process(tmp_path):
    """After an illegal access every call of a process is an error: a new one goes on behind the row that did
    it.
    """
    script = tmp_path / "window.py"
    script.write_text(BROKEN.format(bench=str(BENCH)))
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, str(script), str(out), "--seconds", "60"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["what"] for row in of_kind(rows, "figure")] == [
        "first",
        "first of another shape",
        "last",
        "outside",
        "after",
    ]
    assert [(row["section"], row["what"]) for row in of_kind(rows, "failure")] == [
        ("rows", "breaks"),
        ("outside", "outside"),
    ]
    assert [row["section"] for row in of_kind(rows, "section")] == ["rows", "outside", "after"]
    assert len(of_kind(rows, "run")) == 1 and len(of_kind(rows, "tried")) == 2


LOG = """
[gw1] [  3%] PASSED tests/kernels/test_gae.py::test_a[triton-cuda]
[gw0] [  4%] FAILED tests/kernels/test_gae.py::test_b[k3 and entropy-triton-cuda]
"""


def test_what_pytest_says_is_read_though_it_was_ended(tmp_path):
    import gpu.sections
    import gpu_window

    window = gpu_window.Window(tmp_path, 100, clock=lambda: 1.0)
    (tmp_path / "tests.log").write_text(LOG)
    gpu.sections.report_tests(window, None, None)
    test = "tests/kernels/test_gae.py::test_b[k3 and entropy-triton-cuda]"
    (tmp_path / "tests.log").write_text(
        f"{LOG}FAILED {test} - assert 1 == 2\n===== 1 failed, 1 passed in 3.2s =====\n"
    )
    gpu.sections.report_tests(window, None, 1)
    rows = [json.loads(line) for line in window.path.read_text().splitlines()]
    assert [row["error"] for row in of_kind(rows, "test")] == ["failed", "assert 1 == 2"]
    assert {row["test"] for row in of_kind(rows, "test")} == {test}
    assert [row["value"] for row in of_kind(rows, "figure")] == [
        "1 passed, 1 failed (ended when the time was up; see tests.log)",
        "1 failed, 1 passed in 3.2s",
    ]


def test_a_clock_that_runs_ahead(tmp_path):
    """Sections that run out of time say so row by row, and those after them have the time that was planned
    for them.
    """
    import gpu_window

    now = [0.0]
    window = gpu_window.Window(tmp_path, 100, clock=lambda: now[0])

    def rows_of(seconds, count):
        def section(window):
            for at in range(count):
                window.attempt(f"row {at}", lambda: now.__setitem__(0, now[0] + seconds))
                window.emit("figure", what=at, value=now[0])

        return section

    gpu_window.run(
        window,
        [
            ("long", 30, rows_of(8, 9)),
            ("short", 10, rows_of(1, 3)),
            ("late", 100, rows_of(50, 3)),
            ("never", 10, rows_of(1, 1)),
        ],
    )
    rows = [json.loads(line) for line in window.path.read_text().splitlines()]
    shown = {
        section: [row["value"] for row in of_kind(rows, "figure") if row["section"] == section]
        for section in ("long", "short", "late", "never")
    }
    assert shown == {"long": [8, 16, 24, 32], "short": [33, 34, 35], "late": [85], "never": []}
    ended = {row["section"]: row["ended"] for row in of_kind(rows, "section")}
    assert ended["short"] == "done" and all(
        "out of time" in ended[name] for name in ("long", "late", "never")
    )
    assert [(row["section"], row["what"]) for row in of_kind(rows, "not run")] == [
        ("long", "row 4"),
        ("late", "row 1"),
    ]


def test_the_table_of_a_file_that_was_cut_short(tmp_path, capsys):
    """A killed window leaves a table, marked rows in it; figures stand beside their predictions; too many
    rows are cut.
    """
    import gpu_window
    from gpu import predictions

    window = gpu_window.Window(tmp_path, 100, clock=lambda: 1.0)
    window.emit("run", commit="abc", date="2026-01-02", command="c", rehearsal="")
    window.emit("device", device="NVIDIA H200", torch="2", triton="3", numpy="2", python="3.12", state="")
    window.emit("ceilings", copy_gb_s=4000.0, read_gb_s=4000.0, bfloat16_tflop_s=700.0)
    row = dict(
        op="token_logprob + entropy forward",
        shape=predictions.LOGITS,
        version="triton",
        auto=True,
        reads=2.4e9,
        writes=0,
        flops=0,
        dtype="bfloat16",
        seconds=0.00065,
        wrong="",
        peak=0,
        launches=1,
    )
    window.emit("row", **row)
    window.emit(
        "row",
        **row
        | dict(op="gae", shape=predictions.LONG, version="native", wrong="wrong: off by 3.0e+00", call=3e-5),
    )
    with open(window.path, "a") as file:
        file.write('{"kind": "row", "op": "ga')
    assert gpu_window.main(["--table", str(window.path)]) == 0
    printed = capsys.readouterr().out
    assert "| triton | 650.0 µs | 620.0 µs - 720.0 µs | 1.08x | 3692 GB/s, 1 launches |" in printed
    assert "wrong: off by 3.0e+00" in printed and "cut short" in printed
    assert "at most 0.64 ms: 0.65, missed" in printed and "TFLOP/s: not measured" in printed
    for at in range(300):
        window.emit("row", **row | dict(version=f"number {at}"))
    gpu_window.main(["--table", str(window.path)])
    printed = capsys.readouterr().out
    assert len(printed) < 10_000 and "more rows are in rows.jsonl" in printed and "cut short" in printed
    assert predictions.ratio(row) == pytest.approx(0.65 / 0.67)


def test_without_a_device_nothing_is_measured(tmp_path):
    """nvidia-smi may name a GPU that torch cannot use: the processor's figures would say nothing."""
    bare = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", "PATH": str(tmp_path)}  # no git, no nvidia-smi
    result = subprocess.run(
        [sys.executable, str(BENCH / "gpu_window.py"), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=bare,
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert result.returncode == 1 and "torch sees no CUDA device" in result.stdout, result.stderr
    assert [row["section"] for row in of_kind(rows, "section")] == ["device"] and not of_kind(rows, "row")


NCU = """
==PROF== Disconnected from process 77
[77] python3.12@127.0.0.1
  forward_kernel (8192, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    SM Frequency                    Ghz         1.72
    Elapsed Cycles                cycle    1,123,456
    Memory Throughput                 %        88.15
    Duration                         us       652.30

  void saferlhf::cuda::<unnamed>::gae_kernel<float, (bool)1>(T1 *, T1 *) (132, 1, 1)x(256, 1, 1), Context 1
    Achieved Occupancy                %        41.00
"""


def test_what_ncu_prints_is_read():
    import gpu.sections

    assert list(gpu.sections.counted(NCU)) == [
        ("forward_kernel", {"Memory Throughput, %": "88.15", "Duration, us": "652.30"}),
        ("gae_kernel", {"Achieved Occupancy, %": "41.00"}),
    ]


def test_the_second_command_repeats_the_best_and_what_surprised(tmp_path, monkeypatch):
    import gpu.sections
    import gpu_window
    from gpu import predictions

    kept = [
        dict(
            kind="row",
            section="logits",
            what=version,
            op="token_logprob + entropy forward",
            shape=predictions.LOGITS,
            version=version,
            seconds=seconds,
            wrong=wrong,
        )
        for version, seconds, wrong in (
            ("triton", 0.9, ""),
            ("triton, 16 warps", 0.5, ""),
            ("triton, 4 warps", 0.1, "wrong"),
            ("eager", 0.2, ""),
        )
    ]
    monkeypatch.setattr(gpu.sections, "kept_rows", lambda: kept)
    seen = []
    for name in ("tokens", "logits", "linear"):
        monkeypatch.setattr(gpu.sections, name, lambda window: seen.append(set(window.wanted)))
    gpu.sections.once_more(gpu_window.Window(tmp_path, 100, clock=lambda: 1.0))
    assert seen == [{"triton", "triton, 16 warps"}] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a folder for the results"),
        (["--table", "none.jsonl"], "expected a file of rows, got none.jsonl"),
        (["out", "--rehearse", "magic"], "invalid choice"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    import gpu_window

    with pytest.raises(SystemExit) as ended:
        gpu_window.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_gpu_sh_says_what_it_lacks(tmp_path):
    """Without a GPU it ends before it builds anything; the shell can read it."""
    script = BENCH / "gpu.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0

    def start(*arguments):
        return subprocess.run(
            ["bash", str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**ENVIRONMENT, "PYTHON": sys.executable},
        )

    assert start().returncode == 2 and "usage: " in start("out", "twice").stderr
    result = start("out")
    assert result.returncode == 1 and "no GPU" in result.stderr and "--rehearse interpreter" in result.stderr
