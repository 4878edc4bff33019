"""Every ZeRO stage, offload, precision and number of processes gives the losses of one unsharded process.

The global batch is the same. `make test` runs a pairwise cover of the matrix, `make test-matrix` the product.
"""

import json
import math
import os
import sys
import time

import forked
import kit
import matrix
import pytest
from safetensors.torch import load_file, save_file

COVER = [*matrix.cover(matrix.everything()), *matrix.EXTRA]
PRODUCT = matrix.product_cells()
CHUNK = 60  # cells of one launch
TOLERANCE = {stage: 1e-4 if stage in matrix.PPO else 2e-5 for stage in matrix.AXES["stage"]}
BF16_FIRST, BF16_LATER = 3e-2, 1e-1
COUNTS = ("accuracy", "unsafe_share", "gap_share", "clip_fraction")
"""Largest difference of a number from that of the reference, relative to the larger of the reference and 1.

TOLERANCE is for fp32, by stage; BF16_FIRST is for the first step, whose weights are equal, BF16_LATER for
later ones. COUNTS are shares of numbers above a bound and may jump in bf16.
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of models and data; its world.json has {name: path}."""
    folder = tmp_path_factory.mktemp("matrix")
    base = kit.make_model(folder / "model")
    paths = {
        "folder": str(folder),
        "model": base,
        "other": kit.make_model(folder / "other", seed=7),
        **kit.make_data(folder / "data", n=18),
        **kit.make_scores(folder, base),
    }
    for kind in ("reward", "cost"):  # heads that give scores of about 1, so that a bf16 error is visible
        path = os.path.join(paths[kind], "model.safetensors")
        weights = load_file(path)
        save_file({**weights, "score.weight": 10 * weights["score.weight"]}, path, metadata={"format": "pt"})
    (folder / "world.json").write_text(json.dumps(paths))
    return folder


def run_cells(folder, cells, stalled=120.0):
    """Runs cells of one number of processes; returns {cell: {"rows", "seconds"} or {"error"}}.

    A cell that fails, crashes or hangs for `stalled` seconds ends its launch; the next launch starts after
    it.
    """
    results, remaining, failures = {}, list(cells), 0
    while remaining:
        out, cells_file, stderr = (
            folder / f"{remaining[0].processes}.{what}" for what in ("out", "cells", "stderr")
        )
        out.write_text("")
        cells_file.write_text(json.dumps(remaining))
        current, code = (
            None,
            launch(remaining[0].processes, [folder / "world.json", cells_file, out], out, stderr, stalled),
        )
        for line in out.read_text().splitlines():
            values = json.loads(line)
            if "begun" in values:
                current = matrix.Cell(*values["begun"])
            elif "error" in values:
                # of the rank that failed, or of a rank that lost its connection to it
                results.setdefault(current, {"error": ""})["error"] += (
                    f"rank {values['rank']}: {values['error']}\n"
                )
            else:
                results[current] = values
        if code == 0:
            assert all(cell in results for cell in remaining), (
                "a launch ended well without having run its cells"
            )
            break
        assert current is not None, f"no cell was begun: {stderr.read_text()[-3000:]}"
        results.setdefault(current, {"error": f"exit code {code}: {stderr.read_text()[-3000:]}"})
        remaining, failures = remaining[remaining.index(current) + 1 :], failures + 1
        # probably all cells share the mistake, and more launches would take minutes
        if failures == 5:
            return results | {
                cell: {"error": "not run: five others of this launch failed"} for cell in remaining
            }
    return results


def launch(processes, arguments, out, stderr, stalled):
    """Runs the worker; returns the exit code, or "hangs" if `out` has not grown for `stalled` seconds."""
    environment = {"PYTHONWARNINGS": "ignore"}
    worker = forked.Program(
        [kit.SUPPORT / "matrix_worker.py", *arguments], processes, stderr, stderr, environment
    )
    last_growth, size = time.monotonic(), 0
    while (code := worker.poll(1.0)) is None:
        if out.stat().st_size != size:
            last_growth, size = time.monotonic(), out.stat().st_size
        if time.monotonic() - last_growth > stalled:
            worker.kill()
            return "hangs"
    return code


class Runs:
    """The results of a list of cells by cell.

    The first access to a cell runs its chunk: CHUNK cells of one number of processes.
    """

    def __init__(self, folder, cells):
        self.folder, self.results = folder, {}
        cells = list(dict.fromkeys([*matrix.references(cells), *cells]))
        by_processes = [[cell for cell in cells if cell.processes == n] for n in matrix.AXES["processes"]]
        self.chunks = [
            of_one_number[at : at + CHUNK]
            for of_one_number in by_processes
            for at in range(0, len(of_one_number), CHUNK)
        ]

    def __getitem__(self, cell):
        if cell not in self.results:
            self.results |= run_cells(self.folder, next(chunk for chunk in self.chunks if cell in chunk))
        return self.results[cell]


@pytest.fixture(scope="module")
def cover_runs(world):
    return Runs(world, COVER)


@pytest.fixture(scope="module")
def product_runs(world):
    return Runs(world, PRODUCT)


@pytest.mark.numeric
@pytest.mark.parametrize("cell", COVER, ids=lambda cell: cell.name)
def test_a_pairwise_cover_of_the_matrix_gives_the_losses_of_the_references(cover_runs, cell):
    assert_agrees(cell, cover_runs[cell], cover_runs[cell.reference])


@pytest.mark.numeric
@pytest.mark.matrix
@pytest.mark.parametrize("cell", PRODUCT, ids=lambda cell: cell.name)
def test_the_whole_matrix_gives_the_losses_of_the_references(product_runs, cell):
    assert_agrees(cell, product_runs[cell], product_runs[cell.reference])


