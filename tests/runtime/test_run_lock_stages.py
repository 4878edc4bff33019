"""Stages and commands in a folder that another process writes into; a run that has lost its own folder.

Other processes are played in this process; see lock_kit.py.
"""

import itertools
import json
import os
from pathlib import Path

import pytest
from lock_kit import ELSEWHERE, claims, configs, processes, taken

from saferlhf_fast.commands import run as pipeline
from saferlhf_fast.commands.checkpoint import convert, export
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import run_folder, run_lock, watchdog
from saferlhf_fast.runtime.checkpoint import checkpointer, manifest
from saferlhf_fast.runtime.run_decision import Action


@pytest.fixture
def process(monkeypatch):
    """Makes processes of this or another host."""
    yield from processes(monkeypatch)


@pytest.fixture
def world(tmp_path):
    """Makes configs of sft."""
    return configs(tmp_path)


@pytest.mark.parametrize("background", ["false", "true"])
def test_no_checkpoint_is_written_or_committed_into_a_lost_folder(process, world, background):
    cfg = world(**{"checkpoint.interval": 1, "checkpoint.asynchronous": background, "checkpoint.keep": 9})
    with process().acting():
        folder = run_folder.open_run("sft", cfg)
        checkpoints = checkpointer.Checkpoints(cfg, "sft", folder, {}, {})
        checkpoints.after_step(1)
        checkpoints.finish()
        (number,) = (lock.path for lock in run_lock.locks_on(folder))
        checkpoints.cfg = world(**{"checkpoint.asynchronous": "true"})
        checkpoints.save(2)  # in the background: committed later
        taken(process, folder)
        for step in (checkpoints.finish, lambda: checkpoints.after_step(3)):
            with pytest.raises(UserError, match="taken over by pid"):
                step()
    assert manifest.is_committed(manifest.folder_of(folder, 1)) and number.name == "in_use.1.json"
    assert not manifest.is_committed(manifest.folder_of(folder, 2))


def tree(folder):
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


SETTINGS = [
    {},
    {"overwrite": "true"},
    {"resume": "auto"},
    {"resume": "auto", "overwrite": "true"},
    {"seed": 5},
]


@pytest.mark.parametrize(
    "saved", [(), ("checkpoints/step-00000002/manifest.json",), ("model/x", "finished.json")]
)
@pytest.mark.parametrize("there", [{}, ELSEWHERE], ids=["here", "elsewhere"])
def test_no_run_is_deleted_moved_or_joined_under_another(process, world, saved, there):
    with process(**there).acting():
        folder = run_folder.open_run("sft", world())
        for name in saved:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        before = tree(folder)
    with process().acting():
        for settings, restart in itertools.product(SETTINGS, [False, True]):
            for start in (run_folder.check_output, run_folder.open_run):
                with pytest.raises(UserError, match="runs/sft is in use by pid .* heartbeat"):
                    start("sft", world(**settings), restart=restart)
    assert tree(folder) == before and [p.name for p in folder.parent.iterdir()] == ["sft"]


@pytest.mark.parametrize(
    "settings, saved, action",
    [
        ({"resume": "auto"}, (), Action.REPLACE),
        ({"resume": "auto"}, ("checkpoints/step-00000002/manifest.json",), Action.RESUME),
        ({"resume": "auto"}, ("model/x",), Action.SET_ASIDE),
        ({"overwrite": "true"}, ("model/x",), Action.REPLACE),
    ],
)
def test_a_dead_run_is_resumed_or_replaced_and_the_folder_belongs_to_the_new_one(
    process, world, settings, saved, action
):
    dead, new = process(pid=2**22), process()
    with dead.acting():
        folder = run_folder.open_run("sft", world())
    for name in saved:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    dead.die()
    with new.acting():
        assert run_folder.check_output("sft", world(**settings)) is action
        run_folder.open_run("sft", world(**settings))
        (claim,) = claims(folder)
        assert json.loads((folder / claim).read_text())["process"] == new.here.process
        others = [p for p in folder.parent.iterdir() if p != folder]
        assert all(not claims(p) for p in others) and len(others) == (action is Action.SET_ASIDE)
        run_folder.finish_run(folder, {})
    assert not claims(folder) and not new.held


def test_a_refusal_leaves_no_claim_and_no_folder(process, world, monkeypatch):
    run = process()
    with run.acting():
        monkeypatch.setattr(run_folder, "_opened", lambda state, action: run_lock.require_held(1 / 0))
        with pytest.raises(ZeroDivisionError):
            run_folder.open_run("sft", world())
    assert not run.held and not Path(world().output).parent.exists()


