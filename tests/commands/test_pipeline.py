"""`run`: stages in order, finished ones skipped, unfinished ones started again; everything checked before the
first.
"""

import json
import sys
import types

import kit
import pytest

from saferlhf_fast.cli import main
from saferlhf_fast.commands import run as pipeline
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import provenance, run_folder, run_state

RECIPE = """
root: ???
output: ???
seed: 7
stages:
  - sft: {model: "${root}/llama", data: "${root}/data.json", train: {max_steps: 5}}
  - reward: {model: "${output}/sft/model", data: "${root}/data.json"}
  - {name: second, cost: {model: "${output}/sft/model", data: "${root}/data.json", seed: 9}}
"""
CONTENT = {"config.json": "{{}}", "tokenizer.json": "{{}}", "model.safetensors": "{}"}


class Stages:
    """Stands in for the trainers: notes each call, writes a model that depends on the config's max_steps."""

    def __init__(self):
        self.calls, self.broken, self.saved, self.collections = [], None, [], 0

    def collected(self):
        self.collections += 1

    def train(self, stage, cfg, restart):
        self.calls.append((stage, cfg))
        folder = run_folder.open_run(stage, cfg, restart)
        if self.broken == stage:
            for name in self.saved:
                (folder / name).parent.mkdir(parents=True)
                (folder / name).write_text("hours of work")
            raise RuntimeError("out of luck")
        (folder / "model").mkdir()
        for name, text in CONTENT.items():
            (folder / "model" / name).write_text(text.format(cfg.train.max_steps))
        return {"eval/loss": 0.25}

    @property
    def names(self):
        """Stages called since the last look."""
        names, self.calls = [stage for stage, _ in self.calls], []
        return names


@pytest.fixture
def stages(monkeypatch):
    fake = Stages()
    module = types.ModuleType("fake_stages")
    for stage in pipeline.ENTRIES:
        setattr(module, f"do_{stage}", lambda cfg, restart, stage=stage: fake.train(stage, cfg, restart))
        monkeypatch.setitem(pipeline.ENTRIES, stage, f"fake_stages:do_{stage}")
    monkeypatch.setitem(sys.modules, "fake_stages", module)
    # Stages that train nothing leave nothing to collect; a full collection of this process takes 0.3 s.
    monkeypatch.setattr(pipeline, "gc", types.SimpleNamespace(collect=fake.collected))
    monkeypatch.setattr(provenance, "git_commit", lambda: "abc")
    return fake


@pytest.fixture
def go(tmp_path, stages):
    """Calls pipeline.run on RECIPE over a small model folder and data file."""
    model = tmp_path / "llama"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    (tmp_path / "data.json").write_text("[{}]")

    def run(text=RECIPE, **overrides):
        (tmp_path / "recipe.yaml").write_text(text)
        given = {"root": str(tmp_path), "output": str(tmp_path / "out")}
        given |= {key.replace("__", "."): value for key, value in overrides.items()}
        return pipeline.run(tmp_path / "recipe.yaml", given)

    run.out = tmp_path / "out"
    run.folder = tmp_path
    return run


