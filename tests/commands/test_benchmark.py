"""`saferlhf-fast bench`: saves, compares, fails on what became slower and names it; one line for what it does
not take.
"""

import json
import sys

import pytest
import torch

from saferlhf_fast import cli
from saferlhf_fast.commands import bench


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """The command sets variables and a search path for the process that it usually has for itself."""
    for name, value in {
        "BENCH_TINY": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "0",
        "BENCH_QUICK": "0",
        "BENCH_TURNS": "1",
        "BENCH_PROGRESS": "0",
        "BENCH_COMMAND": "",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", [str(bench.BENCH), *sys.path])
    monkeypatch.setattr(bench, "TURNS", {True: 2, False: 1})
    before, threads = set(sys.modules), torch.get_num_threads()
    # as many as the processes that measure: the device's name has them
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    # the benches' modules read the variables when they are imported
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(bench.BENCH)):
            del sys.modules[name]


def entry(version, seconds, op="gae", shape="8x8"):
    row = {
        "op": op,
        "shape": shape,
        "version": version,
        "seconds": seconds,
        "best": seconds,
        "reads": 0,
        "writes": 0,
        "flops": 0,
        "dtype": "float32",
        "device": "cpu",
        "error": 1e-7,
        "auto": version == "native",
    }
    return {
        "name": version,
        "fullname": f"bench_{op}.py::test[{version}]",
        "extra_info": row,
        "stats": {"median": seconds},
    }


def results(*entries, device="A CPU, 2 thread(s)", **machine):
    return {
        "machine_info": {
            "device": device,
            "torch": "2",
            "version": "1",
            "date": "2026-01-02",
            "quick": False,
            **machine,
        },
        "benchmarks": list(entries),
        "not_measured": [],
    }


@pytest.fixture
def measure(monkeypatch):
    """Replaces the measuring; its `runs` are what the next runs give, `asked` what they were asked for."""
    import ceilings

    monkeypatch.setattr(ceilings, "device_name", lambda: "A CPU, 2 thread(s)")

    def measured(arguments):
        measured.asked.append(arguments)
        return measured.runs.pop(0), measured.failed

    measured.runs, measured.asked, measured.failed = [], [], []
    monkeypatch.setattr(bench, "measured", measured)
    return measured


def stored(tmp_path, *entries, **machine):
    path = tmp_path / "base.json"
    path.write_text(json.dumps(results(*entries, **machine)))
    return path


def test_saved_and_compared_for_real(tmp_path, capfd, monkeypatch):
    """One op on tiny shapes: a stored time made smaller by hand is a regression, the others are equal to
    themselves within a factor.
    """
    base = tmp_path / "base.json"
    assert cli.main(["bench", "--quick", "--ops", "gae", "--save", str(base)]) == 0
    out, err = capfd.readouterr()
    assert "ours: reference" in out and f"wrote {base}" in out and "Targets" not in out
    assert "[1/" in err and "gae, 4x160, eager:" in err
    found = json.loads(base.read_text())
    versions = {row["extra_info"]["version"]: row["extra_info"] for row in found["benchmarks"]}
    assert {"eager", "reference"} <= set(versions) and len(versions["eager"]["turns"]) == 2
    # one entry a row, whatever the number of turns
    assert len(found["benchmarks"]) == len(versions)
    versions["reference"]["best"] /= 1000
    base.write_text(json.dumps(found))
    monkeypatch.setattr(bench, "TRIES", 0)
    assert cli.main(["bench", "--compare", str(base), "--worse", "900"]) == 1
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[2].split(" | ")[0:3] == ["| gae", "4x160", "reference"] and "REGRESSION" in lines[2]
    assert not any("REGRESSION" in line for line in lines[3:])


