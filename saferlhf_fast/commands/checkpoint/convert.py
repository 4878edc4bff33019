"""Converts a checkpoint for any number of processes.

The result has DeepSpeed's universal format: one file for each weight and for each moment of the optimiser.
`step-00000012` is converted into `step-00000012.universal` beside it. The source is verified first, and the
result is committed like any other checkpoint. This needs no GPU and none of the run's processes. ZeRO 0 needs
no conversion, since each of its processes has everything.
"""

import argparse
import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...runtime import console, disk, run_folder, run_lock
from ...runtime.checkpoint import manifest, safe_pickle
from ...runtime.folder_claims import PREFIX, PROBE, is_bookkeeping
from .verify import whole


@run_lock.session()
def convert(folder: str | Path, output: str | Path | None = None) -> Path:
    """Converts the checkpoint of a step.

    Args:
        folder: The checkpoint's folder.
        output: Where to write; None: beside `folder`, where resume=auto finds it.

    Returns:
        The folder of the converted checkpoint.

    Raises:
        UserError: The checkpoint is damaged or needs no conversion, `output` is not empty, or another process
            writes to the run's folder.
        DiskError: The result could not be written; nothing is left of it.
    """
    folder = Path(folder).resolve()
    values = whole(folder)
    if values["universal"]:
        raise UserError(f"{folder} is for any number of processes already")
    if not any(kind["zero_stage"] for kind in values["models"].values()):
        raise UserError(
            f"{folder} is of ZeRO 0, where each process has everything: any number of processes can resume "
            f"from it"
        )
    beside = folder.with_name(f"{folder.name}.universal")
    output = Path(output).expanduser().resolve() if output else beside
    run_folder.hold_output(output, "checkpoint convert")
    if output == beside and output.is_dir() and not manifest.is_committed(output):
        shutil.rmtree(output)  # left by a conversion of an older version that was interrupted
    if output.exists() and (not output.is_dir() or any(not is_bookkeeping(p.name) for p in output.iterdir())):
        raise UserError(f"--output: {output} is not empty; expected a new folder")
    mounted = output.is_dir() and not os.access(output.parent, os.W_OK)  # a folder that cannot be replaced
    if output.is_dir():
        run_lock.refuse_if_in_use(output, "checkpoint convert", None)
    new = output / f"{PROBE}.tmp" if mounted else output.with_name(f"{PROBE}{output.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with disk.writing(output):
            new.mkdir(parents=True)
            _write(folder, new, values)
            if mounted:
                for path in sorted(new.iterdir(), key=lambda path: path.name == manifest.NAME):
                    path.replace(output / path.name)  # the manifest last: it says that the rest is complete
                new.rmdir()
            else:
                for claim in output.glob(f"{PREFIX}.*") if output.is_dir() else ():  # of dead processes
                    claim.unlink()
                new.replace(output)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return output


def _write(folder: Path, output: Path, values: Mapping[str, Any]) -> None:
    """Writes the converted checkpoint into an empty folder and commits it.

    Args:
        folder: The checkpoint's folder.
        output: The empty folder.
        values: The checkpoint's manifest.
    """
    for name, kind in values["models"].items():
        _model(folder / name, output / name, kind["zero_stage"])
        if (folder / name / "hf").is_dir():
            shutil.copytree(folder / name / "hf", output / name / "hf")
    for path in [p for p in folder.iterdir() if p.is_file() and p.name != manifest.NAME]:
        shutil.copy2(path, output)
    (output / "latest_universal").unlink(missing_ok=True)
    files = {}
    for path in sorted(p for p in output.rglob("*") if p.is_file() and not is_bookkeeping(p.name)):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(output).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": manifest.sha256(path),
        }
    unchanged = {key: value for key, value in values.items() if key not in ("seal", "format")}
    manifest.write(output, {**unchanged, "universal": True, "files": files})


def _model(source: Path, target: Path, zero_stage: int) -> None:
    """Converts one trained model's shards into a file for each weight."""
    from ...runtime.deepspeed_library import imported_deepspeed

    imported_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    # With one worker each, extraction and merging run in this process, where every load is guarded.
    settings = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=zero_stage < 3,
    )
    with quiet(), safe_pickle.guarded():
        ds_to_universal.main(settings)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without the prints and bars of DeepSpeed's scripts."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def say(folder: Path) -> None:
    """Prints where the converted checkpoint is, and how to resume from it."""
    values = json.loads((folder / manifest.NAME).read_text(encoding="utf-8"))
    console.say(
        f"{folder}: step {values['step']} for any number of processes; resume=auto of the same run takes it "
        f"when the number is not {values['world_size']}, with the same batch over all processes"
    )
