"""The manifest: the list of a checkpoint's files, whose presence makes a folder a checkpoint.

Here are also verifying a checkpoint, finding the newest, and deleting old ones.

    <output>/checkpoints/
        step-00000012/
            manifest.json        step, stage, processes, settings, versions; size and SHA-256 of every file
            actor/…              what DeepSpeed wrote of a trained model, one file or more for each rank
            state.json, state.safetensors
                                 λ, positions, counters, kept weights (rank 0)
            rank-00000.json      random number generators of each rank
        step-00000012.universal/ the same for any number of processes (`checkpoint convert`)

The manifest is written last, in one atomic rename, when every rank has reported what it wrote; a folder
without one is no checkpoint. It carries a checksum of itself. These checks protect against accidents: whoever
can write into the folder can write a manifest too (SECURITY.md). Standard library only.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from .. import disk

NAME = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d{8})(\.universal)?")
_BLOCK = 1 << 22


def root(output: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(output).expanduser() / "checkpoints"


def folder_of(output: str | Path, step: int) -> Path:
    """The folder of a step's checkpoint.

    Args:
        output: Folder of the run.
        step: The step after which the checkpoint is written.
    """
    return root(output) / f"step-{step:08d}"


def step_of(path: str | Path) -> tuple[int, bool] | None:
    """Reads a checkpoint folder's name.

    Returns:
        The step, and whether the checkpoint is universal; None for any other name.
    """
    named = _STEP.fullmatch(Path(path).name)
    return (int(named[1]), bool(named[2])) if named else None


def seal(values: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, without the entry `seal` itself."""
    text = json.dumps({key: value for key, value in values.items() if key != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder: str | Path, values: Mapping[str, Any]) -> None:
    """Commits a checkpoint: its files are flushed to the disk before its manifest is written.

    Args:
        folder: The checkpoint's folder, with its files.
        values: The manifest, without `format` and `seal`.
    """
    path = Path(folder) / NAME
    sync_folders(folder)
    values = {"format": FORMAT, **values}
    temporary = path.with_name(f".{NAME}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({**values, "seal": seal(values)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    disk.sync(path.parent)
    disk.sync(path.parent.parent)


def sync_folders(folder: str | Path) -> None:
    """Flushes the entries of a folder and of all folders in it to the disk."""
    for inner in [p for p in Path(folder).rglob("*") if p.is_dir()]:
        disk.sync(inner)
    disk.sync(folder)


def read(folder: str | Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint; its files are not looked at.

    Raises:
        UserError: There is no manifest, or it is damaged, or of another format.
    """
    path = Path(folder) / NAME
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{folder} has no {NAME}: it was not finished when it was written") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("files"), dict):
            raise ValueError("expected an object with files")
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if values.get("seal") != seal(values):
        raise UserError(
            f"{path} is damaged: its checksum is {seal(values)[:12]}…, expected "
            f"{str(values.get('seal'))[:12]}…"
        )
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: expected format {FORMAT}, got {values.get('format')}, of another version")
    return values


def problem(folder: str | Path, values: Mapping[str, Any], part: int = 0, parts: int = 1) -> str | None:
    """Compares the files of a checkpoint with its manifest.

    Args:
        folder: The checkpoint's folder.
        values: Its manifest.
        part: Index of the first file to check.
        parts: Check every parts-th file only, so that ranks can share the work.

    Returns:
        What is wrong with the first bad file, in one line; None when all files are good.
    """
    for name, entry in sorted(values["files"].items())[part::parts]:
        try:
            why = _problem(Path(folder), name, entry)
        except OSError as error:  # the disk cannot read the file back
            why = f"{Path(folder) / name} cannot be read: {error}"
        if why is not None:
            return why
    return None


def _problem(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with one file; None when it is good. entry: its line in the manifest."""
    if not is_inside(name):
        return f"{folder}: {name!r} is no file name inside the checkpoint"
    path = folder / name
    if any(p.is_symlink() for p in (path, *path.parents) if p != folder and folder in p.parents):
        return f"{path} is a symbolic link; expected a file"
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path} has {size} bytes, expected {entry['bytes']}"
    digest = sha256(path)
    if digest != entry["sha256"]:
        return f"{path} is damaged: its SHA-256 is {digest[:12]}…, expected {entry['sha256'][:12]}…"
    return None


def is_inside(name: str) -> bool:
    """Whether a relative path stays inside its folder."""
    return (
        bool(name)
        and not name.startswith(("/", "~"))
        and "\\" not in name
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def listed(output: str | Path) -> list[tuple[int, Path]]:
    """Lists a run's checkpoint folders, finished or not.

    Links and other names are left out: a checkpoint is a folder inside the run's own.

    Returns:
        Step and folder, the newest first; a universal one comes after the one that it was converted from.
    """
    folders = []
    if root(output).is_dir() and not root(output).is_symlink():
        for path in root(output).iterdir():
            named = step_of(path)
            if named and path.is_dir() and not path.is_symlink():
                folders.append((named[0], not named[1], path))
    return [(step, path) for step, _, path in sorted(folders, reverse=True)]


def is_committed(folder: str | Path) -> bool:
    """Whether a checkpoint was finished. Its files may have been damaged since."""
    return (Path(folder) / NAME).is_file()


def newest_committed(output: str | Path) -> tuple[int, Path] | None:
    """Step and folder of a run's newest finished checkpoint; None without one."""
    return next(((step, path) for step, path in listed(output) if is_committed(path)), None)


def discard(folder: str | Path) -> None:
    """Deletes a checkpoint, the manifest first: a half-deleted one never looks complete."""
    (Path(folder) / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def aside(path: str | Path) -> Path:
    """A free name for a folder that is to be set aside: <name>.set-aside, <name>.set-aside-2 and so on."""
    path, number = Path(path), 1
    while True:
        place = path.with_name(f"{path.name}.set-aside" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(place):
            return place
        number += 1


def set_aside(output: str | Path, step: int) -> None:
    """Renames the checkpoints that are newer than the one that a run resumes from.

    They are damaged, or belong to steps that the run will now make again. Unfinished ones are deleted.

    Args:
        output: Folder of the run.
        step: Step of the checkpoint that the run resumes from.
    """
    for newer, path in listed(output):
        if newer <= step:
            continue
        if not is_committed(path):
            discard(path)
            continue
        os.rename(path, aside(path))


def prune(output: str | Path, keep: int, keep_best: bool) -> None:
    """Deletes old checkpoints, and unfinished ones that are older than the newest finished one.

    Args:
        output: Folder of the run.
        keep: How many of the newest to keep.
        keep_best: Keep the one with the highest score too.
    """
    finished = [(step, path) for step, path in listed(output) if is_committed(path)]
    steps = list(dict.fromkeys(step for step, _ in finished))
    steps_to_keep = set(steps[:keep])
    if keep_best:
        scores = {}
        for step, path in finished:
            try:
                score = read(path).get("score")
            except UserError:
                continue
            if score is not None:
                scores[step] = tuple(score)
        if scores:
            steps_to_keep.add(max(scores, key=lambda step: (scores[step], step)))
    for step, path in listed(output):
        if step not in steps_to_keep and (is_committed(path) or (steps and step < steps[0])):
            discard(path)
