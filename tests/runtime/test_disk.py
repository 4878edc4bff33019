"""A disk that takes no files: each library's error is recognised, files are whole or absent, lines wait."""

import contextlib
import errno
import json
import os
import resource
import threading
from types import SimpleNamespace
from unittest import mock

import kit
import pytest
import torch

from saferlhf_fast.errors import DiskError
from saferlhf_fast.models.folders import replacing
from saferlhf_fast.runtime import disk
from saferlhf_fast.runtime.folder_claims import PROBE
from saferlhf_fast.runtime.line_file import LineFile
from saferlhf_fast.runtime.metrics import Metrics, _quiet_writer_threads

LIMIT = 100_000


@contextlib.contextmanager
def small_files(limit=LIMIT):
    """No file of this process can grow beyond the limit, as `ulimit -f` has it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _png(path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    figure.figimage(torch.rand(400, 400).numpy())
    figure.savefig(path, format="png")


def _tokenizer(path):
    kit.make_tokenizer(extra=[f"word{i}" for i in range(8_000)]).save_pretrained(path.parent)


def _safetensors(path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(LIMIT)}, path)


def _pyarrow(path):
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as file:
        file.write(bytes(2 * LIMIT))


WRITERS = {
    "text": lambda path: path.write_text("x" * 2 * LIMIT),
    "torch.save": lambda path: torch.save(torch.zeros(LIMIT), path),
    "safetensors": _safetensors,
    "tokenizer": _tokenizer,
    "png": _png,
    "pyarrow": _pyarrow,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_the_system_refuses_is_a_disk_error_with_any_library(tmp_path, writer):
    path = tmp_path / "file"
    path.write_text("old")
    with (
        small_files(),
        pytest.raises(DiskError, match="file was not written: "),
        disk.whole_file(path) as new,
    ):
        WRITERS[writer](new)
    assert path.read_text() == "old" and not list(tmp_path.glob(".file*"))


def test_a_device_without_space_is_named_and_errors_of_programs_are_not(tmp_path):
    with pytest.raises(DiskError, match=r"full was not written: No space left on device \(.* free\)"):
        with disk.writing("/dev/full"):
            open("/dev/full", "w").write("x" * LIMIT)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        text = os.strerror(number)
        rust = Exception(f"Error while serializing: I/O error: {text} (os error {number})")
        wrapped = ValueError("cannot save")
        wrapped.__cause__ = rust
        for error in (OSError(number, text), rust, wrapped, RuntimeError(f"[errno {number}] {text}")):
            assert text in disk.cause(error, tmp_path), error
    others = [FileNotFoundError(2, "No such file"), Exception("No such file (os error 2)"), KeyError("28")]
    others += [RuntimeError("size mismatch"), PermissionError(13, "Permission denied"), MemoryError()]
    assert [disk.cause(error) for error in others] == [None] * len(others)
    with pytest.raises(RuntimeError, match="size mismatch"), disk.writing(tmp_path):
        raise others[3]


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    folder = tmp_path / "model"
    with replacing(folder) as new:
        (new / "config.json").write_text("{}")
    with small_files(), pytest.raises(DiskError, match="model was not written"), replacing(folder) as new:
        (new / "config.json").write_text("[]")
        WRITERS["safetensors"](new / "model.safetensors")
    assert kit.files(tmp_path) == {"model/config.json": b"{}"}
    # as a process leaves it that is killed between two renames
    os.rename(folder, tmp_path / f"{PROBE}model.old")
    with pytest.raises(DiskError), replacing(folder) as new:
        raise OSError(errno.EIO, "broken")
    assert kit.files(tmp_path) == {"model/config.json": b"{}"}


@pytest.mark.parametrize("is_there", [True, False])
def test_folders_beside_it_stay(tmp_path, is_there):
    """People keep another model in model.old."""
    names = ["model.old", "model.tmp", "model.bak", *(["model"] if is_there else [])]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    with replacing(tmp_path / "model") as new:
        (new / "config.json").write_text("{}")
    written = {"model/config.json": b"{}"}
    expected = {f"{name}/config.json": name.encode() for name in names if name != "model"}
    assert kit.files(tmp_path) == written | expected


def test_lines_wait_for_a_full_disk_and_none_is_halved(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", [json.dumps({"step": i, "text": "x" * 50}) for i in range(9)]
    file = LineFile(path)
    file.append(lines[0])
    with small_files(len(lines[0]) * 5 // 2):
        for line in lines[1:5]:
            file.append(line)
        assert file.error is not None and path.read_text().splitlines() == lines[:2]
        state = file.size, list(file.waiting)
    for line in lines[5:]:
        file.append(line)
    assert path.read_text().splitlines() == lines and file.error is None
    file.cut(*state)  # a run that is resumed from a checkpoint of that time
    assert path.read_text().splitlines() == lines[:5]


def test_metrics_and_tensorboard_do_not_end_a_run_on_a_full_disk(tmp_path, capsys):
    hook = mock.Mock()
    _quiet_writer_threads.cache_clear()
    with mock.patch.object(threading, "excepthook", hook):
        metrics = Metrics(tmp_path, SimpleNamespace(trackers=["tensorboard"], project="p"), {}, "sft")
        metrics.log(1, {"train/loss": 1.0})
        with small_files(1):
            for step in range(2, 30):
                metrics.log(step, {f"train/{i}": 1.0 for i in range(300)})
            state = metrics.state_dict()
        metrics.log(30, {"train/loss": 2.0})
        metrics.close()
    out, err = capsys.readouterr()
    assert out.count("warning: metrics.jsonl was not written: File too large") == 1
    assert out.count("warning: tensorboard was not written: File too large") == 1 and "Traceback" not in err
    _quiet_writer_threads.cache_clear()
    assert not hook.called
    assert kit.steps(tmp_path) == list(range(1, 31)) and len(state["waiting"]) == 28


@pytest.mark.parametrize(
    "interval, minutes, steps, most", [(2, None, 4, 2), (1, None, 9, 4), (None, 30, 1, 4)]
)
def test_too_little_space_is_said_with_both_numbers(tmp_path, capsys, interval, minutes, steps, most):
    from saferlhf_fast.config.sections import Checkpoint
    from saferlhf_fast.training import disk_space

    settings = Checkpoint(interval=interval, minutes=minutes)
    assert disk_space.checkpoints_at_once(settings, steps) == most
    module = torch.nn.Linear(1000, 1000, bias=False)
    model = SimpleNamespace(module=module, precision="bfloat16", zero_stage=2)
    kept = [disk_space.model_bytes(model)] * 2
    needed = 2 * 2e6 + most * 14e6
    for free, warned in ((needed - 1, True), (needed, False)):
        with mock.patch.object(disk, "free_bytes", return_value=free):
            disk_space.warn_if_scarce(tmp_path, settings, [model], kept, steps)
        out = capsys.readouterr().out
        assert (f"may need {needed / 1e6:.3g} MB" in out and f"{free / 1e6:.3g} MB are free" in out) is warned