def refused(go, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        go(*args, **kwargs)
    return str(caught.value)


def test_stages_run_in_order_with_the_recipe_s_output_and_seed(go, stages, capsys):
    done = go()
    assert [(s, cfg.output, cfg.seed) for s, cfg in stages.calls] == [
        ("sft", f"{go.out}/sft", 7),
        ("reward", f"{go.out}/reward", 7),
        ("cost", f"{go.out}/second", 9),
    ]
    assert stages.calls[1][1].model == f"{go.out}/sft/model"
    assert stages.calls[0][1].train.epochs == 3 and stages.calls[0][1].train.max_steps == 5
    written = json.loads((go.out / "summary.json").read_text())["stages"]
    assert written == done and written["second"]["summary"] == {"eval/loss": 0.25}
    assert stages.collections == 3  # a stage's models are gone before the next stage
    assert "eval/loss 0.25" in capsys.readouterr().out


def test_a_stage_without_an_output_runs_each_time(go, stages, monkeypatch):
    """An evaluation with output: null prints its result and writes nothing."""
    text = RECIPE.partition("stages:")[0] + (
        'stages:\n  - evaluate: {model: "${root}/llama", prompts: "${root}/data.json", output: null}\n'
        '  - {name: again, evaluate: {model: "${root}/llama", prompts: "${root}/data.json", output: null}}\n'
    )
    calls = []
    monkeypatch.setattr(stages, "train", lambda stage, cfg, restart: calls.append(stage) or {"reward": 1.5})
    for _ in range(2):
        results = go(text)
        assert results["evaluate"]["output"] is None and results["evaluate"]["summary"] == {"reward": 1.5}
    assert calls == ["evaluate"] * 4 and [path.name for path in go.out.iterdir()] == ["summary.json"]


def test_a_second_run_does_nothing_and_says_so(go, stages, capsys):
    go()
    assert stages.names == ["sft", "reward", "cost"]
    capsys.readouterr()
    done = go()
    assert stages.names == []
    assert {entry["state"] for entry in done.values()} == {"skipped"}
    assert "second: finished before with the same settings and inputs; skipped" in capsys.readouterr().out
    assert done["sft"]["summary"] == {"eval/loss": 0.25}


def test_an_interrupted_run_goes_on_with_the_stage_that_broke(go, stages):
    stages.broken = "reward"
    with pytest.raises(RuntimeError) as caught:
        go()
    kept = go.out / "reward" / "error-rank0.txt"
    assert caught.value.__notes__ == [f"traceback: {kept}"] and "out of luck" in kept.read_text()
    assert list(json.loads((go.out / "summary.json").read_text())["stages"]) == ["sft"]
    stages.broken = None
    assert stages.names == ["sft", "reward"]
    go()
    assert stages.names == ["reward", "cost"]
    assert not kept.exists()


@pytest.mark.parametrize(
    "saved, settings",
    [
        ("step-2/model.safetensors", {"reward__train__max_steps": "6"}),
        ("metrics.jsonl", {"reward__train__max_steps": "6"}),
        ("step-2/model.safetensors", {}),
        ("checkpoints/step-00000002/manifest.json", {"resume": "never"}),
    ],
)
def test_what_an_unfinished_stage_saved_is_set_aside(go, stages, capsys, saved, settings):
    stages.broken, stages.saved = "reward", [saved] if "/" in saved else []
    with pytest.raises(RuntimeError):
        go()
    before = kit.files(go.out / "reward")
    stages.broken = None
    go(**settings)
    aside = go.out / "reward.set-aside"
    assert kit.files(aside) == before and (go.out / "reward" / "finished.json").exists()
    assert (
        f"{go.out}/reward: the unfinished run there was set aside, with all that it had saved: {aside}\n"
        in capsys.readouterr().out
    )


def test_bad_input_sets_nothing_aside(go, stages):
    stages.broken, stages.saved = "sft", ["step-2/model.safetensors"]
    with pytest.raises(RuntimeError):
        go()
    before = kit.files(go.out)
    (go.folder / "llama" / "config.json").write_text("{")
    assert "is not JSON" in refused(go)
    assert kit.files(go.out) == before


def test_an_output_in_the_home_folder_is_skipped_too(go, stages, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(go.folder))
    go(output="~/runs")
    assert stages.names == ["sft", "reward", "cost"]
    assert {entry["state"] for entry in go(output="~/runs").values()} == {"skipped"} and stages.names == []
    words = ["sft", f"model={go.folder}/llama", f"data={go.folder}/data.json", "output=~/one", "resume=auto"]
    assert main(words) == 0 and main(words) == 0
    assert "finished before" in capsys.readouterr().out and stages.names == ["sft"]


@pytest.mark.parametrize("output", ["{out}/./sft", "{out}/sft/", "{out}/sft/inside", "{out}", "{out}/.."])
def test_outputs_that_lie_in_one_another_are_refused(go, stages, output):
    """Replacing one would take the other along."""
    line = refused(go, second__output=output.format(out=go.out))
    assert "second.output: " in line and stages.names == []


def test_changed_settings_need_overwrite_and_change_what_depends_on_them(go, stages):
    go()
    assert stages.names == ["sft", "reward", "cost"]
    line = refused(go, sft__train__max_steps="6")
    assert line.startswith(f"sft.output: {go.out}/sft holds a finished run") and stages.names == []
    assert (go.out / "sft" / "model" / "model.safetensors").read_text() == "5"
    # and those that read it have to make room too
    line = refused(go, sft__train__max_steps="6", sft__overwrite="true")
    assert (
        ".output: " in line
        and "holds a finished run" in line
        and not line.startswith("sft.")
        and stages.names == []
    )
    assert (go.out / "sft" / "model" / "model.safetensors").read_text() == "5"
    go(sft__train__max_steps="6", overwrite="true")  # another SFT model: both score models start from it
    assert stages.names == ["sft", "reward", "cost"]
    go(sft__train__max_steps="6", second__train__max_steps="1", overwrite="true")
    assert stages.names == ["cost"]


def test_changed_data_needs_overwrite(go, stages):
    go()
    assert stages.names
    (go.folder / "data.json").write_text("[{}, {}]")
    assert "sft holds a finished run" in refused(go)
    assert stages.names == []


def test_an_output_that_cannot_be_made_is_told_before_the_first_stage(go, stages):
    where = go.folder / "data.json"
    line = f"output: {where}/out cannot be created: {where} is a file; expected a folder"
    assert refused(go, output=f"{where}/out") == line
    assert refused(go, second__output=f"{where}/out") == f"second.{line}"
    assert "File name too long" in refused(go, output=f"{go.folder}/" + "x" * 300)
    assert stages.names == [] and not go.out.exists()


def test_an_unfinished_run_of_another_kind_is_not_started_over(go, stages):
    stages.broken = "sft"
    with pytest.raises(RuntimeError):
        go()
    assert stages.names == ["sft"]
    other = "stages:\n  - {name: sft, reward: {model: '${root}/llama', data: '${root}/data.json'}}\n"
    assert "sft.output" in refused(go, other) and stages.names == []


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"second__train__batch_size": "x"},
            "command line: second.train.batch_size: expected whole number above 0",
        ),
        (
            {"second__train__batch_siz": "1"},
            "second.train.batch_siz: unknown key; did you mean second.train.batch_size?",
        ),
        (
            {"sfft__train__max_steps": "1"},
            "sfft.train.max_steps: unknown key; did you mean sft.train.max_steps?",
        ),
        ({"max_steps": "1"}, "command line: max_steps: unknown key; did you mean"),
        ({"outputt": "1"}, "command line: outputt: unknown key; did you mean output?"),
        ({"second__model": "/no/where"}, "second.model: /no/where does not exist"),
        ({"second__output": "{sft}"}, "is another stage's output too"),
        ({"seed": "-1"}, "command line: seed: expected whole number at least 0 and below"),
    ],
)
def test_every_stage_is_checked_before_the_first_one_starts(go, stages, overrides, message):
    overrides = {k: v.replace("{sft}", f"{go.out}/sft") for k, v in overrides.items()}
    assert message in refused(go, **overrides)
    assert stages.names == [] and not go.out.exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("output: o\nstages: 3\n", "stages: expected a list"),
        ("output: o\nstages: []\n", "expected at least one stage"),
        ("output: o\nstages: [sft]\n", "stages.0: expected one stage"),
        ("output: o\nstages:\n - sft: {}\n   cost: {}\n", "stages.0: expected one stage"),
        ("output: o\nstages:\n - stf: {}\n", "stages.0: unknown stage stf; did you mean sft?"),
        ("output: o\nstages:\n - sft: {}\n - sft: {}\n", "a second stage sft; give it a name"),
        ("output: o\nstages:\n - {name: seed, sft: {}}\n", "seed cannot be the name of a stage"),
        ("output: o\nstages:\n - sft:\n", "missing: sft.model, sft.data"),
        ("output: o\nstages:\n - sft: 3\n", "stages.0.sft: expected a mapping"),
        ("outputs: o\nstages:\n - sft: {}\n", "outputs: unknown key; did you mean output?"),
        ("model: m\n", "no stages; a recipe of one stage is started with"),
        (
            "output: o\nstages:\n - sft:\n    model: m\n    data: ???\n",
            "missing: sft.data (give it as sft.data=…)",
        ),
        (
            "output: o\nstages:\n - sft: {model: '${rot}/m', data: d}\n",
            "sft.model: Interpolation key 'rot' not found",
        ),
    ],
)
def test_a_recipe_that_is_no_pipeline(go, stages, text, message):
    with pytest.raises(UserError) as caught:
        (go.folder / "bad.yaml").write_text(text)
        pipeline.run(go.folder / "bad.yaml", {})
    assert message in str(caught.value) and str(go.folder / "bad.yaml") in str(caught.value)


