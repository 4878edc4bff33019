"""What happens to an output folder: the table of all cases, and how often its facts are computed."""

import itertools
import sys
import types
from collections import Counter

import pytest

from saferlhf_fast.commands import run as pipeline
from saferlhf_fast.config import fingerprint, load
from saferlhf_fast.config.stages import DemoConfig
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import provenance, run_folder
from saferlhf_fast.runtime.checkpoint import manifest
from saferlhf_fast.runtime.run_decision import Action, Request, decide, request_of
from saferlhf_fast.runtime.run_state import RunState

RESUMES = (None, "auto", "its own checkpoint", "a checkpoint elsewhere")
REQUESTS = tuple(itertools.product((False, True), RESUMES, (False, True)))
"""(overwrite, resume, restart) in the order of the columns of EXPECTED: without overwrite, then with it."""

LETTERS = {Action.SKIP: "S", Action.NEW: "N", Action.RESUME: "R", Action.REPLACE: "P", Action.SET_ASIDE: "A"}
REFUSALS = {
    "; choose another folder, or overwrite=true": "h",
    "overwrite=true does not delete": "f",
    "belongs to other settings": "c",
    "expected auto or the folder of a checkpoint": "m",
    "is a file; expected a folder": "d",
    "holds the checkpoint that resume names": "o",
    "belongs to the stage": "k",
}

# The columns of a run: its finished.json (none, damaged, valid); what differs in its settings (same: nothing,
# free: settings that change no result, other: settings that do, processes: their number, kind: the stage,
# inputs: their content); what the run has saved.
EXPECTED = """
absent                      NNNNmmNN NNNNmmNN
empty                       NNNNmmNN NNNNmmNN
file                        ddddmmdd ddddmmdd
foreign                     hhhhmmhh ffffmmff
none    same      nothing   hPPPmmhP PPPPmmPP
none    same      model     hAAAmmhA PAAAmmPA
none    same      checkpt   hARRRRhA PARRRRPA
none    free      nothing   hAhAmmhA PPPPmmPP
none    free      model     hAhAmmhA PPPPmmPP
none    free      checkpt   hARRRRhA PPRRRRPP
none    other     nothing   hAhAmmhA PPPPmmPP
none    other     model     hAhAmmhA PPPPmmPP
none    other     checkpt   hAcccchA PPccccPP
none    processes nothing   hPPPmmhP PPPPmmPP
none    processes model     hAAAmmhA PAAAmmPA
none    processes checkpt   hAcccchA PAccccPA
none    kind      nothing   hhAAmmhh PPPPmmPP
none    kind      model     hhAAmmhh PPPPmmPP
none    kind      checkpt   hhkkkkhh PPkkkkPP
damaged same      nothing   hhPPmmhh PPPPmmPP
damaged same      model     hhAAmmhh PPAAmmPP
damaged same      checkpt   hhAAoohh PPAAooPP
damaged free      nothing   hhhhmmhh PPPPmmPP
damaged free      model     hhhhmmhh PPPPmmPP
damaged free      checkpt   hhhhoohh PPPPooPP
damaged other     nothing   hhhhmmhh PPPPmmPP
damaged other     model     hhhhmmhh PPPPmmPP
damaged other     checkpt   hhhhoohh PPPPooPP
damaged processes nothing   hhPPmmhh PPPPmmPP
damaged processes model     hhAAmmhh PPAAmmPP
damaged processes checkpt   hhAAoohh PPAAooPP
damaged kind      nothing   hhAAmmhh PPPPmmPP
damaged kind      model     hhAAmmhh PPPPmmPP
damaged kind      checkpt   hhAAoohh PPPPooPP
valid   same      nothing   hhSSmmhh PPSSmmPP
valid   same      model     hhSSmmhh PPSSmmPP
valid   same      checkpt   hhSSoohh PPSSooPP
valid   free      nothing   hhhhmmhh PPPPmmPP
valid   free      model     hhhhmmhh PPPPmmPP
valid   free      checkpt   hhhhoohh PPPPooPP
valid   other     nothing   hhhhmmhh PPPPmmPP
valid   other     model     hhhhmmhh PPPPmmPP
valid   other     checkpt   hhhhoohh PPPPooPP
valid   processes nothing   hhSSmmhh PPSSmmPP
valid   processes model     hhSSmmhh PPSSmmPP
valid   processes checkpt   hhSSoohh PPSSooPP
valid   kind      nothing   hhhhmmhh PPPPmmPP
valid   kind      model     hhhhmmhh PPPPmmPP
valid   kind      checkpt   hhhhoohh PPPPooPP
valid   inputs    nothing   hhhhmmhh PPPPmmPP
valid   inputs    model     hhhhmmhh PPPPmmPP
valid   inputs    checkpt   hhhhoohh PPPPooPP
"""
CHANGES = {"free": {"engine.threads": "3"}, "other": {"seed": "2"}}


