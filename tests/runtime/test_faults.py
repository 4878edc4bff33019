"""Two processes that are killed, fail or read damaged files lose at most the steps since the last checkpoint.

make test-faults                       the trials (20 for each of ZeRO 2 and 3) and the other long ones
python tests/runtime/test_faults.py    the same trials, and the line for docs/benchmarks.md
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]
import kit
import resume_kit
from resume_kit import STEPS, digest, interrupted, launch, together, words

from saferlhf_fast.runtime.checkpoint import manifest

POINTS = [
    {"rank": 1, "at": "bytes", "share": 0.5},
    {"rank": 0, "at": "manifest"},
    {"rank": 1, "at": "bytes", "share": 0.0},
    {"rank": 1, "at": "bytes", "share": 1.0},
    {"rank": 0, "at": "files"},
    {"rank": 0, "at": "bytes", "share": 0.5},
    {"rank": 1, "at": "files"},
    {"rank": 1, "at": "bytes", "share": 0.99},
]
"""Where a save is interrupted; share is the written part of the rank's optimiser shard."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return resume_kit.make_world(tmp_path_factory.mktemp("faults"))


def committed(folder):
    return [step for step, path in manifest.listed(folder) if manifest.is_committed(path)]


def trials(world, folder, zero, count, report=lambda line: None):
    """Launches a run `count` times that writes a checkpoint at every step and is killed in a save.

    Each launch resumes from the last one. Returns the number of trials that resumed by themselves from the
    newest complete checkpoint. In the end the weights must equal those of a run that was never killed.
    """
    steps = {
        "train.max_steps": count + 2,
        "train.epochs": 99,
        "checkpoint.interval": 1,
        "checkpoint.keep": 2,
        "engine.zero_stage": zero,
        "resume": "auto",
    }
    uninterrupted, killed_run, survived = folder / "uninterrupted", folder / "killed", 0
    done = together(words("sft", world, uninterrupted, **steps), 2)
    assert [code for code, _, _ in done] == [0, 0], done
    newest = 0
    for i in range(count):
        fault = {**POINTS[i % len(POINTS)], "save": 2 if newest + 2 <= count + 2 else 1}
        done = together(words("sft", world, killed_run, **steps), 2, FAULT=json.dumps(fault))
        killed_rank, other_rank = done[fault["rank"]], done[1 - fault["rank"]]
        assert killed_rank[0] == -9, (fault, done)
        assert (
            other_rank[0] not in (0, -9) and other_rank[2].count("error:") + other_rank[2].count("rank") >= 1
        ), (
            fault,
            other_rank,
        )
        resumed = (
            f"resume: step {newest} from" in done[0][1]
            if newest
            else "the run starts from the beginning" in done[0][1]
        )
        if fault["rank"] != 0 or newest:  # a killed rank 0 may not have printed its line
            survived += resumed or (fault["rank"] == 0 and newest < committed(killed_run)[0])
        else:
            survived += 1
        assert committed(killed_run)[0] == newest + 1, (fault, committed(killed_run), done)
        newest += 1
        report(f"ZeRO-{zero} trial {i + 1}: {fault} -> complete checkpoint of step {newest}")
    done = together(words("sft", world, killed_run, **steps), 2)
    assert [code for code, _, _ in done] == [0, 0] and f"resume: step {newest} from" in done[0][1], done
    assert digest(uninterrupted / "model" / "model.safetensors") == digest(
        killed_run / "model" / "model.safetensors"
    )
    assert kit.losses(uninterrupted) == kit.losses(killed_run)
    return survived


@pytest.mark.numeric
@pytest.mark.faults
@pytest.mark.timeout(1700)
@pytest.mark.parametrize("zero", [2, 3])
def test_a_run_resumes_after_a_rank_is_killed_anywhere_in_a_save(world, tmp_path, zero):
    assert trials(world, tmp_path, zero, 20) == 20