def test_regressions_stand_on_top_and_the_rest_has_its_verdict(tmp_path, measure, capsys):
    path = stored(
        tmp_path,
        entry("eager", 1.0),
        entry("native", 0.5),
        entry("reference", 0.8),
        entry("triton", 0.3),
        *(entry(version, time, shape="1x1") for version, time in (("eager", 1.0), ("native", 0.5))),
    )
    fresh = results(
        entry("eager", 2.0),
        entry("native", 1.2),
        entry("reference", 1.0),
        *(entry(version, time, shape="1x1") for version, time in (("eager", 1.0), ("native", 0.52))),
    )
    measure.runs = [fresh] * 3
    assert cli.main(["bench", "--compare", str(path)]) == 1
    out = capsys.readouterr().out
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if line.startswith("|")
    ]
    assert table[0] == ["op", "shape", "version", "time over", "was", "now", "change", "verdict"]
    assert table[2:] == [
        ["gae", "8x8", "native", "eager", "0.5", "0.6", "+20.0%", "REGRESSION"],
        ["gae", "8x8", "triton", "eager", "0.3", "", "", "GONE"],
        ["gae", "1x1", "native", "eager", "0.5", "0.52", "+4.0%", "same"],
        ["gae", "8x8", "reference", "eager", "0.8", "0.5", "-37.5%", "faster"],
    ]
    assert out.endswith("1 of 4 rows became slower by more than 10 %; 1 were not measured any more\n")
    assert "eager torch takes 1.50 x" in out and measure.asked[0] == ["--ours", "bench_gae.py"]
    assert measure.asked[1] == ["--ours", "bench_gae.py::test[eager]", "bench_gae.py::test[native]"]


@pytest.mark.parametrize("worse, code", [("10", 1), ("30", 0), ("25%", 0), ("0", 1)])
def test_worse_is_the_limit(tmp_path, measure, worse, code):
    path = stored(tmp_path, entry("eager", 1.0), entry("native", 0.5))
    measure.runs = [results(entry("eager", 1.0), entry("native", 0.6))] * 3
    assert cli.main(["bench", "--compare", str(path), "--worse", worse]) == code


def test_a_slower_machine_is_none_of_ours_unless_times_are_asked_for(tmp_path, measure, capsys):
    path = stored(tmp_path, entry("eager", 1.0), entry("native", 0.5))
    measure.runs = [results(entry("eager", 3.0), entry("native", 1.5))] * 4
    assert cli.main(["bench", "--compare", str(path)]) == 0
    assert "eager torch takes 3.00 x what it took then" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", str(path), "--times"]) == 1
    assert "one second" in capsys.readouterr().out


def test_a_disturbed_measurement_is_forgiven(tmp_path, measure):
    path = stored(tmp_path, entry("eager", 1.0), entry("native", 0.5))
    slow, fine = (results(entry("eager", 1.0), entry("native", time)) for time in (0.9, 0.5))
    measure.runs = [slow, slow, fine]
    assert cli.main(["bench", "--compare", str(path)]) == 0 and not measure.runs


def test_what_the_file_has_is_measured_again_in_its_shapes(tmp_path, measure, monkeypatch):
    path = stored(
        tmp_path,
        entry("eager", 1.0),
        entry("native", 0.5),
        entry("eager", 1.0, "ppo_loss"),
        entry("native", 0.5, "ppo_loss"),
        quick=True,
    )
    both = results(*json.loads(path.read_text())["benchmarks"])
    measure.runs = [both, both]
    assert cli.main(["bench", "--compare", str(path)]) == 0
    assert (
        measure.asked.pop() == ["--ours", "bench_gae.py", "bench_ppo_loss.py"]
        and bench.os.environ["BENCH_QUICK"] == "1"
    )
    # the other op's rows are not missed
    assert cli.main(["bench", "--compare", str(path), "--ops", "gae"]) == 0
    assert measure.asked == [["--ours", "bench_gae.py"]]


def test_another_device_or_version_is_named(tmp_path, measure, capsys):
    path = stored(tmp_path, entry("eager", 1.0), entry("native", 0.5), device="A CPU, 4 thread(s)", torch="1")
    measure.runs = [results(entry("eager", 1.0), entry("native", 0.5))]
    assert cli.main(["bench", "--compare", str(path)]) == 2
    assert (
        "expected results of A CPU, 2 thread(s), got those of A CPU, 4 thread(s)" in capsys.readouterr().err
    )
    assert not measure.asked  # told before anything is measured
    assert cli.main(["bench", "--compare", str(path), "--force"]) == 0
    out = capsys.readouterr().out
    assert (
        "differs: torch: 1 then, 2 now" in out
        and "differs: device: A CPU, 4 thread(s) then, A CPU, 2 thread(s) now" in out
    )


def test_either_figure_of_an_edited_file_counts(tmp_path, measure):
    path = stored(tmp_path, entry("eager", 1.0), {**entry("native", 0.5), "stats": {"min": 0.25}})
    measure.runs = [results(entry("eager", 1.0), entry("native", 0.5))] * 3
    assert cli.main(["bench", "--compare", str(path)]) == 1