def assert_agrees(cell, result, expected):
    """Fails with the first step and the names of the numbers that differ by too much."""
    for what, values in (("", result), ("reference: ", expected)):
        assert "error" not in values, f"{what}{values['error']}"
    assert [sorted(step) for step in result["rows"]] == [sorted(step) for step in expected["rows"]]
    for i, (numbers, references) in enumerate(zip(result["rows"], expected["rows"])):
        wrong = [
            f"{name} {numbers[name]!r}, expected {references[name]!r}"
            for name in references
            if not near(numbers[name], references[name], allowed(cell, i, name))
        ]
        assert not wrong, f"step {i}: {'; '.join(wrong)}"


def near(a, b, tolerance):
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= tolerance * max(1.0, abs(b))


def allowed(cell, step, name):
    if cell.precision == "fp32":
        return TOLERANCE[cell.stage]
    if any(word in name for word in COUNTS):
        return 1.0
    return BF16_LATER if step else BF16_FIRST


# ---------------------------------------------------------------- the lists of cells, and the runner


def test_every_pair_of_values_is_covered():
    """The pairs of the main axes are written out, so that `exists` cannot leave out too many unnoticed."""
    assert set().union(*map(matrix.pairs, COVER)) == set().union(*map(matrix.pairs, matrix.everything()))
    stages, both = matrix.AXES["stage"], ("precision", "processes")

    def met(*names):
        return {tuple(getattr(cell, name) for name in names) for cell in COVER}

    assert met("stage", "zero") == {(stage, zero) for stage in stages for zero in range(4)}
    assert met("stage", "offload") == {
        (stage, kind) for stage in stages for kind in ("none", "states", "weights", "both")
    }
    assert met("zero", "offload") == {
        (0, "none"),
        *((zero, kind) for zero in (1, 2, 3) for kind in ("none", "states")),
        (3, "weights"),
        (3, "both"),
    }
    for name in both:
        assert met("stage", name) == {(stage, value) for stage in stages for value in matrix.AXES[name]}
    assert met(*both) == {(kind, n) for kind in ("fp32", "bf16") for n in (1, 2, 4)}
    assert {(zero, frozen) for zero, frozen in met("zero", "frozen") if frozen != "-"} == {
        (zero, frozen) for zero in range(4) for frozen in ("sharded", "replicated")
    }
    assert len(COVER) < 60


def test_the_product_has_every_combination():
    places = {
        (0, "none"),
        *((zero, kind) for zero in (1, 2, 3) for kind in ("none", "states")),
        (3, "weights"),
        (3, "both"),
    }
    expected = {
        (stage, *place, kind, n)
        for stage in matrix.AXES["stage"]
        for place in places
        for kind in ("fp32", "bf16")
        for n in (1, 2, 4)
    }
    assert sorted(cell[:5] for cell in PRODUCT) == sorted(expected) and all(map(matrix.exists, PRODUCT))
    for stage in matrix.AXES["stage"]:  # each pair with a value of the other axes occurs
        pairs_run, pairs_possible = (
            set().union(*(matrix.pairs(cell) for cell in cells if cell.stage == stage))
            for cells in (PRODUCT, matrix.everything())
        )
        assert pairs_run == pairs_possible


def test_the_cells_after_a_crash_are_run(tmp_path, monkeypatch):
    """Of five cells the second raises on one rank, the third kills its process and the fourth hangs."""
    cells, launches = PRODUCT[:5], []

    def worker(processes, arguments, out, stderr, stalled):
        stderr.write_text("last words")
        launches.append(processes)
        for cell in [matrix.Cell(*cell) for cell in json.loads(arguments[1].read_text())]:
            lines = [{"begun": cell}]
            if cell == cells[1]:
                lines.append({"error": "Broken", "rank": 1})
            elif cell not in cells[2:4]:
                lines.append({"cell": cell, "rows": [cells.index(cell)]})
            with open(out, "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
            if cell in cells[1:4]:
                return "hangs" if cell == cells[3] else 1
        return 0

    monkeypatch.setattr(sys.modules[__name__], "launch", worker)
    results = run_cells(tmp_path, cells)
    assert len(launches) == 4 and list(results) == cells
    assert results[cells[0]]["rows"] == [0] and results[cells[4]]["rows"] == [4]
    assert results[cells[1]]["error"] == "rank 1: Broken\n"
    assert [results[cell]["error"] for cell in cells[2:4]] == [
        "exit code 1: last words",
        "exit code hangs: last words",
    ]


def test_a_difference_is_reported_with_step_and_name():
    cell = matrix.Cell("sft", 2, "none", "fp32", 2, "-", "plain")
    rows = [{"loss": 1.0, "grad_norm": 2.0}, {"weights": 0.02}]
    assert_agrees(cell, {"rows": rows}, {"rows": rows})
    for step, changed, message in (
        (0, {"loss": 1.0001, "grad_norm": 2.0}, "step 0: loss 1.0001, expected 1.0"),
        (0, {"loss": 1.0, "grad_norm": float("nan")}, "step 0: grad_norm nan"),
        (1, {"weights": 0.0201}, "step 1: weights 0.0201"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_agrees(cell, {"rows": [*rows[:step], changed, *rows[step + 1 :]]}, {"rows": rows})
    with pytest.raises(AssertionError, match="exit code 1: a sentence"):
        assert_agrees(cell, {"error": "exit code 1: a sentence"}, {"rows": rows})
