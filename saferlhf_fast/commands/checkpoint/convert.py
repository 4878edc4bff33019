"""A checkpoint for any number of processes: DeepSpeed's universal format, one file for each weight and moment
of the optimiser.

`step-00000012` becomes `step-00000012.universal` beside it, verified before and committed after like any
other. Needs no GPU and none of the run's processes; ZeRO 0 needs no conversion, since each of its processes
has everything.
"""

import argparse
import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path

from ...errors import UserError
from ...runtime import console
from ...runtime.checkpoint import manifest, safe_pickle
from .verify import whole


def convert(folder, output=None):
    """-> the folder of the converted checkpoint. folder: of a step · output: another folder than the one
    beside it.
    """
    folder = Path(folder).resolve()
    values = whole(folder)
    if values["universal"]:
        raise UserError(f"{folder} is for any number of processes already")
    if not any(kind["zero_stage"] for kind in values["models"].values()):
        raise UserError(
            f"{folder} is of ZeRO 0, where each process has everything: any number of processes can go on "
            f"from it"
        )
    beside = folder.with_name(f"{folder.name}.universal")
    output = Path(output).expanduser().resolve() if output else beside
    if output == beside and output.is_dir() and not manifest.is_committed(output):
        shutil.rmtree(output)  # what a conversion left that was cut off
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} is not empty; expected a new folder")
    output.mkdir(parents=True, exist_ok=True)
    for name, kind in values["models"].items():
        _model(folder / name, output / name, kind["zero_stage"])
        if (folder / name / "hf").is_dir():
            shutil.copytree(folder / name / "hf", output / name / "hf")
    for path in [p for p in folder.iterdir() if p.is_file() and p.name != manifest.NAME]:
        shutil.copy2(path, output)
    (output / "latest_universal").unlink(missing_ok=True)
    files = {}
    for path in sorted(p for p in output.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(output).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": manifest.sha256(path),
        }
    kept = {key: value for key, value in values.items() if key not in ("seal", "format")}
    manifest.write(output, {**kept, "universal": True, "files": files})
    return output


def _model(source, target, zero_stage):
    """One trained model's shards -> a file for each weight."""
    from ...runtime.deepspeed_library import imported_deepspeed

    imported_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    # One worker each: they then run in this process, where every load is guarded.
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
def quiet():
    """Without the prints and bars of DeepSpeed's scripts."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def say(folder):
    """Tells where the converted checkpoint lies, and how to go on from it."""
    values = json.loads((folder / manifest.NAME).read_text(encoding="utf-8"))
    console.say(
        f"{folder}: step {values['step']} for any number of processes; resume=auto of the same run takes it "
        f"when the "
        f"number is not {values['world_size']}, with the same batch over all processes"
    )