def test_a_run_does_not_settle_in_a_stage_s_folder(go, stages):
    go()
    assert stages.names
    assert "holds a run of a single stage" in refused(go, output=str(go.out / "sft"))


def test_flags_work_for_stages_of_a_run(go, stages, monkeypatch):
    # neither is installed for the tests
    monkeypatch.setattr(pipeline.checks, "check_trackers", lambda *_: None)
    (go.folder / "recipe.yaml").write_text(RECIPE)
    words = [
        "run",
        str(go.folder / "recipe.yaml"),
        "--root",
        str(go.folder),
        f"--output={go.out}",
        "--overwrite",
        "--sft.log.trackers",
        "wandb",
        "trackio",
        "second.train.epochs=1.5",
    ]
    assert main(words) == 0
    assert stages.calls[0][1].log.trackers == ["wandb", "trackio"] and stages.calls[0][1].overwrite
    assert stages.calls[2][1].train.epochs == 1.5


def test_one_stage_by_itself_is_finished_too(go, stages, capsys):
    words = ["sft", f"model={go.folder}/llama", f"data={go.folder}/data.json", f"output={go.out}"]
    assert main(words) == 0
    assert json.loads((go.out / "finished.json").read_text())["stage"] == "sft"
    assert json.loads((go.out / "summary.json").read_text()) == {"eval/loss": 0.25}
    assert main(words) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert stages.names == ["sft"]


def test_a_demo_without_output_gets_a_folder_of_its_own(go, stages, monkeypatch):
    monkeypatch.chdir(go.folder)
    monkeypatch.setattr(
        stages, "train", lambda stage, cfg, restart: {"output": str(run_folder.open_run(stage, cfg))}
    )
    assert main(["demo"]) == 0
    made = list((go.folder / "runs").iterdir())
    assert len(made) == 1 and made[0].name.startswith("demo-2") and run_state.is_ours(made[0])
    assert json.loads((made[0] / "summary.json").read_text()) == {"output": f"runs/{made[0].name}"}