@pytest.mark.numeric
def test_a_run_resumes_after_a_rank_is_killed_in_the_middle_of_its_shard(world, tmp_path):
    """The short form for every test run: one trial, with rank 1."""
    assert trials(world, tmp_path, 3, 1) == 1


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """Finished runs of two processes under ZeRO 2 and 3."""
    folder = tmp_path_factory.mktemp("two")
    cells = {(stage, zero): folder / f"{stage}{zero}" for stage, zero in (("sft", 2), ("ppo-lag", 3))}
    launch(
        [words(stage, world, path, **{"engine.zero_stage": zero}) for (stage, zero), path in cells.items()], 2
    )
    return cells


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["missing", "swapped"])
def test_all_ranks_refuse_a_missing_or_swapped_shard(world, two, tmp_path, damage):
    copy = interrupted(two["sft", 2], tmp_path / "b")
    a, b = sorted((manifest.folder_of(copy, 2) / "model").glob("*optim_states.pt"))
    if damage == "missing":
        b.unlink()
    else:
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)
    start = time.monotonic()
    done = together(words("sft", world, copy, resume="auto", **{"engine.zero_stage": 2}), 2)
    assert [code for code, _, _ in done] == [2, 2], done
    assert time.monotonic() - start < 90  # imports included; no rank waits for a timeout
    problem = "is missing" if damage == "missing" else "is damaged"
    assert problem in done[0][2] and str(manifest.folder_of(copy, 2)) in done[0][2]


@pytest.mark.faults
@pytest.mark.parametrize("stage, zero", [("sft", 0), ("sft", 2), ("cost", 3), ("ppo-lag", 2)])
def test_nan_on_one_rank_skips_the_step_on_all_ranks(world, tmp_path, stage, zero):
    command = words(stage, world, tmp_path / "a", **{"engine.zero_stage": zero})
    done = together(command, 2, FAULT=json.dumps({"rank": 1, "at": "nan", "save": 2}))
    assert [code for code, _, _ in done] == [0, 0], done
    assert kit.summary(tmp_path / "a")["skipped_steps"] == 1
    assert done[0][1].count("is left out on all ranks") == 1


@pytest.mark.faults
@pytest.mark.parametrize(
    "kind, value", [("reward", "nan"), ("cost", "inf"), ("cost", "1e30"), ("reward", "-inf")]
)
def test_an_invalid_score_skips_the_step_and_lambda_stays_in_its_bounds(world, tmp_path, kind, value):
    command = words("ppo-lag", world, tmp_path / "a", **{"engine.zero_stage": 2})
    done = together(
        command, 2, FAULT=json.dumps({"rank": 1, "at": "score", "kind": kind, "value": value, "save": 2})
    )
    assert [code for code, _, _ in done] == [0, 0], done
    assert kit.summary(tmp_path / "a")["skipped_steps"] == 1
    assert f"step 2 is left out on all ranks: score of the {kind} model" in " ".join(done[0][1].split())
    lambdas = kit.losses(tmp_path / "a", "train/lambda")
    assert len(lambdas) == STEPS and all(0 < x <= 5 for x in lambdas)


@pytest.mark.numeric
@pytest.mark.faults
def test_sigterm_on_one_rank_ends_both_with_one_checkpoint(world, tmp_path):
    command = words(
        "ppo-lag", world, tmp_path / "a", **{"engine.zero_stage": 3, "checkpoint.interval": STEPS}
    )
    launch([command], 2)
    command = words(
        "ppo-lag", world, tmp_path / "b", **{"engine.zero_stage": 3, "checkpoint.interval": STEPS}
    )
    done = together(command, 2, FAULT=json.dumps({"rank": 1, "at": "sigterm", "save": 2}))
    assert [code for code, _, _ in done] == [143, 143], done
    assert committed(tmp_path / "b") == [2] and "stopped after step 2" in done[0][2]
    done = together([*command, "resume=auto"], 2)
    assert [code for code, _, _ in done] == [0, 0], done
    resume_kit.assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.numeric