@pytest.fixture
def world(tmp_path):
    """A function that makes a config of the stage reward; world.out is its output folder."""
    model, data = tmp_path / "llama", tmp_path / "data.json"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_text("{}")
    data.write_text("[1]")

    def config(**changes):
        given = {"model": str(model), "data": str(data), "output": str(tmp_path / "runs" / "reward")}
        return load.load("reward", None, {**given, **changes})

    config.data, config.out, config.elsewhere = data, tmp_path / "runs" / "reward", tmp_path / "elsewhere"
    return config


def checkpoint(output):
    """Writes a checkpoint without files; returns its folder."""
    folder = manifest.folder_of(output, 2)
    folder.mkdir(parents=True)
    manifest.write(folder, {"files": {}})
    return folder


def make_output(world, content, differs=None, saved=None):
    """Makes the output folder of one line of EXPECTED."""
    if content == "empty":
        world.out.mkdir(parents=True)
    elif content == "file":
        world.out.parent.mkdir()
        world.out.write_text("")
    elif content == "foreign":
        world.out.mkdir(parents=True)
        (world.out / "thesis.tex").write_text("precious")
    if differs is None:
        return
    run_folder.open_run("cost" if differs == "kind" else "reward", world(**CHANGES.get(differs, {})))
    if differs == "processes":
        provenance.write_json(world.out / "versions.json", {**provenance.versions(), "processes": 2})
    if saved == "checkpt":
        checkpoint(world.out)
    elif saved == "model":
        (world.out / "model").mkdir()
    if content == "valid":
        run_folder.finish_run(world.out, {})
    elif content == "damaged":
        (world.out / "finished.json").write_text('{"stage": "rew')
    if differs == "inputs":
        world.data.write_text("[2]")


def letter(decision):
    if decision.action is not Action.REFUSE:
        return LETTERS[decision.action]
    return next(letter for fragment, letter in REFUSALS.items() if fragment in decision.sentence)


@pytest.mark.parametrize("line", EXPECTED.strip().splitlines())
def test_every_state_of_the_output_folder_has_its_action(world, line):
    *case, without, with_overwrite = line.split()
    make_output(world, *case)
    names = dict(zip(RESUMES, (None, "auto", manifest.folder_of(world.out, 2), checkpoint(world.elsewhere))))
    state = RunState("reward", world())

    def row(skip):
        requests = [
            Request(names[resume] and str(names[resume]), overwrite, restart, skip=skip and resume == "auto")
            for overwrite, resume, restart in REQUESTS
        ]
        return "".join(letter(decide(state, request)) for request in requests)

    assert row(skip=True) == without + with_overwrite
    # a stage that was started runs
    assert row(skip=False) == without.replace("S", "h") + with_overwrite.replace("S", "P")


