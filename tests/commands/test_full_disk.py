"""A disk that fills up under a command: exit code 2, one line that says what is saved where, nothing half
written, and the command in that line goes on once there is space.
"""

import contextlib
import errno
import os
import shlex
from unittest import mock

import kit
import pytest
import resume_kit

from saferlhf_fast.commands.checkpoint import convert as converting
from saferlhf_fast.runtime import disk
from saferlhf_fast.runtime.checkpoint import manifest
from saferlhf_fast.runtime.folder_claims import PROBE

PPO = {"ppo.max_steps": 2, "checkpoint.interval": 1}
SFT = {
    "train.max_steps": 2,
    "train.best_metric": "null",
    "train.eval_interval": "null",
    "checkpoint.interval": 1,
}
PAIRS = {"train.max_steps": 2, "checkpoint.interval": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return resume_kit.make_world(tmp_path_factory.mktemp("disk"))


@pytest.fixture(autouse=True)
def report_without_charts():
    """Charts take longer than tiny runs; the page is a file of the run all the same."""

    def write(folder):
        disk.write_text(folder / "report.html", "page")
        return folder / "report.html"

    with mock.patch("saferlhf_fast.evaluation.report.write_report", write):
        yield


@contextlib.contextmanager
def full_at(name, number=errno.ENOSPC, times=99):
    """The disk is full when a file or folder that has a temporary name of this one is to become whole."""
    sync, left = disk.sync, [times]

    def fail(path):
        if left[0] and f"/{name}." in str(path).replace(f"/{PROBE}", "/").replace("/.", "/"):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        sync(path)

    with mock.patch.object(disk, "sync", fail):
        yield


def words_of(line):
    """The words of the command that ends an error's line."""
    program, *words = shlex.split(line.rpartition("once the disk takes files again: ")[2])
    assert program == "saferlhf-fast"
    return words


def error_line(capsys):
    """The one line of standard error."""
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), (lines, out)
    return lines[0]


def leftovers(folder):
    """Files and folders with temporary names."""
    return [path for path in folder.rglob("*") if ".tmp" in path.name]


CASES = [
    ("sft", {**SFT, "overwrite": "true"}, "started.json", errno.EROFS, "no model and no checkpoint"),
    ("sft", SFT, "o/model", errno.ENOSPC, "saved: the checkpoint of step 2"),
    ("sft", SFT, "summary.json", errno.EDQUOT, "the model in {o}/model, the checkpoint of step 2"),
    ("sft", SFT, "report.html", errno.EIO, "the run is finished; saved: the model in {o}/model"),
    ("reward", {**PAIRS, "lora.rank": 2}, "adapter", errno.EFBIG, "the model in {o}/model, the checkpoint"),
    (
        "ppo-lag",
        PPO,
        "evaluation_after.json",
        errno.ENOSPC,
        "the model in {o}/model, the checkpoint of step 2",
    ),
    ("evaluate", {}, "samples.jsonl", errno.ENOSPC, "no model and no checkpoint"),
]


@pytest.mark.parametrize("stage, settings, name, number, saved", CASES)
def test_a_full_disk_ends_a_stage_with_what_is_saved_and_the_command_that_goes_on(
    world, tmp_path, capsys, stage, settings, name, number, saved
):
    output = tmp_path / "o"
    if stage == "evaluate":
        words = [stage, f"model={world['model']}", f"prompts={world['prompts']}", f"reward={world['reward']}"]
        words += [f"output={output}", "max_length=24", "sampling.max_new_tokens=3"]
    else:
        words = resume_kit.words(stage, world, output, **settings)
    with full_at(name, number):
        assert kit.main(*words) == 2
    line = error_line(capsys)
    assert f"{name} was not written: {os.strerror(number)}" in line, line
    assert saved.format(o=output) in line, line
    assert not leftovers(output) and not (output / name).is_file()
    assert kit.main(*words_of(line)) == 0
    out, err = capsys.readouterr()
    assert not err and (output / "finished.json").is_file() and (output / "summary.json").is_file()
    assert (
        (output.parent / name).exists()
        or (output / name).exists()
        or name == "adapter"
        and (output / "model" / "adapter").is_dir()
    )
    assert "the checkpoint" not in saved or "resume: step 2" in out or name == "report.html"


