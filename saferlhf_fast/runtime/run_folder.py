"""The folder of a run: opened once its inputs are known to be good, finished with a summary, never lost by accident.

    config.yaml    every setting, resolved, with `stage`        versions.json  packages, device, seed, git commit
    started.json   hashes of the settings and inputs            finished.json  the same, once the run has ended well
    summary.json   what the stage reports                       model/, metrics.jsonl, … are the stage's own
    checkpoints/   what the run can go on from                  resumed.jsonl  when it did, and with which versions

An unfinished run that is started again is renamed (<output>.set-aside) when it has saved a model or its settings were others.

Only rank 0 writes. An environment variable is never written.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import yaml

from saferlhf_fast.config import fingerprint, inputs
from saferlhf_fast.config.load import to_dict
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime.checkpoint import compatibility, manifest
from saferlhf_fast.runtime.provenance import now, process_count, read_json, versions, write_json, write_text

SAVED = ("model", "best", "step-*", "checkpoints/*/" + manifest.NAME)
"""What a run folder holds that hours went into: models, and checkpoints that were finished."""


def rank():
    """Returns the number of this process among those of the run; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_ours(folder):
    """Tells whether a folder is a run folder of this package: the only kind that is ever deleted."""
    folder = Path(folder).expanduser()
    try:
        return (folder / "config.yaml").is_file() and (folder / "versions.json").is_file()
    except OSError:                                      # check_output and check_place say what is wrong with it
        return False


def check_output(cfg, key="output"):
    """Refuses an output folder that a run may not use, or could not; leaves all as it is. Rank 0 decides for all."""
    if cfg.output is None or rank() != 0:
        return
    if not cfg.output.strip():
        raise UserError(f"{key}: expected a folder, got an empty text")
    folder = Path(cfg.output).expanduser()
    try:
        _check_output(cfg, folder, key)
    except OSError as error:                             # a name that is too long, a folder above that may not be entered
        raise UserError(f"{key}: {folder} cannot be used: {error.strerror or error}") from error


def _check_output(cfg, folder, key):
    if getattr(cfg, "resume", None) not in (None, "auto"):
        try:
            manifest.read(Path(cfg.resume).expanduser())
        except UserError as error:
            raise UserError(f"resume: expected auto or the folder of a checkpoint, got {cfg.resume}: {error}") from error
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{key}: {folder} is a file; expected a folder")
    real = folder.resolve()
    for name, value, _ in inputs.listed(cfg):
        path = Path(value).expanduser()
        if path.exists() and (path.resolve() == real or real in path.resolve().parents):
            raise UserError(f"{key}: {folder} holds this run's own input {name}={value}; choose another folder")
    if not folder.exists() or not any(folder.iterdir()):
        check_place(folder, key)
    elif goes_on(cfg):
        compatibility.refuse(folder, changed(cfg))
        check_place(folder, key)
    else:
        _check_replaced(cfg, folder, key)


def _check_replaced(cfg, folder, key):
    """Refuses to put a run in the place of what is in a folder."""
    if not starts_again(cfg):
        if not cfg.overwrite:
            raise UserError(f"{key}: {folder} {_holds(folder)}; choose another folder, or overwrite=true")
        if not is_ours(folder):
            raise UserError(f"{key}: {folder} is not empty and no run folder of ours: overwrite=true does not "
                            "delete it; delete it yourself or choose another folder")
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents):        # it is renamed: relative paths would lead into the old one
        raise UserError(f"{key}: {folder} holds the folder that this command was started in; start it elsewhere")
    check_place(folder.absolute().parent, key, folder)


def check_place(folder, key, wanted=None):
    """Refuses a folder that cannot be made, or written into when it is there: tried out, since root is shown no permissions.

    wanted: what to name in the message, when it is another folder.
    """
    wanted, place = wanted or folder, folder.absolute()
    what = "cannot be created"
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        what = "cannot be written into" if place == wanted.absolute() else what
        if not place.is_dir():
            raise UserError(f"{key}: {wanted} {what}: {place} is a file; expected a folder")
        os.rmdir(tempfile.mkdtemp(prefix=".saferlhf-fast-", dir=place))
    except OSError as error:
        raise UserError(f"{key}: {wanted} {what}: {place} takes no folder: {error.strerror or error}") from error


def goes_on(cfg):
    """Tells whether a run with `resume` finds a checkpoint of its own to go on from in its output folder."""
    resume = getattr(cfg, "resume", None)
    if resume is None or not is_ours(cfg.output) or (Path(cfg.output).expanduser() / "finished.json").exists():
        return False
    if resume == "auto":
        return any(manifest.is_committed(path) for _, path in manifest.listed(cfg.output))
    return manifest.root(cfg.output).resolve() in Path(resume).expanduser().resolve().parents


def changed(cfg):
    """Returns what settings of an unfinished run are other ones now, in ways that change its result."""
    folder = Path(cfg.output).expanduser()
    before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    worlds = json.loads((folder / "versions.json").read_text(encoding="utf-8"))["processes"], process_count()
    return compatibility.differences(before, to_dict(cfg), *worlds, [name for name, _, _ in inputs.listed(cfg)])