def test_wrong_results_fail_and_are_not_kept(tmp_path, measure, capsys):
    measure.runs, measure.failed = (
        [results(entry("eager", 1.0))],
        ["FAILED bench_gae.py::test[native] - wrong: off by 1"],
    )
    assert cli.main(["bench", "--ops", "gae", "--save", str(tmp_path / "base.json")]) == 1
    out, err = capsys.readouterr()
    assert "failed: FAILED bench_gae.py::test[native] - wrong" in out and "was not written" in err
    assert not list(tmp_path.iterdir())


def test_a_file_is_overwritten_only_by_force(tmp_path, measure, capsys):
    path = stored(tmp_path, entry("eager", 1.0))
    before = path.read_text()
    measure.runs = [results(entry("eager", 2.0))]
    assert cli.main(["bench", "--save", str(path)]) == 2 and path.read_text() == before and not measure.asked
    assert capsys.readouterr().err == f"error: --save {path}: exists already; --force overwrites it\n"
    assert cli.main(["bench", "--save", str(path), "--force"]) == 0 and path.read_text() != before


NOT_OURS = [
    "",
    "[]",
    "{}",
    "not json",
    '{"machine_info": {}, "benchmarks": []}',
    '{"machine_info": 3, "benchmarks": [1]}',
    '{"machine_info": {"device": "x"}, "benchmarks": [{"extra_info": {"op": "gae"}}]}',
    '{"machine_info": {"device": "x"}, "benchmarks": [{"stats": {}}]}',
    "\x00\x01",
    '{"machine_info": {"device": "x"}}',
]


