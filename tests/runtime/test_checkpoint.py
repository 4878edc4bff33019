"""The parts of a checkpoint: manifest, hashed files, state without pickles, safe loading, compatibility."""

import errno
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile

import kit
import pytest
import torch
from resume_kit import Marker

from saferlhf_fast.commands.checkpoint import cli, verify
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime.checkpoint import compatibility, manifest, safe_pickle
from saferlhf_fast.runtime.checkpoint.state import flatten, generators, restore, set_generators
from saferlhf_fast.runtime.checkpoint.writer import CheckpointWriter
from saferlhf_fast.training.anomalies import LossSpikeMonitor, MultiplierSaturation, NonFiniteGuard
from saferlhf_fast.training.ppo import multiplier


def write_checkpoint(output, step, score=None, content=b"weights"):
    """Writes a small complete checkpoint; returns its folder."""
    folder = manifest.folder_of(output, step)
    files = CheckpointWriter(folder)
    files.put("actor/shard.pt", lambda file: file.write(content))
    files.put_json("state.json", {"step": step})
    assert files.error is None
    manifest.write(
        folder,
        {
            "step": step,
            "score": score,
            "files": files.written,
            "universal": False,
            "world_size": 1,
            "stage": "sft",
            "written": "now",
            "saferlhf-fast": "0",
            "models": {"actor": {"weights": 7, "zero_stage": 0, "precision": "float32"}},
        },
    )
    return folder


# ---------------------------------------------------------------- manifest


def test_a_folder_without_a_manifest_is_not_a_complete_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path, 3)
    assert verify.whole(folder)["step"] == 3 and manifest.is_committed(folder)
    (folder / manifest.NAME).unlink()
    with pytest.raises(UserError, match="has no manifest.json: it was not finished"):
        verify.whole(folder)


@pytest.mark.parametrize("at", ["first", "middle", "last"])
def test_a_flipped_byte_in_any_file_is_detected_and_the_file_is_named(tmp_path, at):
    folder = write_checkpoint(tmp_path, 3)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        before = path.read_bytes()
        place = {"first": 0, "middle": len(before) // 2, "last": len(before) - 1}[at]
        path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
        with pytest.raises(UserError) as caught:
            verify.whole(folder)
        assert str(path) in str(caught.value) and (
            "damaged" in str(caught.value) or "format" in str(caught.value)
        )
        path.write_bytes(before)
    assert verify.whole(folder)


def test_missing_short_and_swapped_files_are_named(tmp_path):
    folder = write_checkpoint(tmp_path, 3)
    shard, state = folder / "actor" / "shard.pt", folder / "state.json"
    a, b = shard.read_bytes(), state.read_bytes()
    shard.write_bytes(a[:-1])
    problem = manifest.problem(folder, manifest.read(folder))
    assert str(shard) in problem and f"{len(a) - 1} bytes, expected {len(a)}" in problem
    shard.unlink()
    problem = manifest.problem(folder, manifest.read(folder))
    assert str(shard) in problem and "missing" in problem
    shard.write_bytes(b)
    state.write_bytes(a)
    assert manifest.problem(folder, manifest.read(folder)).startswith(str(shard))
    shard.unlink()
    (tmp_path / "elsewhere").write_bytes(a)
    shard.symlink_to(tmp_path / "elsewhere")
    assert "symbolic link" in manifest.problem(folder, manifest.read(folder))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a//b", "~/x", ".", "a\\b"])
def test_a_file_name_that_leads_out_of_the_checkpoint_is_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path, 3)
    values = manifest.read(folder)
    values["files"][name] = {"bytes": 1, "sha256": "0"}
    assert "no file name inside" in manifest.problem(folder, values)
    assert not manifest.is_inside(name)


def test_links_and_folders_with_other_names_are_not_listed_as_checkpoints(tmp_path):
    write_checkpoint(tmp_path / "other", 9)
    write_checkpoint(tmp_path, 3)
    root = manifest.root(tmp_path)
    (root / "step-00000009").symlink_to(manifest.folder_of(tmp_path / "other", 9))
    for name in ("step-9", "step-00000004.old", "..step-00000004", "step-00000004.universal.universal"):
        (root / name).mkdir()
    assert [step for step, _ in manifest.listed(tmp_path)] == [3]


def test_pruning_keeps_the_newest_and_the_best_checkpoint(tmp_path):
    for step, score in ((1, [0.5]), (2, [0.9]), (3, None), (4, [0.7]), (5, None)):
        write_checkpoint(tmp_path, step, score)
    unfinished = manifest.folder_of(tmp_path, 3).with_name("step-00000002.universal")
    unfinished.mkdir()
    newer = manifest.folder_of(tmp_path, 6)
    newer.mkdir()
    manifest.prune(tmp_path, 2, True)
    assert sorted(step for step, path in manifest.listed(tmp_path) if manifest.is_committed(path)) == [
        2,
        4,
        5,
    ]
    assert newer.exists()  # it may be in the middle of its save
    manifest.prune(tmp_path, 1, False)
    assert [step for step, path in manifest.listed(tmp_path) if manifest.is_committed(path)] == [5]


