"""Every stage under every ZeRO stage, offload, precision and number of processes gives the losses of one
process without any of it, for the same global batch: a pairwise cover of the matrix in `make test`, the whole
product in `make test-matrix`.
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
"""Largest difference of a number from the reference's, relative to the larger of that and 1.

In fp32 by stage; in bf16 for the first step, whose weights are the same, and for later ones. COUNTS, which
count how many numbers are above another, jump in bf16.
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """{name: path} of models and data, and the path of the JSON that says so."""
    folder = tmp_path_factory.mktemp("matrix")
    base = kit.make_model(folder / "model")
    paths = {
        "folder": str(folder),
        "model": base,
        "other": kit.make_model(folder / "other", seed=7),
        **kit.make_data(folder / "data", n=18),
        **kit.make_scores(folder, base),
    }
    for kind in ("reward", "cost"):  # heads that make scores of about 1, which a bf16 error shows in
        path = os.path.join(paths[kind], "model.safetensors")
        weights = load_file(path)
        save_file({**weights, "score.weight": 10 * weights["score.weight"]}, path, metadata={"format": "pt"})
    (folder / "world.json").write_text(json.dumps(paths))
    return folder


def run_cells(folder, cells, stalled=120.0):
    """Runs cells of one number of processes -> {cell: {"rows", "seconds"} or {"error"}}. A cell that fails,
    crashes or hangs for `stalled` seconds ends its launch; the next launch goes on after it.
    """
    found, left, broken = {}, list(cells), 0
    while left:
        out, wanted, said = (folder / f"{left[0].processes}.{what}" for what in ("out", "cells", "stderr"))
        out.write_text("")
        wanted.write_text(json.dumps(left))
        begun, code = (
            None,
            launch(left[0].processes, [folder / "world.json", wanted, out], out, said, stalled),
        )
        for line in out.read_text().splitlines():
            values = json.loads(line)
            if "begun" in values:
                begun = matrix.Cell(*values["begun"])
            elif "error" in values:
                # of a rank that broke, or that lost its connection to one
                found.setdefault(begun, {"error": ""})["error"] += (
                    f"rank {values['rank']}: {values['error']}\n"
                )
            else:
                found[begun] = values
        if code == 0:
            assert all(cell in found for cell in left), "a launch ended well without having run its cells"
            break
        assert begun is not None, f"no cell was begun: {said.read_text()[-3000:]}"
        found.setdefault(begun, {"error": f"exit code {code}: {said.read_text()[-3000:]}"})
        left, broken = left[left.index(begun) + 1 :], broken + 1
        # a mistake that all share: it would go on for minutes
        if broken == 5:
            return found | {cell: {"error": "not run: five others of this launch failed"} for cell in left}
    return found


def launch(processes, arguments, out, said, stalled):
    """Runs the worker -> exit code; "hangs" when `out` has not grown for `stalled` seconds."""
    environment = {"PYTHONWARNINGS": "ignore"}
    worker = forked.Program(
        [kit.SUPPORT / "matrix_worker.py", *arguments], processes, said, said, environment
    )
    grown, size = time.monotonic(), 0
    while (code := worker.poll(1.0)) is None:
        if out.stat().st_size != size:
            grown, size = time.monotonic(), out.stat().st_size
        if time.monotonic() - grown > stalled:
            worker.kill()
            return "hangs"
    return code


class Runs:
    """What the cells of a list have given, a chunk of one number of processes at a time, when the first of it
    is asked for.
    """

    def __init__(self, folder, cells):
        self.folder, self.found = folder, {}
        cells = list(dict.fromkeys([*matrix.references(cells), *cells]))
        alike = [[cell for cell in cells if cell.processes == n] for n in matrix.AXES["processes"]]
        self.chunks = [part[at : at + CHUNK] for part in alike for at in range(0, len(part), CHUNK)]

    def __getitem__(self, cell):
        if cell not in self.found:
            self.found |= run_cells(self.folder, next(chunk for chunk in self.chunks if cell in chunk))
        return self.found[cell]