@pytest.mark.parametrize(
    "device, shape, line",
    [
        (3, "8x8", "machine_info.device: expected a name, got 3"),
        ("x", 8, "shape of an entry: expected a text, got 8"),
    ],
)
def test_a_value_of_another_type_is_named(tmp_path, device, shape, line, capsys):
    path = stored(tmp_path, entry("eager", 1.0, shape=shape), device=device)
    assert cli.main(["bench", "--compare", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: {line}\n"


@pytest.mark.parametrize("text", NOT_OURS)
def test_a_file_that_is_none_of_ours(tmp_path, text, capsys):
    (tmp_path / "x.json").write_bytes(text.encode() + (b"\xff" if "\x00" in text else b""))
    assert cli.main(["bench", "--compare", str(tmp_path / "x.json")]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith(f"error: {tmp_path}/x.json: expected a file of saferlhf-fast bench --save")
        and err.count("\n") == 1
    )


@pytest.mark.parametrize(
    "words, line",
    [
        (
            ["--compare", "absent.json"],
            "error: absent.json does not exist; saferlhf-fast bench --save absent.json writes it",
        ),
        (
            ["--compare", "."],
            "error: .: expected a file of saferlhf-fast bench --save, got one that cannot be read",
        ),
        (
            ["--save", "no/where/x.json"],
            "error: --save no/where/x.json: expected a file in a folder that exists",
        ),
        (["--save", "."], "error: --save .: expected a file in a folder that exists"),
        (
            ["--ops", "gea"],
            "error: bench: --ops: unknown op 'gea'; did you mean gae?; there is gae, linear_logprob",
        ),
        (["--ops"], "error: bench: --ops: expected names of ops after it"),
        (["--save"], "error: bench: --save: expected a file after it"),
        (["--worse", "-5"], "error: bench: --worse: expected per cent, 0 or more, got -5"),
        (["--worse", "much"], "error: bench: --worse: expected per cent, 0 or more, got much"),
        (["--worse=nan"], "error: bench: --worse: expected per cent, 0 or more, got nan"),
        (["--worse=inf"], "error: bench: --worse: expected per cent, 0 or more, got inf"),
        (["--quick=1"], "error: bench: --quick takes no value, got 1"),
        (["--quick", "--quick"], "error: bench: --quick is given twice"),
        (
            ["gae"],
            "error: bench: expected one of --ops, --quick, --save, --compare, --worse, --times, --force, got "
            "gae",
        ),
        (["--slow"], "error: bench: expected one of --ops"),
        (["--processes", "2"], "error: --processes: bench runs in one process"),
    ],
)
def test_bad_words_get_one_line(words, line, capsys):
    assert cli.main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


def test_a_file_of_other_ops_shapes_or_times(tmp_path, measure, capsys):
    path = stored(tmp_path, entry("eager", 1.0), entry("native", 0.5))
    assert cli.main(["bench", "--compare", str(path), "--ops", "ppo_loss"]) == 2
    assert "has no rows in common with this run: expected ppo_loss, got gae" in capsys.readouterr().err
    assert cli.main(["bench", "--compare", str(path), "--quick"]) == 2
    assert "was measured without it" in capsys.readouterr().err
    measure.runs = [results(entry("eager", 1.0, shape="9x9"), entry("native", 0.5, shape="9x9"))]
    assert cli.main(["bench", "--compare", str(path)]) == 2
    assert "expected shapes as in gae, 9x9, native, got gae, 8x8, native" in capsys.readouterr().err
    for wrong in (0, -1.0, "fast", float("nan"), float("inf"), None):
        path = stored(tmp_path, entry("eager", wrong), entry("native", 0.5))
        assert cli.main(["bench", "--compare", str(path)]) == 2
        assert "gae, 8x8, eager: expected a time above 0, got" in capsys.readouterr().err
    path = stored(tmp_path, entry("eager", 1.0, "dpo_loss"))
    assert cli.main(["bench", "--compare", str(path)]) == 2
    assert "got dpo_loss" in capsys.readouterr().err


def test_a_file_without_eager_rows_compares_nothing(tmp_path, measure, capsys):
    path = stored(
        tmp_path, entry("native", 0.5), entry("reference", 0.7), entry("reference", 0.7, "ppo_loss")
    )
    assert cli.main(["bench", "--compare", str(path)]) == 2 and not measure.asked
    err = capsys.readouterr().err
    assert (
        "got 3 rows of saferlhf-fast without either; --times compares the times themselves" in err
        and err.count("\n") == 1
    )
    measure.runs = [results(*json.loads(path.read_text())["benchmarks"])]
    assert cli.main(["bench", "--compare", str(path), "--times"]) == 0 and capsys.readouterr()
    path = stored(tmp_path, entry("eager", 1.0))
    assert cli.main(["bench", "--compare", str(path)]) == 2
    err = capsys.readouterr().err
    assert (
        "got no row of saferlhf-fast; saferlhf-fast bench --save writes a whole file" in err
        and err.count("\n") == 1
    )


def test_a_row_without_its_eager_one_is_not_counted_as_compared(tmp_path, measure, capsys):
    rows = [entry("eager", 1.0), entry("native", 0.5), entry("native", 0.5, "ppo_loss")]
    measure.runs = [results(*rows)]
    assert cli.main(["bench", "--compare", str(stored(tmp_path, *rows))]) == 0
    assert (
        "no regression past 10 % in 1 row; 1 could not be compared: no eager torch in that file"
        in capsys.readouterr().out
    )


def test_a_row_near_the_floor_needs_no_eager_one(tmp_path, measure):
    def near(seconds):
        made = entry("native", seconds)
        made["extra_info"]["reads"] = 10**9
        return made

    rates = {"ceilings": {"read_gb_s": 1.0, "copy_gb_s": 1.0}}  # the floor is a second
    measure.runs = [results(near(2.0), **rates), *[results(near(3.0), **rates)] * 3]
    path = stored(tmp_path, near(2.0), **rates)
    assert (
        cli.main(["bench", "--compare", str(path)]) == 0 and cli.main(["bench", "--compare", str(path)]) == 1
    )
    # far from it
    assert cli.main(["bench", "--compare", str(stored(tmp_path, near(40.0), **rates))]) == 2


def test_a_faster_eager_torch_raises_ratios_too_and_help_says_so(tmp_path, measure, capsys):
    path = stored(tmp_path, entry("eager", 1.0), entry("native", 0.5))
    measure.runs = [results(entry("eager", 0.5), entry("native", 0.5))] * 3
    assert cli.main(["bench", "--compare", str(path)]) == 1
    assert "eager torch takes 0.50 x what it took then" in capsys.readouterr().out
    assert (
        "so does a faster eager torch" in bench.help_text()
        and "only a slower kernel" not in bench.help_text()
    )


def test_help_teaches_and_names_every_op_and_flag(capsys):
    assert cli.main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in bench.known_ops()) and len(bench.known_ops()) == 8
    assert all(f"--{field} " in text for field in bench.Request._fields)
    for line in text.split("examples:")[1].splitlines():
        if line.strip():  # every example can be read
            bench.request(
                line.split("   ")[0].split()[2:]
                if line.startswith("  saferlhf") and "   " in line.strip()
                else line.split()[2:]
            )
    assert max(map(len, text.splitlines())) <= 130
