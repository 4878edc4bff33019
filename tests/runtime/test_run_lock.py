"""One writer for each folder: who is refused, whose claim is taken over, what a run does that lost its own.

Other processes and hosts are played in this process: `Process` has its own claims and its own identity.
"""

import contextlib
import errno
import itertools
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from saferlhf_fast.commands import run as pipeline
from saferlhf_fast.commands.checkpoint import convert, export
from saferlhf_fast.config import load
from saferlhf_fast.errors import UserError
from saferlhf_fast.models.folders import replacing
from saferlhf_fast.runtime import folder_claims, process_identity, run_folder, run_lock, watchdog
from saferlhf_fast.runtime.checkpoint import checkpointer, manifest
from saferlhf_fast.runtime.run_decision import Action

HOST = "pid:[4026531836]"  # outside containers
SPACE = "boot-a" + HOST
BORN = process_identity.start_time(os.getpid())


class Process:
    """A process that claims folders: by default another one of this machine, which is running."""

    def __init__(self, monkeypatch, job=None, machine="m", **identity):
        self.monkeypatch, self.held = monkeypatch, {}
        process = {"host": "node1", "pid": os.getpid(), "born": BORN, "space": SPACE, **identity}
        self.here = folder_claims.Here(process, machine, job)

    @contextlib.contextmanager
    def acting(self):
        """What happens inside is done by this process."""
        with self.monkeypatch.context() as patch:
            patch.setattr(run_lock, "_held", self.held)
            patch.setattr(folder_claims, "here", lambda: self.here)
            patch.setattr(process_identity, "machine_id", lambda: self.here.machine)
            yield

    def hold(self, folder):
        with self.acting():
            run_lock.hold(folder)

    def die(self):
        """Ends without a word, as after SIGKILL: the claims stay, nobody touches them."""
        for lock in self.held.values():
            lock.stopping.set()
            lock.thread.join()


@pytest.fixture
def process(monkeypatch):
    """Makes processes whose claims beat 20 times a second; what they held is released at the end."""
    monkeypatch.setattr(folder_claims, "BEAT", 0.05)
    monkeypatch.setattr(folder_claims, "LIMIT", 10.0)
    monkeypatch.setattr(run_lock, "CONFIRM", 0.02)
    made = []

    def make(**about):
        made.append(Process(monkeypatch, **about))
        return made[-1]

    yield make
    for one in made:
        with one.acting():
            run_lock.release_all()


def claims(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("in_use."))


def ended_pid():
    """The number of a process that has ended and is waited for."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def dead_but_not_waited_for():
    """The number of a process that is a zombie until the test run ends."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    while process_identity.start_time(child) is not None:
        time.sleep(0.01)
    return child


ELSEWHERE = {"host": "node2", "space": "boot-b" + HOST, "machine": "n"}
DEAD = {
    "ended": lambda: {"pid": ended_pid()},
    "number used again": lambda: {"born": "1"},
    "zombie": lambda: {"pid": dead_but_not_waited_for()},
    "machine started again": lambda: {"space": "boot-0" + HOST},
    "requeued on another host": lambda: {**ELSEWHERE, "job": ("c/7", 0)},
}
WATCHED = {
    "another host": ELSEWHERE,
    "a container of the same name": {"space": "boot-apid:[4026539999]"},
    "another machine of the same name": {"space": "boot-b" + HOST, "machine": "n"},
    "another step of the same job": {**ELSEWHERE, "job": ("c/7", 1)},
    "machines without an id": {"space": "boot-b" + HOST, "machine": ""},
}


@pytest.mark.parametrize("about", [{}, *WATCHED.values()], ids=["here", *WATCHED])
def test_a_second_process_is_refused_by_the_first_one_s_name(process, tmp_path, about):
    first, second = (
        process(**about),
        process(job=("c/7", 1), machine="" if about.get("machine") == "" else "m"),
    )
    first.hold(tmp_path)
    name = rf"pid {os.getpid()} on host node\d since 20.*; heartbeat 0 s ago$"
    with pytest.raises(UserError, match=rf"^output: {tmp_path} is in use by {name}"):
        second.hold(tmp_path)
    assert claims(tmp_path) == ["in_use.1.json"] and not second.held
    with first.acting():
        run_lock.release(tmp_path)
    second.hold(tmp_path)


