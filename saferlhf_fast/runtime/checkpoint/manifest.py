"""The list of what a checkpoint consists of, whose presence makes it one; verifying, finding the newest,
deleting old ones.

    <output>/checkpoints/step-00000012/manifest.json    step, stage, processes, settings, versions, every
    file's size and SHA-256
                                       actor/…          what DeepSpeed wrote of a trained model, one file or
                                       more for each rank state.json, state.safetensors    λ, positions,
                                       counters, kept weights (rank 0) rank-00000.json  generators of random
                                       numbers of each rank
                        step-00000012.universal/        the same for any number of processes (`checkpoint
                        convert`)

The manifest is written last, in one atomic rename, when every rank has said what it wrote; a folder without
one is no checkpoint. It carries a checksum of itself. These are checks against accidents: whoever can write
the folder can write a manifest too (SECURITY.md). Standard library only.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from ...errors import UserError

NAME = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d{8})(\.universal)?")
_BLOCK = 1 << 22


def root(output):
    """The folder of a run's checkpoints."""
    return Path(output).expanduser() / "checkpoints"


def folder_of(output, step):
    """The folder of a step's checkpoint."""
    return root(output) / f"step-{step:08d}"


def step_of(path):
    """(step, is universal) that a folder's name says; None for any other name."""
    named = _STEP.fullmatch(Path(path).name)
    return (int(named[1]), bool(named[2])) if named else None


def seal(values):
    """SHA-256 of a manifest's content, without the seal itself."""
    text = json.dumps({key: value for key, value in values.items() if key != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder, values):
    """Commits a checkpoint: its files are there and on the disk before its manifest is."""
    path = Path(folder) / NAME
    sync_folders(folder)
    values = {"format": FORMAT, **values}
    temporary = path.with_name(f".{NAME}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({**values, "seal": seal(values)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
    sync_folder(path.parent.parent)


def sync_folder(folder):
    """Puts a folder's entries on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folders(folder):
    """Puts the entries of a folder and of those in it on the disk."""
    for inner in [p for p in Path(folder).rglob("*") if p.is_dir()]:
        sync_folder(inner)
    sync_folder(folder)


def read(folder):
    """-> the manifest of a checkpoint. UserError when there is none, or it is damaged."""
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


def problem(folder, values, part=0, parts=1):
    """-> what is wrong with the files of a checkpoint, in one line; None when all is well.

    part, parts: looks at every parts-th file only, from the part-th on, so that ranks can share the work.
    """
    for name, said in sorted(values["files"].items())[part::parts]:
        try:
            why = _problem(Path(folder), name, said)
        except OSError as error:  # a disk that cannot read it back
            why = f"{Path(folder) / name} cannot be read: {error}"
        if why is not None:
            return why
    return None


def _problem(folder, name, said):
    if not is_inside(name):
        return f"{folder}: {name!r} is no file name inside the checkpoint"
    path = folder / name
    if any(p.is_symlink() for p in (path, *path.parents) if p != folder and folder in p.parents):
        return f"{path} is a symbolic link; expected a file"
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != said["bytes"]:
        return f"{path} has {size} bytes, expected {said['bytes']}"
    found = sha256(path)
    if found != said["sha256"]:
        return f"{path} is damaged: its SHA-256 is {found[:12]}…, expected {said['sha256'][:12]}…"
    return None


def is_inside(name):
    """True for a relative path that cannot lead out of its folder."""
    return (
        bool(name)
        and not name.startswith(("/", "~"))
        and "\\" not in name
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def sha256(path):
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def listed(output):
    """-> [(step, folder)] of a run's checkpoint folders, finished or not, the newest first; universal ones
    after their own.

    Links and other names are not looked at: a checkpoint lies in the run's own folder.
    """
    found = []
    if root(output).is_dir() and not root(output).is_symlink():
        for path in root(output).iterdir():
            named = step_of(path)
            if named and path.is_dir() and not path.is_symlink():
                found.append((named[0], not named[1], path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def is_committed(folder):
    """True when a checkpoint was finished (which does not say that it is whole)."""
    return (Path(folder) / NAME).is_file()


def discard(folder):
    """Deletes a checkpoint; at no moment does a part of it look like a whole one."""
    (Path(folder) / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def aside(path):
    """A name beside a folder that nothing has yet, for what is set aside: ….set-aside, ….set-aside-2, …"""
    path, number = Path(path), 1
    while True:
        place = path.with_name(f"{path.name}.set-aside" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(place):
            return place
        number += 1


def set_aside(output, step):
    """Renames what is newer than a step that a run goes on from: damaged, or of a way that is not taken.

    Unfinished ones go.
    """
    for newer, path in listed(output):
        if newer <= step:
            continue
        if not is_committed(path):
            discard(path)
            continue
        os.rename(path, aside(path))


def prune(output, keep, keep_best):
    """Deletes all but the newest `keep` checkpoints and, with keep_best, the one with the highest score.

    Unfinished ones that are older than the newest finished one go too.
    """
    finished = [(step, path) for step, path in listed(output) if is_committed(path)]
    steps = list(dict.fromkeys(step for step, _ in finished))
    kept = set(steps[:keep])
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
            kept.add(max(scores, key=lambda step: (scores[step], step)))
    for step, path in listed(output):
        if step not in kept and (is_committed(path) or (steps and step < steps[0])):
            discard(path)
