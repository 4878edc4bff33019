"""The benches: every one runs and is right on tiny shapes; tables, targets, floors and the comparison on
made-up results; memory on allocations of known size; the chunked scan against the loop; peers that are
missing say why.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
TINY = {"BENCH_TINY": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}


@pytest.fixture(autouse=True, scope="module")
def bench_modules():
    """The benches import each other by their bare names."""
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def row(version, seconds, op="an op", shape="8x8", **more):
    return {
        "op": op,
        "shape": shape,
        "version": version,
        "seconds": seconds,
        "best": seconds,
        "reads": 10**9,
        "writes": 0,
        "flops": 0,
        "dtype": "float32",
        "peak": 1 << 30,
        "error": 1e-7,
        "auto": version == "native",
        **more,
    }


def results(*rows, device="A CPU, 2 thread(s)", missing=()):
    """A results file as run.py leaves it. Copying and reading take 1 s for 10 GB."""
    return {
        "machine_info": {
            "device": device,
            "threads": 2,
            "commit": "abc",
            "date": "2026-01-02",
            "torch": "2",
            "command": "c",
            "ceilings": {"copy_gb_s": 10.0, "read_gb_s": 10.0, "float32_tflop_s": 1.0},
        },
        "benchmarks": [
            {
                "name": line["version"],
                "fullname": f"bench/bench_x.py::test[{line['version']}]",
                "extra_info": line,
                "stats": {"median": line["seconds"]},
            }
            for line in rows
        ],
        "not_measured": list(missing),
    }


def test_every_bench_runs_and_is_right_on_tiny_shapes():
    """Without torch.compile, which takes a minute; packages that are not installed are skipped."""
    words = ["-m", "pytest", BENCH, "--benchmark-disable", "-q", "-k", "not compile and not step"]
    result = forked.run([*words, "-p", "no:cacheprovider", "-rs"], timeout=280, env=TINY)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "failed:" not in result.stdout and "AssertionError" not in result.stdout, result.stdout[-4000:]


def test_there_is_a_bench_and_a_test_for_every_room():
    import run

    rooms = run.rooms()
    for room, files in rooms.items():
        assert (
            ROOT / "tests" / "kernels" / f"test_{room}.py" in files and (BENCH / f"bench_{room}.py").exists()
        )
    named = [file for files in rooms.values() for file in files]
    assert len(named) == len(set(named))


def test_a_floor_is_the_longer_of_moving_and_computing():
    import ceilings

    top = {"copy_gb_s": 10.0, "read_gb_s": 20.0, "float32_tflop_s": 2.0}
    assert ceilings.floor({"reads": 10**10, "dtype": "float32"}, top) == pytest.approx(0.5)
    assert ceilings.floor({"reads": 10**10, "writes": 10**10, "dtype": "float32"}, top) == pytest.approx(2.0)
    assert ceilings.floor({"reads": 10**10, "flops": 6 * 10**12, "dtype": "float32"}, top) == pytest.approx(
        3.0
    )
    # its product rate was not measured
    assert ceilings.floor({"reads": 1, "flops": 1, "dtype": "bfloat16"}, top) is None
    assert ceilings.floor({"dtype": "float32"}, top) is None and ceilings.floor({"reads": 1}, None) is None


def test_ceilings_are_measured():
    import ceilings

    assert 0 < ceilings.best(lambda: sum(range(1000)), "cpu", 3) < 1
    assert ceilings.better({"copy_gb_s": 1.0, "read_gb_s": 3.0}, {"copy_gb_s": 2.0, "read_gb_s": 1.0}) == {
        "copy_gb_s": 2.0,
        "read_gb_s": 3.0,
    }


def test_peak_memory_of_known_allocations():
    import memory

    given = torch.ones(1 << 20)

    def step(scratch):
        wide = torch.ones(scratch << 18)  # scratch MiB, gone when the call ends
        return (given * 2, [wide.sum()])  # 4 MiB of outputs

    step(1)
    small, large = (
        memory.above(lambda: step(16), (given,), "cpu"),
        memory.above(lambda: step(80), (given,), "cpu"),
    )
    assert (64 - 8) << 20 < large - small < (64 + 8) << 20
    assert (80 - 8) << 20 < large < (80 + 12) << 20
    assert memory._new_bytes((given, given.view(2, -1)), (given,)) == 0  # written in place: nothing new
    assert memory._new_bytes((torch.ones(256), [given]), (given,)) == 1024


@pytest.mark.numeric
def test_the_chunked_scan_is_the_loop():
    import eager

    torch.manual_seed(0)
    for width in (1, 5, 128, 300):
        mask = torch.arange(width)[None] < torch.tensor([[width], [max(width // 2, 1)], [1]])
        rewards, values = torch.randn(2, 3, width, dtype=torch.float64)
        torch.testing.assert_close(
            eager.gae_chunked(rewards, values, mask), eager.gae_loop(rewards, values, mask)
        )
        tokens, scores = torch.randn(4, 3, width, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
        inputs = (*tokens[:2], *scores, *tokens[2:], torch.tensor(1.5), mask)
        torch.testing.assert_close(eager.advantage_chunked(*inputs), eager.advantage_loop(*inputs))


@pytest.mark.numeric
def test_the_right_answers_are_those_of_autograd():
    import eager
    import exact
    import shapes

    torch.manual_seed(1)
    hidden, weight = torch.randn(40, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    ids = torch.randint(50, (40,))
    logp, lse = exact.linear_logprob(hidden, weight, ids, chunk=16)
    batch = shapes.batch(ids, logp)
    batch = batch._replace(old_logp_N=batch.old_logp_N.double(), advantage_N=batch.advantage_N.double())
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    torch.testing.assert_close(
        logp,
        eager.linear_logprob(hidden.double(), weight.double(), ids),
        check_dtype=False,
        atol=1e-5,
        rtol=1e-5,
    )
    rows, columns = exact.rows_of(40, "cpu"), exact.columns_of(ids, 50)
    losses = {
        "same": eager.linear_ppo(*leaves, batch),
        "cross-entropy": -eager.linear_logprob(*leaves, ids).mean(),
    }
    for means, loss in losses.items():
        right = exact.linear_gradients(
            hidden, weight, ids, lse, exact.derivative(batch, logp, means), rows, columns
        )
        got = torch.autograd.grad(loss, leaves)
        assert exact.error(got[0][rows], right[0]) < 1e-5 and exact.error(got[1][columns], right[1]) < 1e-5
    assert not exact.error(torch.full((3,), float("nan")), torch.ones(3)) <= 1


def test_a_peer_that_is_not_there_says_why(monkeypatch):
    import peers

    def broken():
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(
        peers.PEERS,
        "kind",
        {
            "absent": peers.Peer(
                lambda: __import__("no_such_package_here"),
                "no-such-wheel",
                ("cpu",),
                "same",
                False,
                False,
                False,
            ),
            "broken": peers.Peer(broken, "torch", ("cpu",), "same", False, False, False),
            "gpu": peers.Peer(lambda: len, "torch", ("cuda",), "same", False, False, False),
        },
    )
    for name, reason in (
        ("absent", "no-such-wheel is not installed"),
        ("gpu", "needs a GPU"),
        ("broken", "torch does not import: RuntimeError: first line$"),
    ):
        with pytest.raises(peers.Missing, match=reason):
            peers.load("kind", name, "cpu")


def test_the_table_names_everything():
    import table

    text = "\n".join(
        table.table(
            results(
                row("eager", 0.4),
                row("native", 0.2),
                row("reference", 0.3),
                missing=[{"op": "an op", "version": "A peer", "shape": "8x8", "reason": "is not installed"}],
            )
        )
    )
    assert (
        "| **ours: native** (auto) | 200.00 ms | 2.00x | 100.00 ms | 2.00x | 5 GB/s | 1.00 GiB | 1e-07 |"
        in text
    )
    assert (
        text.index("ours: native") < text.index("ours: reference") < text.index("| eager | 400.00 ms | 1.00x")
    )
    assert "| A peer | an op | is not installed |" in text and "copy 10.0 GB/s" in text
    bare = results(row("native", 0.2))
    del bare["machine_info"]["ceilings"]
    assert (
        "| **ours: native** (auto) | 200.00 ms | not measured | not measured | not measured |"
        in "\n".join(table.table(bare))
    )


def test_outcomes():
    import ceilings
    import targets

    faster = targets.Target("cpu", "an op", "8x8", "times faster", 3, True, ("eager", "other"))
    memory = targets.Target("cpu", "an op", "8x8", "of the memory", 1 / 8, False, ("eager",))

    def ask(target, *rows):
        return targets.value(target, rows, {"copy_gb_s": 10.0, "read_gb_s": 10.0}, ceilings.floor)

    assert ask(faster, row("native", 1.0), row("eager", 4.0)) == 4.0
    # against the fastest of them
    assert ask(faster, row("native", 1.0), row("eager", 4.0), row("other", 2.0)) == 2.0
    assert ask(faster, row("native", 1.0)) is None and ask(faster, row("eager", 1.0)) is None
    assert ask(memory, row("native", 1.0, peak=1), row("eager", 4.0, peak=4)) == 0.25
    assert ask(memory, row("native", 1.0, peak=None), row("eager", 4.0)) is None
    assert ask(
        targets.Target("cpu", "an op", "8x8", "times the floor", 1.5), row("native", 0.2)
    ) == pytest.approx(2.0)
    assert ask(targets.Target("H200", "an op", "8x8", "launches", 1), row("native", 0.2)) is None
    assert [targets.outcome(faster, value) for value in (3.0, 2.9, None)] == ["met", "missed", "not measured"]
    assert [targets.outcome(memory, value) for value in (0.125, 0.2)] == ["met", "missed"]
    for target in targets.TARGETS:
        assert target.what in targets._VALUES and targets.text(target)
        assert targets.applies_to(target, {"device": "NVIDIA H200"}) == (target.where == "H200")
        assert targets.applies_to(target, {"device": "A CPU, 2 thread(s)", "threads": 2}) == (
            target.where == "cpu"
        )


def test_targets_are_about_rows_that_the_benches_measure():
    import shapes
    import targets

    known = {
        shapes.name(shape)
        for table in (shapes.LOGITS, shapes.LINEAR, shapes.LINEAR_LOSS, shapes.ROWS)
        for device in table
        for shape in table[device]
    }
    sources = "".join(path.read_text() for path in BENCH.glob("bench_*.py"))
    for target in targets.TARGETS:
        assert target.shape in known and f'"{target.op}"' in sources, target


def test_a_regression_is_found_and_named(tmp_path, capsys):
    import compare

    stored, fresh = tmp_path / "stored.json", tmp_path / "fresh.json"
    stored.write_text(json.dumps(results(row("eager", 1.0), row("native", 0.5), row("reference", 0.8))))
    fresh.write_text(json.dumps(results(row("eager", 1.0), row("native", 0.56), row("reference", 0.8))))
    assert compare.main([str(stored), str(fresh)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "regression: an op, 8x8, native: 0.56 x eager, was 0.5 x (+12%)",
        "regression: an op, 8x8, native: 5.6 x the floor, was 5 x (+12%)",
    ]


def test_no_regression_within_ten_percent_or_on_a_slower_machine(tmp_path, capsys):
    import compare

    stored, fresh = tmp_path / "stored.json", tmp_path / "fresh.json"
    stored.write_text(json.dumps(results(row("eager", 1.0), row("native", 0.5))))
    slower = results(row("eager", 3.0), row("native", 1.6))
    slower["machine_info"]["ceilings"]["copy_gb_s"] = slower["machine_info"]["ceilings"]["read_gb_s"] = 10 / 3
    fresh.write_text(json.dumps(slower))
    assert compare.main([str(stored), str(fresh)]) == 0
    assert capsys.readouterr().out == "no regression past 10 %\n"


def test_rows_that_are_gone_are_named(tmp_path, capsys):
    import compare

    stored, fresh = tmp_path / "stored.json", tmp_path / "fresh.json"
    stored.write_text(json.dumps(results(row("eager", 1.0), row("native", 0.5), row("triton", 0.4))))
    fresh.write_text(json.dumps(results(row("native", 0.5))))
    assert compare.main([str(stored), str(fresh)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "not measured any more: an op, 8x8, native against eager",
        "not measured any more: an op, 8x8, triton",
    ]


def test_far_from_the_floor_only_eager_counts():
    import compare

    stored = compare.ratios(results(row("eager", 100.0), row("native", 10.0)))
    fresh = compare.ratios(results(row("eager", 150.0), row("native", 15.0)))
    assert compare.regressions(stored, fresh) == ([], [])


def test_what_got_worse_is_measured_once_more(tmp_path, capsys):
    """A first measurement that was disturbed is forgiven by the second; a second that is as bad is a
    regression.
    """
    import compare

    (tmp_path / "a-cpu-2-thread-s-2026-01-02.json").write_text(
        json.dumps(results(row("eager", 1.0), row("native", 0.5)))
    )
    slow, fine = (results(row("eager", 1.0), row("native", time)) for time in (0.7, 0.5))
    for second, code in ((fine, 0), (slow, 1)):
        runs, asked = [slow, second], []

        def measured(names, runs=runs, asked=asked):
            asked.append(names)
            return runs.pop(0)

        assert compare.main([], folder=tmp_path, measured=measured) == code
        assert asked == [
            ["--ours"],
            ["--ours", "bench/bench_x.py::test[eager]", "bench/bench_x.py::test[native]"],
        ]
    assert "measuring those once more" in capsys.readouterr().out
    other = results(row("eager", 1.0), device="Another")
    assert compare.main([], folder=tmp_path, measured=lambda names: other) == 2
    assert compare.main([], folder=tmp_path / "none", measured=lambda names: other) == 2


def test_the_newest_file_of_the_device_counts(tmp_path):
    import compare

    for name in ("a-cpu-2026-01-02", "a-cpu-2026-02-01", "a-cpu-2-2026-03-01", "b-cpu-2026-04-01"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert compare.newest("A CPU", tmp_path).stem == "a-cpu-2026-02-01"
    assert compare.newest("C", tmp_path) is None


def test_results_are_written_beside_their_table(tmp_path):
    import run

    path = run.write(results(row("eager", 1.0), row("native", 0.5)), tmp_path / "new")
    assert (
        path.name == "a-cpu-2-thread-s-2026-01-02.json"
        and "ours: native" in path.with_suffix(".md").read_text()
    )


def test_one_bench_end_to_end(tmp_path):
    """run.py on one op: the JSON has ceilings, and ratios can be made."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**outside, "OMP_NUM_THREADS": "1", **TINY}
    command = [
        sys.executable,
        str(BENCH / "run.py"),
        "--out",
        str(tmp_path),
        "bench/bench_gae.py",
        "-k",
        "not compile and (eager or reference)",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    import compare

    assert {version for *_, version in compare.ratios(found)} >= {"reference"}
    assert (
        found["machine_info"]["ceilings"]["copy_gb_s"] > 0 and "data" not in found["benchmarks"][0]["stats"]
    )
    assert all(entry["extra_info"]["error"] < 1e-4 for entry in found["benchmarks"])


def test_what_there_is_no_time_for_is_not_measured(tmp_path, monkeypatch, capsys):
    import run

    words = ["-m", "pytest", BENCH / "bench_gae.py", "--benchmark-disable", "--budget", "0.000001", "-rs"]
    late = forked.run([*words, "-p", "no:cacheprovider", "-k", "not compile"], env=TINY)
    assert "was up" in late.stdout and "skipped" in late.stdout and "passed" not in late.stdout
    monkeypatch.setattr(run, "measure", lambda path, arguments: 0)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run.main(["--out", str(tmp_path)]) == 1 and "nothing was measured" in capsys.readouterr().err