@pytest.mark.parametrize("damage", ["", "[1]", "a: [", "\x00\x01"])
def test_damaged_files_of_a_run_cause_no_crash(world, damage):
    """Lost hashes are written anew; without readable settings resume is refused.

    Without a readable versions.json the folder does not count as a run folder.
    """
    make_output(world, "none", "same", "checkpt")
    resuming = world(resume="auto")
    (world.out / "started.json").write_text(damage)
    assert run_folder.open_run("reward", resuming) == world.out
    run_folder.finish_run(world.out, {"loss": 1.0})
    (world.out / "summary.json").write_text(damage)
    assert RunState("reward", resuming).is_done and run_folder.read_summary(world.out) == {}
    (world.out / "finished.json").unlink()
    (world.out / "config.yaml").write_text(damage)
    with pytest.raises(UserError, match="config.yaml cannot be read"):
        run_folder.check_output("reward", resuming)
    (world.out / "versions.json").write_text(damage)
    with pytest.raises(UserError, match="no run folder"):
        run_folder.check_output("reward", world(overwrite="true"))


def test_a_link_that_leads_to_no_folder_is_refused_before_anything_is_loaded(world, tmp_path):
    nowhere, loop = tmp_path / "nowhere", tmp_path / "loop"
    nowhere.symlink_to(tmp_path / "gone")
    loop.symlink_to(loop)
    for link in (nowhere, loop):
        with pytest.raises(UserError, match="is a link that leads to no folder"):
            run_folder.check_output("reward", world(output=str(link), overwrite="true"))


def test_check_output_predicts_what_open_run_does(world):
    for resume, action, remains in (
        (None, Action.NEW, ["reward"]),
        ("auto", Action.REPLACE, ["reward"]),
        ("saved", Action.SET_ASIDE, ["reward", "reward.set-aside"]),
    ):
        if resume == "saved":
            (world.out / "model").mkdir()
        cfg = world(**({"resume": "auto"} if resume else {}))
        assert run_folder.check_output("reward", cfg) is action
        run_folder.open_run("reward", cfg)
        assert sorted(p.name for p in world.out.parent.iterdir()) == remains
    checkpoint(world.out)
    assert run_folder.check_output("reward", world(resume="auto")) is Action.RESUME
    assert (
        run_folder.open_run("reward", world(resume="auto")) == world.out
        and (world.out / "resumed.jsonl").exists()
    )
    run_folder.finish_run(world.out, {})
    assert run_folder.check_output("reward", world(resume="auto")) is Action.SKIP


def test_the_demo_never_resumes():
    assert request_of(DemoConfig(overwrite=True)) == Request(None, True)


def counted(monkeypatch, *functions):
    """Counts the calls of functions under every name that a module of the package has for them."""
    counts = Counter()
    for function in functions:

        def wrapped(*args, function=function, **kwargs):
            counts[function.__name__] += 1
            return function(*args, **kwargs)

        for module in [m for name, m in sys.modules.items() if name.startswith("saferlhf_fast")]:
            for name in [name for name, value in vars(module).items() if value is function]:
                monkeypatch.setattr(module, name, wrapped)
    return counts


@pytest.mark.parametrize("saved, hashed", [("checkpt", 0), ("model", 1)])
def test_a_start_computes_settings_and_hashes_no_more_often_than_needed(world, monkeypatch, saved, hashed):
    make_output(world, "none", "same", saved)
    stage = types.ModuleType("fake_stage")
    stage.train = lambda cfg, restart: run_folder.open_run("reward", cfg, restart) and {}
    monkeypatch.setitem(sys.modules, "fake_stage", stage)
    monkeypatch.setitem(pipeline.ENTRIES, "reward", "fake_stage:train")
    counts = counted(monkeypatch, load.to_dict, fingerprint.recipe_hash, fingerprint.hashes)
    pipeline.run_stage("reward", world(resume="auto"))
    # to_dict: once for the check of the inputs, then with and without secrets for the check of the output and
    # for the stage.
    assert (
        Counter(to_dict=1, hashes=hashed)
        <= counts
        <= Counter(to_dict=5, recipe_hash=2 * hashed, hashes=hashed)
    )