def test_a_run_inside_or_above_is_not_touched(process, world, tmp_path):
    top = tmp_path / "runs"
    with process(pid=2**22).acting():
        run_folder.open_run("sft", world())
    inner = process()
    inner.hold(top / "sft" / "seed-0" / "evaluate")
    with (
        process().acting(),
        pytest.raises(UserError, match=r"sft holds another run's folder: .*evaluate is in use"),
    ):
        run_folder.check_output("sft", world(overwrite="true"))
    with inner.acting():
        run_lock.release_all()
    recipe = process()
    recipe.hold(top)
    with (
        process().acting(),
        pytest.raises(UserError, match=r"sft is inside another run's folder: .*runs is in use"),
    ):
        run_folder.check_output("sft", world(overwrite="true"))
    with recipe.acting():  # the recipe's own stage
        run_folder.open_run("sft", world(overwrite="true"))


def test_a_recipe_holds_its_folder_from_the_first_stage_to_the_last(process, world, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    stages = [{name: {"model": world().model, "data": world().data}} for name in ("sft",)]
    recipe.write_text(json.dumps({"output": str(tmp_path / "all"), "stages": stages}))

    def stage(*args):
        assert claims(tmp_path / "all") == ["in_use.1.json"]
        with process().acting(), pytest.raises(UserError, match="output: .*/all is in use"):
            pipeline.run(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_stage", stage)
    with process().acting():
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe)
    assert not (tmp_path / "all").exists()


def test_a_session_keeps_a_finished_run_s_folder_until_its_end(process, world):
    with process().acting():
        with run_lock.session():
            folder = run_folder.open_run("sft", world())
            run_folder.finish_run(folder, {})
            assert claims(folder)
            with process().acting(), pytest.raises(UserError, match="in use"):
                run_folder.open_run("sft", world(overwrite="true"))
        assert not claims(folder)


def test_commands_that_write_are_refused_in_a_folder_in_use(process, world, tmp_path, monkeypatch):
    run = process()
    with run.acting():
        folder = run_folder.open_run("sft", world())
    step = manifest.folder_of(folder, 2)
    values = {"universal": False, "models": {"model": {"zero_stage": 2}}}
    for module in (convert, export):
        monkeypatch.setattr(module, "whole", lambda path: values)
    with process().acting():
        with pytest.raises(UserError, match="checkpoint convert: .*/sft is in use by pid"):
            convert.convert(step)
        with pytest.raises(UserError, match="checkpoint export: .*/sft is in use by pid"):
            export.export(step, folder / "exported")
    first, second = process(), process()
    with first.acting():
        run_folder.hold_output(tmp_path / "out", "checkpoint export")
    with second.acting(), pytest.raises(UserError, match=f"export: {tmp_path}/out: .* in use by"):
        export.export(step, tmp_path / "out")
    with second.acting():  # another name in the same folder
        run_folder.hold_output(tmp_path / "out2", "checkpoint export")
    assert not (tmp_path / "out").exists() and not step.exists()


def test_a_process_that_ends_at_once_releases_its_folders(process, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: None)
    run = process()
    with run.acting():
        run_lock.hold(tmp_path)
        watchdog.leave(1)
    assert not claims(tmp_path)


def test_a_conversion_touches_nothing_beside_its_output(process, tmp_path, monkeypatch):
    """Neither a folder that is called like its temporary one, nor an output that a live process claims."""
    monkeypatch.setattr(
        convert, "whole", lambda path: {"universal": False, "models": {"m": {"zero_stage": 2}}}
    )
    monkeypatch.setattr(
        convert, "_write", lambda folder, output, values: (output / "manifest").write_text("x")
    )
    output, beside = tmp_path / "out", tmp_path / "out.tmp"
    beside.mkdir()
    (beside / "thesis.tex").write_text("precious")
    owner, dead = process(), process(pid=2**22)
    with owner.acting():
        run_lock.hold(output)
    with process().acting(), pytest.raises(UserError, match="checkpoint convert: .*out is in use by"):
        convert.convert(tmp_path / "step", output)
    with owner.acting():
        run_lock.release_all()
    with dead.acting():
        run_lock.hold(output)
    dead.die()
    assert claims(output)
    with process().acting():
        convert.convert(tmp_path / "step", output)
    assert [path.name for path in output.iterdir()] == ["manifest"]
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("out.in_use")} >= {
        "out",
        "out.tmp",
    }
    assert (beside / "thesis.tex").read_text() == "precious"
