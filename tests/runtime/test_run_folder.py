"""Run folders: which are refused, replaced or finished; bad input deletes nothing; checks of the inputs."""

import json
import os
import shutil

import pytest
import yaml

from saferlhf_fast.config import checks, inputs, load
from saferlhf_fast.errors import DiskError, UserError
from saferlhf_fast.runtime import provenance, run_folder
from saferlhf_fast.runtime.checkpoint import compatibility
from saferlhf_fast.runtime.run_state import RunState


@pytest.fixture
def world(tmp_path):
    """A function that makes a config over a model folder and a data file."""
    model = tmp_path / "llama"
    model.mkdir()
    for name, text in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}.items():
        (model / name).write_text(text)
    data = tmp_path / "data.json"
    data.write_text('[{"instruction": "a", "output": "b"}]')

    def sft(stage="sft", **changes):
        given = {"model": str(model), "data": str(data), "output": str(tmp_path / "runs" / "sft")}
        return load.load(stage, None, {**given, **changes})

    sft.model, sft.data, sft.out = model, data, tmp_path / "runs" / "sft"
    return sft


def is_done(stage, cfg):
    return RunState(stage, cfg).is_done


def files(folder):
    """{name: content} of a folder's files, without the claim of the process that writes into it."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("in_use.")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_a_run_folder_holds_settings_and_versions_and_no_environment_variable(world, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret-1234")
    folder = run_folder.open_run("sft", world(seed="7"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["stage"] == "sft" and config["seed"] == 7 and config["optim"]["betas"] == [0.9, 0.95]
    versions = json.loads((folder / "versions.json").read_text())
    assert {
        "python",
        "torch",
        "transformers",
        "deepspeed",
        "triton",
        "saferlhf-fast",
        "device",
        "git_commit",
    } <= set(versions)
    assert versions["seed"] == 7
    run_folder.finish_run(folder, {"loss": 1.5})
    assert run_folder.read_summary(folder) == {"loss": 1.5}
    assert set(files(folder)) == {
        "config.yaml",
        "versions.json",
        "started.json",
        "finished.json",
        "summary.json",
    }
    assert not any(b"secret-1234" in content for content in files(folder).values())


def test_the_config_of_a_run_can_be_loaded_as_a_recipe(world):
    cfg = world(seed="7", **{"train.max_steps": "3"})
    folder = run_folder.open_run("sft", cfg)
    assert load.load("sft", folder / "config.yaml") == cfg
    with pytest.raises(UserError, match="is of the stage sft, not dpo"):
        load.load("dpo", folder / "config.yaml")


def test_another_run_s_folder_is_refused_and_untouched(world):
    folder = run_folder.open_run("sft", world())
    (folder / "weights").write_text("precious")
    before = files(folder)
    for check in (run_folder.check_output, run_folder.open_run):
        with pytest.raises(UserError, match="runs/sft holds an unfinished run; .* overwrite=true"):
            check("sft", world(seed="2"))
    run_folder.finish_run(folder, {})
    with pytest.raises(UserError, match="holds a finished run"):
        run_folder.open_run("sft", world(seed="2"))
    after = files(folder)
    assert {name: after[name] for name in before} == before


def test_overwrite_replaces_a_run_folder_and_leaves_nothing_behind(world):
    folder = run_folder.open_run("sft", world())
    (folder / "weights").write_text("old")
    run_folder.open_run("sft", world(seed="2", overwrite="true"))
    assert not (folder / "weights").exists()
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 2
    assert [p.name for p in folder.parent.iterdir()] == ["sft"]


def test_overwrite_never_deletes_a_folder_that_is_no_run_folder(world):
    world.out.mkdir(parents=True)
    (world.out / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="no run folder"):
        run_folder.open_run("sft", world(overwrite="true"))
    assert files(world.out) == {"thesis.tex": b"precious"}


def test_overwrite_never_deletes_its_own_input(world):
    folder = run_folder.open_run("sft", world())
    shutil.copytree(world.model, folder / "model")
    with pytest.raises(UserError, match="holds this run's own input model="):
        run_folder.open_run("sft", world(model=str(folder / "model"), overwrite="true"))
    assert (folder / "model" / "config.json").exists()


SAVED = [
    "model/model.safetensors",
    "best/model.safetensors",
    "step-2/model.safetensors",
    "checkpoints/step-00000002/manifest.json",
    "checkpoints/step-00000002.set-aside/manifest.json",
]


def unfinished_run(world, *names, **changes):
    """Makes an unfinished run that has written files; returns its folder."""
    folder = run_folder.open_run("sft", world(**changes))
    for name in ("metrics.jsonl", *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("hours of work")
    return folder


@pytest.mark.parametrize(
    "saved", [name for name in SAVED if name != "checkpoints/step-00000002/manifest.json"]
)
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_resume_auto_without_a_checkpoint_sets_aside_what_was_saved(world, saved, overwrite, capsys):
    before = files(unfinished_run(world, saved))
    run_folder.open_run("sft", world(resume="auto", overwrite=overwrite))
    aside = world.out.with_name("sft.set-aside")
    assert files(aside) == before and not (world.out / "metrics.jsonl").exists()
    line = capsys.readouterr().out
    assert line.startswith(f"{world.out}: ") and line.endswith(f": {aside}\n") and line.count("\n") == 1
    assert "unfinished run" in line and "set aside" in line
    assert provenance.set_aside_by(world.out) == str(aside)
    files_again = files(unfinished_run(world, saved, resume="auto"))
    run_folder.open_run("sft", world(resume="auto"))
    assert files(world.out.with_name("sft.set-aside-2")) == files_again and files(aside) == before


def test_resume_auto_replaces_a_run_that_has_saved_nothing(world, capsys):
    # a folder without a manifest is no checkpoint
    folder = unfinished_run(world, "checkpoints/step-00000002/actor/shard.pt")
    run_folder.open_run("sft", world(resume="auto"))
    assert [p.name for p in folder.parent.iterdir()] == ["sft"] and capsys.readouterr().out == ""
    assert not (folder / "metrics.jsonl").exists() and provenance.set_aside_by(folder) is None


@pytest.mark.parametrize("saved", SAVED)
def test_a_recipe_s_unfinished_stage_is_set_aside_with_what_it_saved(world, saved):
    before = files(unfinished_run(world, saved))
    # as `run … resume=never` does, also if there is a checkpoint
    run_folder.open_run("sft", world(), restart=True)
    assert files(world.out.with_name("sft.set-aside")) == before


def test_a_restart_with_other_settings_sets_the_old_run_aside_unless_overwrite_is_true(world):
    before = files(unfinished_run(world))
    with pytest.raises(UserError, match="holds an unfinished run"):
        run_folder.open_run("sft", world(seed="2"))
    run_folder.open_run("sft", world(seed="2"), restart=True)
    assert files(world.out.with_name("sft.set-aside")) == before
    run_folder.open_run("sft", world(seed="3", overwrite="true"), restart=True)
    assert sorted(p.name for p in world.out.parent.iterdir()) == ["sft", "sft.set-aside"]


def test_a_finished_output_in_the_home_folder_is_recognised(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = world(output="~/runs/sft")
    run_folder.finish_run(run_folder.open_run("sft", cfg), {"loss": 1.5})
    assert is_done("sft", cfg) and run_folder.read_summary(cfg.output) == {"loss": 1.5}
    assert files(world.out)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda out: out.parent.mkdir() or out.write_text(""), "is a file; expected a folder"),
        (lambda out: out.mkdir(parents=True) or (out / "x").write_text(""), "is not empty"),
    ],
)
def test_a_file_and_a_folder_that_is_not_empty_are_refused_as_output(world, make, message):
    make(world.out)
    with pytest.raises(UserError, match=message):
        run_folder.check_output("sft", world())


@pytest.mark.parametrize(
    "output, message",
    [
        ("{data}/runs/sft", "output: {data}/runs/sft cannot be created: {data} is a file; expected a folder"),
        ("/proc/x", "output: /proc/x cannot be created: /proc takes no folder: "),
        ("/proc/x/y", "output: /proc/x/y cannot be created: /proc takes no folder: "),
        ("{root}/" + "x" * 300, "cannot be used: File name too long"),
    ],
)
def test_an_output_that_cannot_be_created_is_refused_before_anything_is_loaded(world, output, message):
    names = {"data": world.data, "root": world.data.parent}
    before = files(world.data.parent)
    with pytest.raises(UserError) as caught:
        run_folder.check_output("sft", world(output=output.format(**names)))
    assert message.format(**names) in str(caught.value) and files(world.data.parent) == before


def test_an_output_that_cannot_be_written_into_is_refused(world, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    world.out.mkdir(parents=True)
    run_folder.check_output("sft", world())
    assert not list(world.out.iterdir())
    monkeypatch.setattr(run_folder.tempfile, "mkdtemp", fail)
    with pytest.raises(
        UserError, match="runs/sft cannot be written into: .* takes no folder: No space left on device"
    ):
        run_folder.check_output("sft", world())


def test_an_output_that_cannot_be_created_when_the_run_opens_is_refused(world, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.Path, "mkdir", fail)
    with pytest.raises(UserError, match="^output: .*runs/sft cannot be created: No space left on device$"):
        run_folder.open_run("sft", world())


def test_the_folder_that_a_command_runs_in_is_not_renamed(world, monkeypatch):
    unfinished_run(world)
    monkeypatch.chdir(world.out)
    before = files(world.out)
    for output in (".", str(world.out)):
        with pytest.raises(UserError, match="holds the folder that this command was started in"):
            run_folder.check_output("sft", world(output=output, overwrite="true"))
    assert files(world.out) == before


def test_overwrite_replaces_a_link_and_not_the_folder_that_it_points_to(world, tmp_path):
    unfinished_run(world, output=str(tmp_path / "disk" / "sft"))
    world.out.parent.mkdir()
    world.out.symlink_to(tmp_path / "disk" / "sft")
    run_folder.open_run("sft", world(overwrite="true"))
    assert (tmp_path / "disk" / "sft" / "metrics.jsonl").exists() and not world.out.is_symlink()
    assert [p.name for p in world.out.parent.iterdir()] == ["sft"]


def test_an_empty_output_folder_is_accepted(world):
    world.out.mkdir(parents=True)
    assert run_folder.open_run("sft", world()) == world.out


def test_only_rank_0_writes_and_decides(world, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_folder.open_run("sft", world()) == world.out and not world.out.exists()
    run_folder.finish_run(world.out, {})
    assert not world.out.exists()
    monkeypatch.setenv("RANK", "0")
    run_folder.open_run("sft", world())
    monkeypatch.setenv("RANK", "1")
    run_folder.check_output("sft", world())  # rank 0 may have made the folder already, which is no error


def test_finished_means_same_settings_and_same_input_content(world):
    cfg = world()
    folder = run_folder.open_run("sft", cfg)
    assert not is_done("sft", cfg)
    run_folder.finish_run(folder, {})
    assert is_done("sft", cfg)
    assert is_done("sft", world(overwrite="true", **{"log.progress": "false"}))
    assert not is_done("sft", world(seed="1"))
    assert not is_done("dpo", cfg)
    moved = world.data.rename(world.data.with_name("moved.json"))
    assert is_done("sft", world(data=str(moved)))
    moved.write_text('[{"instruction": "a", "output": "c"}]')
    assert not is_done("sft", world(data=str(moved)))


def test_a_run_with_a_changed_weight_file_does_not_count_as_finished(world):
    cfg = world()
    folder = run_folder.open_run("sft", cfg)
    run_folder.finish_run(folder, {})
    (world.model / "model.safetensors").write_text("other weights")
    assert not is_done("sft", cfg)


def test_the_hashes_of_the_inputs_are_taken_when_the_run_starts(world):
    """Data that changes during a run must not count as the data that it was trained on."""
    cfg = world()
    folder = run_folder.open_run("sft", cfg)
    world.data.write_text("[1]")
    run_folder.finish_run(folder, {})
    assert not is_done("sft", cfg)


def test_a_half_written_finished_file_does_not_count(world):
    cfg = world()
    folder = run_folder.open_run("sft", cfg)
    (folder / "finished.json").write_text('{"stage": "sf')
    assert not is_done("sft", cfg)


def test_write_json_is_atomic(tmp_path, monkeypatch):
    provenance.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        provenance.write_json(tmp_path / "a.json", {"a": object()})

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(DiskError, match="a.json was not written: disk full"):
        provenance.write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_lists_are_compared_entry_by_entry():
    before, now = (
        {"data": ["a", {"path": "b", "count": 3}], "betas": (0.9, 0.95)},
        {"data": ["c", {"path": "d", "count": 3}], "betas": [0.9, 0.95]},
    )
    assert compatibility.differences(before, now, 1, 1, ["data.0", "data.1.path"]) == []
    now = {**now, "data": ["c", {"path": "d", "count": 4}]}
    assert compatibility.differences(before, now, 1, 1, ["data.0", "data.1.path"]) == [
        "data.1.count: 3 then, 4 now"
    ]


# ---------------------------------------------------------------- inputs of a stage


def check(stage, cfg, **kwargs):
    with pytest.raises(UserError) as caught:
        checks.check(stage, cfg, **kwargs)
    return str(caught.value)


def test_good_inputs_and_hub_names_pass(world):
    checks.check("sft", world())
    checks.check("sft", world(model="org/model", data="gpt2"))


@pytest.mark.parametrize(
    "gone, message",
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_an_incomplete_model_folder_is_named(world, gone, message):
    (world.model / gone).unlink()
    line = check("sft", world())
    assert line.startswith(f"model: {world.model}") and message in line


def test_a_tokenizer_config_alone_is_a_tokenizer_only_for_byte_models(world):
    (world.model / "tokenizer.json").unlink()
    (world.model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert "has no tokenizer" in check("sft", world())
    (world.model / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    checks.check("sft", world())


def test_bad_paths_are_named_with_their_key(world, tmp_path):
    assert check("sft", world(model="/no/where")).startswith("model: /no/where does not exist")
    assert "is a file" in check("sft", world(model=str(world.data)))
    assert check("sft", world(data="[a/b, {path: ./gone.jsonl}]")).startswith(
        "data.1.path: gone.jsonl does not exist"
    )
    assert check("sft", world(**{"train.eval_data": "gone.json"})).startswith("train.eval_data: gone.json")
    (world.model / "config.json").write_text("{")
    assert "config.json is not JSON" in check("sft", world())
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "folder").mkdir()
    assert "is empty" in check("sft", world(model="org/m", data=str(tmp_path / "empty.json")))
    assert "is an empty folder" in check("sft", world(model="org/m", data=str(tmp_path / "folder")))


def test_a_file_with_another_suffix_is_refused_as_data(world, tmp_path):
    from saferlhf_fast.data import files as data_files

    assert inputs.DATA_FILES == data_files.SUFFIXES
    (tmp_path / "data.txt").write_text("x")
    line = check("sft", world(data=str(tmp_path / "data.txt")))
    assert line.startswith(f"data: {tmp_path}/data.txt: expected") and ", ".join(data_files.SUFFIXES) in line
    world.data.rename(tmp_path / "DATA.JSON")
    checks.check("sft", world(data=str(tmp_path / "DATA.JSON")))


def test_unusable_paths_are_refused_with_their_key(world):
    for key in ("model", "data", "output", "resume"):
        assert check("sft", world(**{key: "~nobody-here/x"})).startswith(
            f"{key}: ~nobody-here/x: expected a home folder"
        )
    for key in ("model", "data"):
        assert check("sft", world(**{key: "/" + "x" * 300})).endswith("x cannot be read: File name too long")


def test_outputs_of_earlier_stages_need_not_exist_yet(world, tmp_path):
    cfg = world(model=str(tmp_path / "runs" / "a" / "model"))
    assert "does not exist" in check("sft", cfg)
    checks.check("sft", cfg, produced=[str(tmp_path / "runs" / "a")])
    assert "does not exist" in check("sft", cfg, produced=[str(tmp_path / "runs" / "ab")])


PPO = {"model": "org/m", "reward": "org/r"}


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        ("ppo-lag", PPO, "cost: missing; ppo-lag needs a cost model"),
        ("ppo-lag", {**PPO, "cost": "org/c", "ppo.shaping": "1"}, "ppo.shaping: only in the stage ppo"),
        ("ppo", {**PPO, "ppo.shaping": "1"}, "ppo.shaping: needs a cost model"),
        ("ppo", {**PPO, "cost_critic": "org/c"}, "cost_critic: needs a cost model"),
        ("ppo", {**PPO, "evaluation.select": "true"}, "evaluation.select: needs something to evaluate on"),
        (
            "ppo",
            {**PPO, "sampling.max_new_tokens": "512"},
            "sampling.max_new_tokens: must be below max_length (512)",
        ),
        ("sft", {"train.best_metric": "eval/loss"}, "train.best_metric: needs something to evaluate on"),
        (
            "sft",
            {"engine.offload_optimizer": "true"},
            "engine.offload_optimizer: needs engine.zero_stage 1, 2 or 3",
        ),
        (
            "sft",
            {"engine.offload_parameters": "true", "engine.zero_stage": "2"},
            "engine.offload_parameters: needs",
        ),
        (
            "sft",
            {"engine.config.zero_optimization.stage": "3"},
            "engine.config.zero_optimization.stage: expected none, since engine.zero_stage sets it; got 3",
        ),
        (
            "sft",
            {"engine.config.gradient_clipping": "0.5"},
            "engine.config.gradient_clipping: expected none, since optim.max_grad",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(world, stage, changes, message):
    assert check(stage, world(stage, **changes)).startswith(message)


def test_ppo_needs_no_cost_model(world):
    checks.check("ppo", world("ppo", **PPO))
    checks.check("ppo", world("ppo", **PPO, cost="org/c", **{"ppo.shaping": "1"}))


def test_a_start_that_is_interrupted_leaves_the_run_that_was_there(world, monkeypatch):
    folder = run_folder.open_run("sft", world())
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    run_folder.finish_run(folder, {})
    before = files(folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "write_json", interrupted)
        run_folder.open_run("sft", world(seed="2", overwrite="true"))
    assert files(folder) == before and os.listdir(folder.parent) == ["sft"]


def test_a_replaced_run_that_cannot_be_deleted_does_not_end_the_new_one(world, monkeypatch, capsys):
    folder = run_folder.open_run("sft", world())
    (folder / "model").mkdir()
    run_folder.finish_run(folder, {})

    def busy(path):
        raise OSError(39, "Directory not empty", path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert run_folder.open_run("sft", world(seed="2", overwrite="true")) == folder
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 2
    (old,) = [path for path in folder.parent.iterdir() if path != folder]
    assert f"{old}: the run that was replaced could not be deleted whole: Directory not empty" in (
        capsys.readouterr().out
    )


def test_a_run_that_cannot_be_moved_stays_and_leaves_nothing_beside_it(world, monkeypatch):
    folder = run_folder.open_run("sft", world())
    (folder / "model").mkdir()
    run_folder.finish_run(folder, {})

    def mounted(source, target):
        raise OSError(16, "Device or resource busy")

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="cannot be moved: Device or resource"),
    ):
        patch.setattr(os, "rename", mounted)
        run_folder.open_run("sft", world(seed="2", overwrite="true"))
    assert is_done("sft", world()) and os.listdir(folder.parent) == ["sft"]