@pytest.mark.parametrize("about", DEAD.values(), ids=DEAD)
def test_a_dead_process_s_claim_is_taken_over_at_once(process, tmp_path, about, capsys):
    first, second = process(**about()), process(job=("c/7", 1))
    first.hold(tmp_path)
    first.die()
    begun = time.monotonic()
    second.hold(tmp_path)
    assert time.monotonic() - begun < 5 and claims(tmp_path) == ["in_use.2.json"]
    assert f"taken over from pid {first.here.process['pid']} on host" in capsys.readouterr().out


@pytest.mark.parametrize("about", WATCHED.values(), ids=WATCHED)
def test_a_process_that_cannot_be_looked_up_is_dead_after_a_silence(
    process, tmp_path, monkeypatch, about, capsys
):
    monkeypatch.setattr(folder_claims, "LIMIT", 0.6)
    first, second = (
        process(**about),
        process(job=("c/7", 1), machine="" if about.get("machine") == "" else "m"),
    )
    begun = time.monotonic()
    first.hold(tmp_path)
    first.die()
    second.hold(tmp_path)
    assert time.monotonic() - begun > 0.6 and claims(tmp_path) == ["in_use.2.json"]
    assert "s for a sign of life of pid" in capsys.readouterr().out


@pytest.mark.parametrize("skew", [-7200, 7200])
def test_clocks_that_differ_change_nothing(process, tmp_path, monkeypatch, skew):
    first, second = process(**ELSEWHERE), process()
    first.hold(tmp_path)
    first.die()
    path, stop = tmp_path / "in_use.1.json", threading.Event()

    def beat():
        while not stop.wait(0.03):
            os.utime(path, (time.time() + skew,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.1)
    with pytest.raises(UserError, match="is in use by"):
        second.hold(tmp_path)
    stop.set()
    thread.join()
    monkeypatch.setattr(folder_claims, "LIMIT", 0.3)
    second.hold(tmp_path)  # silent from now on, whatever the file's date


@pytest.mark.parametrize("content", ["", "{", '{"process": 3}', "[]"])
def test_a_claim_that_cannot_be_read_is_watched(process, tmp_path, monkeypatch, content):
    (tmp_path / "in_use.4.json").write_text(content)
    with (
        process().acting(),
        pytest.raises(UserError, match="in use by a process that has not written its name"),
    ):
        touching = threading.Timer(0.1, os.utime, [tmp_path / "in_use.4.json"])
        touching.start()
        run_lock.hold(tmp_path)
    monkeypatch.setattr(folder_claims, "LIMIT", 0.2)
    process().hold(tmp_path)
    assert claims(tmp_path) == ["in_use.5.json"]


def test_a_copy_of_a_folder_is_not_in_use(process, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_claims, "LIMIT", 0.3)
    original, copy = tmp_path / "run", tmp_path / "copy"
    process().hold(original)
    copy.mkdir()
    (copy / "in_use.1.json").write_bytes((original / "in_use.1.json").read_bytes())
    process().hold(copy)
    with pytest.raises(UserError, match="in use"):
        process().hold(original)


@pytest.mark.parametrize("before", ["nothing", "a dead claim", "a silent host"])
def test_of_many_at_the_same_moment_one_gets_the_folder(process, tmp_path, monkeypatch, before):
    monkeypatch.setattr(folder_claims, "LIMIT", 0.2)
    local = threading.local()
    for turn in range(12):
        folder = tmp_path / str(turn)
        if before != "nothing":
            first = process(**({"pid": 2**22} if before == "a dead claim" else ELSEWHERE))
            first.hold(folder)
            first.die()
        won, refused, start = [], [], threading.Barrier(6)

        def contend(number, folder=folder, won=won, refused=refused, start=start):
            local.here = folder_claims.Here(
                {"host": f"h{number}", "pid": os.getpid(), "born": BORN, "space": SPACE}, "m", None
            )
            start.wait()
            try:
                won.append(run_lock._claim(folder, "output", "in_use"))
            except UserError as error:
                refused.append(str(error))

        with monkeypatch.context() as patch:
            patch.setattr(folder_claims, "here", lambda: local.here)
            threads = [threading.Thread(target=contend, args=[n]) for n in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(won) == 1 and len(refused) == 5 and all("in use by" in line for line in refused), refused
        assert claims(folder) == [won[0][0].name]


# ---------------------------------------------------------------- a claim that is lost


def taken(process, folder):
    """Another host takes a folder over, as after a long stall of its process."""
    other = process(**ELSEWHERE)
    with other.acting():
        number = folder_claims.read_claims(folder)[-1].number
        folder_claims.create(folder / f"in_use.{number + 1}.json", other.here)
        (folder / f"in_use.{number}.json").unlink()


LOSSES = {
    r"its file in_use.1.json was removed": lambda process, folder: (folder / "in_use.1.json").unlink(),
    r"it was taken over by pid \d+ on host node2": taken,
    r"its file in_use.1.json was removed ": lambda process, folder: folder.rename(f"{folder}.moved"),
}


@pytest.mark.parametrize("lose", LOSSES.items(), ids=["removed", "taken", "renamed"])
def test_a_run_that_has_lost_its_folder_writes_no_more(process, tmp_path, lose):
    line, how = lose
    run = process()
    run.hold(tmp_path / "run")
    (lock,) = run.held.values()
    with run.acting():
        run_lock.require_held(tmp_path / "run" / "model")
        with replacing(tmp_path / "run" / "model") as new:
            (new / "config.json").write_text("{}")
        how(process, tmp_path / "run")
        for path in ("run", "run/model"):
            with pytest.raises(
                UserError, match=rf"output: .*/run is not this run's any more: {line.strip()}"
            ):
                run_lock.require_held(tmp_path / path)
        with pytest.raises(UserError, match="not this run's"), replacing(tmp_path / "run" / "model"):
            pass
        with pytest.raises(UserError, match="not this run's"):
            run_folder.finish_run(tmp_path / "run", {})
        run_lock.require_held(tmp_path / "elsewhere")
    lock.thread.join(2)  # it ends by itself
    assert not lock.thread.is_alive() and not (tmp_path / "run" / "finished.json").exists()
    after = claims(tmp_path / "run") if (tmp_path / "run").exists() else []
    with run.acting():
        run_lock.release_all()
    assert after == (claims(tmp_path / "run") if (tmp_path / "run").exists() else [])


def test_the_thread_notices_a_loss_and_touches_the_file(process, tmp_path):
    run = process()
    run.hold(tmp_path)
    (lock,) = run.held.values()
    first = lock.path.stat().st_mtime_ns
    deadline = time.monotonic() + 5
    while lock.path.stat().st_mtime_ns == first and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.path.stat().st_mtime_ns > first and not lock.is_lost()
    taken(process, tmp_path)
    lock.thread.join(5)
    assert lock.reason and lock.is_lost()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_hiccups_loses_nothing(process, tmp_path, monkeypatch, code):
    run = process()
    run.hold(tmp_path)
    (lock,) = run.held.values()

    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(folder_claims, "read_claim", fail)
        patch.setattr(os, "utime", fail)
        time.sleep(0.3)
        assert not lock.is_lost(look=True)
    before = lock.path.stat().st_mtime_ns
    time.sleep(0.3)
    assert not lock.is_lost(look=True) and lock.path.stat().st_mtime_ns > before


@pytest.fixture
def world(tmp_path):
    """A function that makes a config of sft over a model folder and a data file."""
    (tmp_path / "llama").mkdir()
    for name, text in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}.items():
        (tmp_path / "llama" / name).write_text(text)
    (tmp_path / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    given = {"model": tmp_path / "llama", "data": tmp_path / "data.json", "output": tmp_path / "runs" / "sft"}
    return lambda **changes: load.load("sft", None, {key: str(x) for key, x in {**given, **changes}.items()})


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


# ---------------------------------------------------------------- stages and commands


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