def test_a_failed_manifest_write_leaves_the_old_manifest(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, 3)
    before = (folder / manifest.NAME).read_bytes()
    monkeypatch.setattr(
        os, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(OSError):
        manifest.write(folder, {"step": 4, "files": {}})
    assert (folder / manifest.NAME).read_bytes() == before


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("background", [False, True])
def test_files_are_hashed_as_they_are_written(tmp_path, background):
    files, state = CheckpointWriter(tmp_path, background), {"weights": torch.arange(5.0), "step": 3}
    files.save(state, str(tmp_path / "actor" / "shard.pt"))
    files.put_tensors("state.safetensors", {"a": torch.ones(2)})
    files.put_folder("hf", lambda folder: (folder / "config.json").write_text("{}"))
    state["weights"].zero_()  # training may change weights while the background thread writes
    if background:
        assert not files.written
        files.start()
        files.wait()
    assert files.error is None and set(files.written) == {
        "actor/shard.pt",
        "state.safetensors",
        "hf/config.json",
    }
    for name, entry in files.written.items():
        assert (
            manifest.sha256(tmp_path / name) == entry["sha256"]
            and (tmp_path / name).stat().st_size == entry["bytes"]
        )
    loaded = files.load(str(tmp_path / "actor" / "shard.pt"))
    assert loaded["step"] == 3 and loaded["weights"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_after_a_failed_write_the_error_is_kept_and_nothing_more_is_written(tmp_path):
    def write_to_full_disk(file):
        file.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    files = CheckpointWriter(tmp_path)
    files.put("a.pt", write_to_full_disk)
    files.put("b.pt", lambda file: file.write(b"more"))
    assert "a.pt: No space left on device (" in files.error and not files.written
    assert not (tmp_path / "b.pt").exists()


def test_a_file_that_reads_back_with_another_hash_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "sha256", lambda path: "0")
    files = CheckpointWriter(tmp_path)
    files.put("a.pt", lambda file: file.write(b"some"))
    assert "reads back otherwise" in files.error and not files.written


# ---------------------------------------------------------------- state


def test_flatten_and_restore_return_the_same_state_bit_for_bit():
    tree = {
        "a": torch.tensor([1.5, float("nan")]),
        "list": [1, None, {"b": torch.tensor(3)}],
        "text": "x.y",
        "k.with.dots": 2.5,
    }
    flat, tensors = flatten(tree)
    restored = restore(json.loads(json.dumps(flat)), tensors)
    assert (
        torch.equal(restored["a"].view(torch.int32), tree["a"].view(torch.int32))
        and restored["list"][2]["b"].item() == 3
    )
    assert restored["list"][:2] == [1, None] and restored["text"] == "x.y" and restored["k.with.dots"] == 2.5
    with pytest.raises(TypeError, match="expected a number, a text or a tensor"):
        flatten({"x": {"y": object()}})


def test_restored_random_generators_draw_the_same_numbers():
    import numpy

    saved = json.loads(json.dumps(generators()))
    drawn = random.random(), torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.gauss(0, 1)
    torch.rand(5), random.random(), numpy.random.rand(2)
    set_generators(saved)
    assert (
        random.random(),
        torch.rand(3).tolist(),
        numpy.random.rand(3).tolist(),
        random.gauss(0, 1),
    ) == drawn


@pytest.mark.parametrize(
    "make",
    [
        lambda: multiplier.LagrangeMultiplier(window=5, lr=0.3, delay=1),
        lambda: multiplier.PIDMultiplier(window=5),
    ],
)
def test_a_restored_multiplier_gives_the_same_values_bit_for_bit(make):
    costs = [torch.randn(3) for _ in range(6)]
    uninterrupted, interrupted, resumed = make(), make(), make()
    for batch in costs:
        uninterrupted.update(batch)
    for batch in costs[:3]:
        interrupted.update(batch)
    flat, tensors = flatten(interrupted.state_dict())
    resumed.load_state_dict(restore(json.loads(json.dumps(flat)), tensors))
    for batch in costs[3:]:
        resumed.update(batch)
    assert resumed.value.item() == uninterrupted.value.item() and resumed.steps == uninterrupted.steps
    assert resumed.mean_cost.item() == uninterrupted.mean_cost.item() and torch.equal(
        resumed.window.costs, uninterrupted.window.costs
    )


# ---------------------------------------------------------------- what may be loaded


def test_code_in_a_pickle_is_not_run(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "shard.pt"
    torch.save({"module": {"w": torch.ones(2)}, "extra": Marker(mark)}, path)
    torch.load(path, weights_only=False)  # to show that the marker runs when it is unpickled
    assert mark.exists()
    mark.unlink()
    for attempt in (lambda: safe_pickle.load(path), lambda: CheckpointWriter(tmp_path).load(str(path))):
        with pytest.raises(UserError) as caught:
            attempt()
        assert str(path) in str(caught.value) and "was not run" in str(caught.value) and not mark.exists()
    with safe_pickle.guarded(), pytest.raises(UserError):
        torch.load(path, map_location="cpu", weights_only=False)  # as DeepSpeed calls it
    assert not mark.exists() and torch.load is safe_pickle._TORCH_LOAD


def test_objects_that_deepspeed_writes_can_be_loaded(tmp_path):
    from saferlhf_fast.runtime import deepspeed_library

    deepspeed_library.imported_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = {
        "scaler": LossScaler(2.0),
        "stage": ZeroStageEnum.weights,
        "at": fragment_address(3, 4),
        "w": torch.ones(2),
    }
    torch.save(state, tmp_path / "x.pt")
    loaded = safe_pickle.load(tmp_path / "x.pt")
    assert (
        loaded["scaler"].cur_scale == 2.0
        and loaded["stage"] == ZeroStageEnum.weights
        and loaded["at"] == fragment_address(3, 4)
    )


def test_code_in_an_old_style_pickle_is_not_run(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "old.pt"
    path.write_bytes(pickle.dumps(Marker(mark)))
    with pytest.raises(UserError, match="old.pt"):
        safe_pickle.load(path)
    assert not mark.exists()
    with zipfile.ZipFile(tmp_path / "fake.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Marker(mark)))
        file.writestr("archive/version", "3")
    with pytest.raises((UserError, RuntimeError)):
        safe_pickle.load(tmp_path / "fake.pt")
    assert not mark.exists()


# ---------------------------------------------------------------- compatibility


BEFORE = {
    "stage": "sft",
    "train": {"batch_size": 4, "accumulation": 2, "epochs": 3.0, "micro_tokens": None},
    "seed": 1,
    "engine": {"zero_stage": 2, "threads": 1},
    "output": "a",
    "log": {"interval": 1},
}


def changed(**values):
    return {
        **BEFORE,
        **{
            key: {**BEFORE[key], **value} if isinstance(value, dict) else value
            for key, value in values.items()
        },
    }


def test_settings_that_change_no_result_may_differ():
    now = changed(
        output="b", train={"micro_tokens": 64}, engine={"threads": 2}, log={"interval": 5}, resume="auto"
    )
    assert compatibility.differences(BEFORE, now, 1, 1) == []
    assert compatibility.differences(BEFORE, changed(seed=2, train={"epochs": 4.0}), 1, 1) == [
        "seed: 1 then, 2 now",
        "train.epochs: 3.0 then, 4.0 now",
    ]
    with pytest.raises(UserError, match="resume: x belongs to other settings: seed: 1 then, 2 now"):
        compatibility.require_compatible("x", ["seed: 1 then, 2 now"])


def test_with_another_number_of_processes_the_global_batch_must_be_equal():
    assert compatibility.differences(BEFORE, changed(train={"batch_size": 8}), 2, 1) == []
    assert compatibility.differences(BEFORE, BEFORE, 2, 1) == [
        "batch of all processes: 16 then, 8 now (a process's portion times 2 and 1 processes)"
    ]
    assert compatibility.differences(BEFORE, changed(train={"batch_size": 8}), 1, 1) == [
        "train.batch_size: 4 then, 8 now"
    ]


# ---------------------------------------------------------------- skipped steps and warnings


def test_too_many_non_finite_steps_in_a_row_end_the_run(tmp_path):
    guard = NonFiniteGuard(2)
    guard.note(1, ["loss"], None)
    guard.note(2, [], None)
    restored = NonFiniteGuard(2)
    restored.load_state_dict(guard.state_dict())
    restored.note(3, ["loss"], None)
    with pytest.raises(
        UserError, match="step 4: loss, gradient norm: expected finite .* in 2 steps.*saved in here"
    ):
        restored.note(4, ["loss", "gradient norm"], lambda: "here")
    assert restored.total == 3


def test_a_loss_spike_is_reported_once(capsys):
    monitor = LossSpikeMonitor(("loss",))
    for step in range(60):
        monitor.look(step, {"loss": 1.0 if step < 30 or step > 50 else 3.0})
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "step 33: loss 3 has been above 2 times its median of 1" in " ".join(
        out.split()
    )
    monitor.look(61, {"loss": float("nan")})


def test_a_multiplier_at_its_bound_is_reported(capsys):
    saturation = MultiplierSaturation(5.0, -1.0, patience=3)
    for step, value in enumerate((5.0, 5.0, 4.0, 5.0, 5.0, 5.0, 5.0)):
        saturation.look(step, {"lambda": value, "episode_cost": 2.0})
    out = " ".join(capsys.readouterr().out.split())
    assert (
        out.count("warning") == 1
        and "step 5: λ has been at its bound of 5 for 3 steps, with a mean cost of 2" in out
    )


# ---------------------------------------------------------------- commands


def test_inspect_lists_checkpoints_and_reports_damage(tmp_path, capsys):
    write_checkpoint(tmp_path, 1, [-0.5])
    folder = write_checkpoint(tmp_path, 2)
    cli.main(["inspect", str(tmp_path)])
    out = capsys.readouterr().out
    assert (
        out.count("every SHA-256 is right") == 2
        and "evaluation: loss 0.500\n" in out
        and "actor: 7 weights" in out
    )
    (folder / "actor" / "shard.pt").write_bytes(b"WEIGHTS")
    with pytest.raises(UserError, match="1 of 2 cannot be used: .*shard.pt is damaged"):
        cli.main(["inspect", str(tmp_path)])
    cli.main(["inspect", str(folder), "--quick"])  # --quick checks the size only, which is right


@pytest.mark.parametrize(
    "stage, score, expected",
    [
        ("ppo-lag", [1, -0.003351], "cost within the threshold, reward -0.003"),
        ("ppo-lag", [0, -1.5], "cost 1.500, above the threshold"),
        ("ppo", [1, 2], "reward 2.000"),
    ],
)
def test_an_evaluation_is_described_in_words(stage, score, expected):
    assert cli.evaluation({"stage": stage, "score": score}) == expected


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "required: action, path"),
        (["eat", "x"], "invalid choice: 'eat'"),
        (["inspect", "/no/where"], "/no/where: expected a checkpoint"),
        (["export", "/no/where/step-00000001"], "missing: --output"),
        (["convert", "/no/where/step-00000001"], "is no folder"),
    ],
)
def test_mistakes_in_the_command_line_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        cli.main(words)


def test_inspect_needs_no_torch(tmp_path):
    write_checkpoint(tmp_path, 1)
    code = (
        "import sys; from saferlhf_fast import cli; code = cli.main(['checkpoint', 'inspect', sys.argv[1]]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=kit.ROOT
    )
    assert completed.returncode == 0, completed.stderr


def test_convert_refuses_an_output_folder_that_is_not_empty(tmp_path, capsys):
    folder, other = write_checkpoint(tmp_path, 1), tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    values = {key: value for key, value in manifest.read(folder).items() if key not in ("seal", "format")}
    manifest.write(
        folder, {**values, "models": {"actor": {"weights": 7, "zero_stage": 2, "precision": "float32"}}}
    )
    for output in (other, tmp_path, folder):
        with pytest.raises(UserError, match="is not empty; expected a new folder"):
            cli.main(["convert", str(folder), "--output", str(output)])
    assert (other / "thesis.tex").read_text() == "precious" and verify.whole(folder)


def test_checkpoints_newer_than_the_resumed_one_are_set_aside(tmp_path):
    for step in (2, 3, 4):
        write_checkpoint(tmp_path, step)
    manifest.folder_of(tmp_path, 5).mkdir()  # an unfinished one
    manifest.set_aside(tmp_path, 2)
    write_checkpoint(tmp_path, 3)
    manifest.prune(tmp_path, 1, True)
    three, four = "step-00000003.set-aside", "step-00000004.set-aside"
    assert sorted(os.listdir(manifest.root(tmp_path))) == ["step-00000003", three, four]
    manifest.set_aside(tmp_path, 2)  # must not replace the earlier step-00000003.set-aside
    assert sorted(os.listdir(manifest.root(tmp_path))) == [three, f"{three}-2", four]


def test_newest_returns_the_newest_complete_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 1)
    shard = write_checkpoint(tmp_path, 2) / "actor" / "shard.pt"
    shard.write_bytes(b"WEIGHTS")
    assert verify.newest(tmp_path).name == "step-00000001"
    shard.unlink()
    manifest.discard(manifest.folder_of(tmp_path, 1))
    with pytest.raises(UserError, match="shard.pt is missing"):
        verify.newest(tmp_path)


def test_an_unreadable_file_is_reported_as_a_problem_of_the_checkpoint(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, 1)
    values = manifest.read(folder)
    monkeypatch.setattr(
        manifest, "sha256", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    )
    assert "cannot be read: [Errno 5] Input/output error" in manifest.problem(folder, values)


def test_an_error_while_a_config_is_written_is_kept_and_not_raised(tmp_path):
    files = CheckpointWriter(tmp_path)
    files.put_folder("hf", lambda folder: (_ for _ in ()).throw(ValueError("temperature without do_sample")))
    assert "hf: ValueError: temperature without do_sample" in files.error