@pytest.mark.faults
def test_a_disk_that_is_really_full_does_not_end_the_run(world, tmp_path):
    """The folder of the checkpoints is a small file system of its own, mounted in a user namespace."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        pytest.skip("user namespaces are not permitted here")
    assert kit.main(*words("reward", world, tmp_path / "a")) == 0
    copy = interrupted(tmp_path / "a", tmp_path / "b")
    checkpoints, size = (
        manifest.root(copy),
        sum(p.stat().st_size for p in manifest.root(copy).rglob("*") if p.is_file()),
    )
    command = [sys.executable, "-m", "saferlhf_fast", *map(str, words("reward", world, copy, resume="auto"))]
    script = (
        f"cp -r {checkpoints} {tmp_path}/kept && mount -t tmpfs -o size={int(1.5 * size) // 1024}k none "
        f"{checkpoints} && cp -r {tmp_path}/kept/* {checkpoints}/ && {shlex.join(command)} && "
        f"ls {checkpoints} && cat {checkpoints}/*/manifest.json | wc -l"
    )
    completed = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=kit.ROOT, timeout=200
    )
    out = " ".join(completed.stdout.split())
    assert completed.returncode == 0, (completed.stdout, completed.stderr)
    assert out.count("checkpoint of step 4 was not written") == 1 and "No space left on device" in out
    assert "step-00000002" in out and "step-00000004 " not in out.split("see ")[-1]
    assert resume_kit.digest(tmp_path / "a" / "model" / "model.safetensors") == resume_kit.digest(
        copy / "model" / "model.safetensors"
    )


# ---------------------------------------------------------------- another number of processes, and exports


def convert(folder):
    assert kit.main("checkpoint", "convert", folder) == 0


def exported(folder, output, *more):
    assert kit.main("checkpoint", "export", folder, "--output", output, *more) == 0
    return digest(output / "model.safetensors")


@pytest.mark.numeric
@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero, precision", [(1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_processes_resumes_from_equal_weights(
    world, tmp_path, zero, precision, before, after
):
    size = {1: 6, 2: 3}
    # each rank draws its own dropout mask, so there is none
    common = {"engine.zero_stage": zero, "engine.precision": precision, "lora.dropout": 0.0}

    def command(folder, processes, **more):
        return words("reward", world, folder, **common, **{"train.batch_size": size[processes], **more})

    launch([command(tmp_path / "a", before)], before)
    copy = interrupted(tmp_path / "a", tmp_path / "b")
    refused = together(command(copy, after, resume="auto"), after)
    assert {code for code, _, _ in refused} == {2} and f"written by {before} processes" in refused[0][2], (
        refused
    )
    convert(manifest.folder_of(copy, 2))
    done = together(command(copy, after, resume="auto"), after, DUMP=str(tmp_path / "weights.safetensors"))
    assert {code for code, _, _ in done} == {0} and ".universal" in done[0][1].replace("\n", ""), done
    same_weights(manifest.folder_of(copy, 2), tmp_path / "weights.safetensors")
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    for x, y in zip(kit.losses(tmp_path / "a"), kit.losses(copy)):
        assert abs(x - y) <= tolerance * max(1.0, abs(x))
    assert len(kit.losses(copy)) == STEPS


def same_weights(checkpoint, dumped):
    """Asserts that the new processes began with the weights of the checkpoint, bit for bit."""
    from safetensors.torch import load_file

    from saferlhf_fast.commands.checkpoint.export import weights

    model_info = manifest.read(checkpoint)["models"]["model"]
    expected, loaded = weights(checkpoint, "model", model_info["zero_stage"]), load_file(dumped)
    assert set(loaded) <= set(expected) and len(loaded) > 3
    for name, value in loaded.items():
        assert (expected[name].to(value.dtype) == value).all(), name


@pytest.mark.numeric
@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero, precision", [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_an_export_equals_the_model_that_the_run_saved(world, tmp_path, zero, precision):
    """In two processes; the run saves its model at the step of its last checkpoint."""
    common = {"engine.zero_stage": zero, "engine.precision": precision}
    launch([words(stage, world, tmp_path / stage, **common) for stage in ("dpo", "cost", "ppo-lag")], 2)
    for stage in ("dpo", "cost", "ppo-lag"):
        out = tmp_path / f"{stage}-export"
        assert exported(tmp_path / stage, out) == digest(tmp_path / stage / "model" / "model.safetensors")
    from saferlhf_fast.models.score_model import load_score_model

    exported(tmp_path / "ppo-lag", tmp_path / "critic", "--model", "cost_critic")
    assert load_score_model(str(tmp_path / "critic")).score.weight.abs().sum() > 0


@pytest.mark.numeric
def test_a_run_with_adapters_exports_the_model_that_it_saved(world, tmp_path):
    output = tmp_path / "a"
    assert kit.main(*words("ppo-lag", world, output, **{"lora.rank": 2})) == 0
    assert exported(output, tmp_path / "b") == digest(output / "model" / "model.safetensors")
    assert kit.main("checkpoint", "export", output, "--output", tmp_path / "c", "--model", "cost_critic") == 2
    # the output exists already
    assert kit.main("checkpoint", "export", output, "--output", tmp_path / "b") == 2
    # checkpoints of ZeRO 0 need no conversion
    assert kit.main("checkpoint", "convert", output) == 2


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    try:
        paths, number = resume_kit.make_world(place / "world"), int(sys.argv[1]) if len(sys.argv) > 1 else 20
        results = {zero: trials(paths, place / f"zero{zero}", zero, number, print) for zero in (2, 3)}
        print(f"faults survived / tried: {sum(results.values())} / {number * len(results)}")
    finally:
        shutil.rmtree(place)