@pytest.fixture(scope="module")
def cover(world):
    return Runs(world, COVER)


@pytest.fixture(scope="module")
def whole(world):
    return Runs(world, PRODUCT)


@pytest.mark.numeric
@pytest.mark.parametrize("cell", COVER, ids=lambda cell: cell.name)
def test_a_pairwise_cover_of_the_matrix_gives_the_losses_of_the_references(cover, cell):
    agrees(cell, cover[cell], cover[cell.reference])


@pytest.mark.numeric
@pytest.mark.matrix
@pytest.mark.parametrize("cell", PRODUCT, ids=lambda cell: cell.name)
def test_the_whole_matrix_gives_the_losses_of_the_references(whole, cell):
    agrees(cell, whole[cell], whole[cell.reference])


def agrees(cell, got, expected):
    """Fails with the first step and the names of the numbers that differ by too much."""
    for what, values in (("", got), ("reference: ", expected)):
        assert "error" not in values, f"{what}{values['error']}"
    assert [sorted(step) for step in got["rows"]] == [sorted(step) for step in expected["rows"]]
    for i, (mine, theirs) in enumerate(zip(got["rows"], expected["rows"])):
        wrong = [
            f"{name} {mine[name]!r}, expected {theirs[name]!r}"
            for name in theirs
            if not near(mine[name], theirs[name], allowed(cell, i, name))
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


# ---------------------------------------------------------------- the lists themselves, and the runner


def test_every_pair_of_values_is_covered():
    """Spelt out for the axes that matter, so that a rule of `exists` that leaves out too much is seen too."""
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
    wanted = {
        (stage, *place, kind, n)
        for stage in matrix.AXES["stage"]
        for place in places
        for kind in ("fp32", "bf16")
        for n in (1, 2, 4)
    }
    assert sorted(cell[:5] for cell in PRODUCT) == sorted(wanted) and all(map(matrix.exists, PRODUCT))
    for stage in matrix.AXES["stage"]:  # the other axes meet each of these
        met, there = (
            set().union(*(matrix.pairs(cell) for cell in cells if cell.stage == stage))
            for cells in (PRODUCT, matrix.everything())
        )
        assert met == there


def test_the_cells_after_a_crash_are_run(tmp_path, monkeypatch):
    """Of five cells the second raises on one rank, the third kills its process without a word and the fourth
    hangs.
    """
    cells, launches = PRODUCT[:5], []

    def worker(processes, arguments, out, said, stalled):
        said.write_text("said at the end")
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
    found = run_cells(tmp_path, cells)
    assert len(launches) == 4 and list(found) == cells
    assert found[cells[0]]["rows"] == [0] and found[cells[4]]["rows"] == [4]
    assert found[cells[1]]["error"] == "rank 1: Broken\n"
    assert [found[cell]["error"] for cell in cells[2:4]] == [
        "exit code 1: said at the end",
        "exit code hangs: said at the end",
    ]


def test_a_difference_is_reported_with_step_and_name():
    cell = matrix.Cell("sft", 2, "none", "fp32", 2, "-", "plain")
    rows = [{"loss": 1.0, "grad_norm": 2.0}, {"weights": 0.02}]
    agrees(cell, {"rows": rows}, {"rows": rows})
    for step, changed, message in (
        (0, {"loss": 1.0001, "grad_norm": 2.0}, "step 0: loss 1.0001, expected 1.0"),
        (0, {"loss": 1.0, "grad_norm": float("nan")}, "step 0: grad_norm nan"),
        (1, {"weights": 0.0201}, "step 1: weights 0.0201"),
    ):
        with pytest.raises(AssertionError, match=message):
            agrees(cell, {"rows": [*rows[:step], changed, *rows[step + 1 :]]}, {"rows": rows})
    with pytest.raises(AssertionError, match="exit code 1: a sentence"):
        agrees(cell, {"error": "exit code 1: a sentence"}, {"rows": rows})