def starts_again(cfg):
    """Tells whether an unfinished run lies there that this one takes the place of without `overwrite`: with resume=auto one of
    the same settings that has no checkpoint yet, within `restarting` any. See `open_run` for what becomes of it."""
    if not is_ours(cfg.output) or goes_on(cfg) or _finished(cfg.output):
        return False
    return cfg.output == _restarting or getattr(cfg, "resume", None) == "auto" and _same_start(None, cfg)


_restarting = None


@contextlib.contextmanager
def restarting(output):
    """Within it an unfinished run in the folder `output` may be replaced or set aside; None: none may."""
    global _restarting
    before, _restarting = _restarting, output
    try:
        yield
    finally:
        _restarting = before


def _same_start(stage, cfg):
    """Tells whether what lies in the output was started with these very settings. stage: None for any."""
    started = read_json(Path(cfg.output).expanduser() / "started.json")
    return stage in (None, started.get("stage")) and started.get("recipe") == fingerprint.recipe_hash(started.get("stage"), cfg)


def with_output(stage, cfg):
    """Returns a config that has an output: runs/<stage>-<date and time> where none is given (demo)."""
    if cfg.output is not None:
        return cfg
    return dataclasses.replace(cfg, output=f"runs/{stage}-{time.strftime('%Y-%m-%d-%H%M%S')}")


def _holds(folder):
    if not is_ours(folder):
        return "is not empty"
    ended = "a finished" if (folder / "finished.json").exists() else "an unfinished"
    return f"holds {ended} run"


def open_run(stage, cfg):
    """Makes the folder of a run and returns its path; call it when models and data have been read without complaint.

    With `overwrite` an existing run folder is replaced: it is first renamed, and deleted once the new one is written. With
    `resume` and a checkpoint to go on from it is left as it is. An unfinished run that is started again (see `starts_again`) is
    replaced when its settings were the same and it has saved nothing; else it is set aside, and a line says where.
    """
    cfg = with_output(stage, cfg)
    folder = Path(cfg.output).expanduser()
    if rank() != 0:
        return folder
    check_output(cfg)
    if goes_on(cfg):
        with open(folder / "resumed.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now(), **versions(cfg)}) + "\n")
        return folder
    old = aside = None
    try:
        if folder.exists() and any(folder.iterdir()):
            if _is_kept(stage, cfg):
                aside = _set_aside(folder)
            else:
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-replaced-", dir=folder.absolute().parent)) / folder.name
                os.rename(folder, old)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:                             # between the check and now: no more room, another's folder
        raise UserError(f"output: {folder} cannot be created: {error.strerror or error}") from error
    settings = yaml.safe_dump({"stage": stage, **to_dict(cfg)}, sort_keys=False, allow_unicode=True)
    write_text(folder / "config.yaml", settings)
    write_json(folder / "versions.json", versions(cfg))
    write_json(folder / "started.json", {"stage": stage, "recipe": fingerprint.recipe_hash(stage, cfg),
                                         "inputs": fingerprint.hashes(cfg), "started": now(),
                                         **({"set_aside": str(aside)} if aside else {})})
    if old:
        shutil.rmtree(old.parent)
    return folder


def _is_kept(stage, cfg):
    """Tells whether what lies in the output is worth more than its place."""
    if not starts_again(cfg):
        return False                                     # overwrite=true, and nothing was asked to go on
    if not _same_start(stage, cfg):
        return not cfg.overwrite
    folder = Path(cfg.output).expanduser()
    return any(next(folder.glob(name), None) for name in SAVED)


def _set_aside(folder):
    """Renames an unfinished run, over nothing, and says so -> its new place."""
    place = manifest.aside(folder)
    os.rename(folder, place)
    print(f"{folder}: the unfinished run there was set aside, with all that it had saved: {place}", flush=True)
    return place


def finish_run(folder, summary):
    """Marks a run as ended well: summary.json, then finished.json with the hashes that open_run took."""
    if rank() != 0:
        return
    folder = Path(folder)
    write_json(folder / "summary.json", summary)
    started = json.loads((folder / "started.json").read_text(encoding="utf-8"))
    write_json(folder / "finished.json", {**started, "finished": now()})


def is_finished(folder, stage, cfg):
    """Tells whether a folder holds the finished run of these very settings and of inputs with this very content."""
    return same_settings(folder, stage, cfg) and _finished(folder)["inputs"] == fingerprint.hashes(cfg)


def same_settings(folder, stage, cfg):
    """Tells whether a folder holds the finished run of these very settings, whatever its inputs held."""
    done = _finished(folder)
    return done.get("stage") == stage and done.get("recipe") == fingerprint.recipe_hash(stage, cfg)


def _finished(folder):
    """Returns finished.json; an empty mapping when there is none that can be read."""
    return read_json(Path(folder).expanduser() / "finished.json")


def read_summary(folder):
    """Returns the summary of a finished run."""
    return json.loads((Path(folder).expanduser() / "summary.json").read_text(encoding="utf-8"))