def test_what_a_run_can_do_without_is_a_warning_unless_checkpoints_are_required(world, tmp_path, capsys):
    settings = {**SFT, "train.save_interval": 1, "train.eval_interval": 1, "train.best_metric": "eval/loss"}
    words = resume_kit.words("sft", world, tmp_path / "o", **settings)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        full_at("step-1"),
        full_at("best", times=1),
        mock.patch.object(manifest, "write", side_effect=full),
    ):
        assert kit.main(*words) == 0
    out, err = capsys.readouterr()
    for what in ("step-1 was not written", "best was not written", "checkpoint of step 1 was not written"):
        assert what in out.replace("\n", ""), what
    assert "No space left on device" in out and "there is none so far" in out
    assert not err and not (tmp_path / "o" / "step-1").exists() and not leftovers(tmp_path)
    assert (tmp_path / "o" / "model" / "model.safetensors").is_file()
    before = kit.files(tmp_path / "o")
    with full_at("started.json"):  # a run that was to replace this one: this one stays
        assert kit.main(*words, "overwrite=true") == 2
    assert "started.json was not written" in error_line(capsys) and kit.files(tmp_path / "o") == before
    words = resume_kit.words("sft", world, tmp_path / "p", **{**settings, "checkpoint.required": "true"})
    with full_at("step-1"):
        assert kit.main(*words) == 2
    assert "step-1 was not written" in error_line(capsys)
    words = resume_kit.words("sft", world, tmp_path / "q", **{**SFT, "checkpoint.required": "true"})
    save = manifest.write

    def second_fails(folder, values):
        if values["step"] == 2:
            raise full
        save(folder, values)

    with mock.patch.object(manifest, "write", second_fails):
        assert kit.main(*words) == 2
    line = error_line(capsys)
    assert "checkpoint of step 2 was not written" in line and "step-00000001" in line
    assert [step for step, _ in manifest.listed(tmp_path / "q")] == [1]
    assert kit.main(*words_of(line)) == 0 and "resume: step 1" in capsys.readouterr().out


def test_a_recipe_names_the_stage_and_goes_on_with_the_rest(world, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    train = "{max_steps: 1, batch_size: 3}"
    recipe.write_text(
        f"output: {tmp_path}/o\nstages:\n"
        f"  - sft: {{model: {world['model']}, data: {world['sft']}, train: {train}}}\n"
        "  - name: second\n"
        f"    cost: {{model: '${{output}}/sft/model', data: {world['pairs']}, train: {train}}}\n"
    )
    with full_at("second/model"):
        assert kit.main("run", recipe) == 2
    line = error_line(capsys)
    assert line.startswith("error: stage second: ") and "finished stages: sft" in line
    assert words_of(line) == ["run", str(recipe)] and kit.main(*words_of(line)) == 0
    out = capsys.readouterr().out
    assert "sft: finished before" in out and (tmp_path / "o" / "second" / "model" / "config.json").is_file()
    with full_at("summary.json"):
        assert kit.main("run", recipe) == 2
    assert f"{tmp_path}/o/summary.json was not written" in error_line(capsys)


def test_checkpoint_commands_leave_nothing_half_written(world, tmp_path, capsys):
    run = tmp_path / "run"
    settings = {**SFT, "engine.zero_stage": 1, "train.max_steps": 1}
    assert kit.main(*resume_kit.words("sft", world, run, **settings)) == 0
    before = kit.files(run)
    capsys.readouterr()
    with full_at("export"):
        assert kit.main("checkpoint", "export", run, "--output", tmp_path / "export") == 2
    line = error_line(capsys)
    assert not (tmp_path / "export").exists() and not leftovers(tmp_path)
    assert kit.main(*words_of(line)) == 0
    capsys.readouterr()
    real = manifest.write
    for target in ([], ["--output", str(tmp_path / "converted")]):
        with mock.patch.object(converting.manifest, "write", side_effect=OSError(28, os.strerror(28))):
            assert kit.main("checkpoint", "convert", run, *target) == 2
        line = error_line(capsys)
        assert "No space left on device" in line and kit.files(run) == before and not leftovers(tmp_path)
        assert converting.manifest.write is real and kit.main(*words_of(line)) == 0
        capsys.readouterr()
        before = kit.files(run)
