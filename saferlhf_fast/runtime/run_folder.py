"""The folder of a run: opened once its inputs are known to be good, finished with a summary, never lost by
accident.

    config.yaml    every setting, resolved, with `stage`        versions.json  packages, device, seed, git
    commit started.json   hashes of the settings and inputs            finished.json  the same, once the run
    has ended well summary.json   what the stage reports                       model/, metrics.jsonl, … are
    the stage's own checkpoints/   what the run can go on from                  resumed.jsonl  when it did,
    and with which versions

What becomes of an output that is not empty is decided in run_decision.py, by what run_state.py finds there.

Only rank 0 writes. An environment variable is never written.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import yaml

from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime.checkpoint import manifest
from saferlhf_fast.runtime.provenance import now, read_json, versions, write_json, write_text
from saferlhf_fast.runtime.run_decision import Action, asked_by, decide
from saferlhf_fast.runtime.run_state import RunState


def rank():
    """Returns the number of this process among those of the run; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def check_output(stage, cfg, key="output", restart=False):
    """Refuses an output folder that a stage may not use, or could not; leaves all as it is.

    Rank 0 decides for all.

    key: what a refusal calls the folder · restart: as in `open_run`. Returns Action.SKIP where resume=auto
    finds that the stage is finished, on every rank; else, on rank 0, the Action that `open_run` would take,
    None on others and without an output.
    """
    if cfg.output is None:
        return None
    state, asked = RunState(stage, cfg), asked_by(cfg, restart, skip=cfg.resume == "auto")
    # by every rank: all of them have to leave a finished run alone
    done = asked.skip and state.is_done
    if rank() != 0:
        return Action.SKIP if done else None
    return checked_action(state, asked, key)


def checked_action(state, asked, key="output"):
    """Returns the Action on an output folder, which is tried out for whether it can be had; UserError when it
    is refused.
    """
    try:
        action, sentence = decide(state, asked, key)
        if action is Action.REFUSE:
            raise UserError(sentence)
        if action in (Action.NEW, Action.RESUME):
            check_place(state.folder, key)
        elif action in (Action.REPLACE, Action.SET_ASIDE):
            check_place(state.folder.absolute().parent, key, state.folder)
    except (OSError, RuntimeError) as error:
        # a name that is too long, a folder above that may not be entered, a loop
        raise UserError(
            f"{key}: {state.folder} cannot be used: {getattr(error, 'strerror', None) or error}"
        ) from error
    return action


def check_place(folder, key, wanted=None):
    """Refuses a folder that cannot be made, or written into when it is there: tried out, since root is shown
    no permissions.

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
        raise UserError(
            f"{key}: {wanted} {what}: {place} takes no folder: {error.strerror or error}"
        ) from error


def with_output(stage, cfg):
    """Returns a config that has an output: runs/<stage>-<date and time> where none is given (demo)."""
    if cfg.output is not None:
        return cfg
    return dataclasses.replace(cfg, output=f"runs/{stage}-{time.strftime('%Y-%m-%d-%H%M%S')}")


def open_run(stage, cfg, restart=False):
    """Makes the folder of a run and returns its path; call it when models and data have been read without
    complaint.

    restart: an unfinished run of the same stage there may be started again without `overwrite`, as `run` does
    with its stages. run_decision.py says what becomes of what is there. A run that is replaced is first
    renamed, and deleted once the new one is written; one that is resumed is left as it is; where one is set
    aside, a line says where. UserError when it is refused.
    """
    cfg = with_output(stage, cfg)
    state = RunState(stage, cfg)
    if rank() != 0:
        return state.folder
    action = checked_action(state, asked_by(cfg, restart))
    if action is Action.RESUME:
        with open(state.folder / "resumed.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now(), **versions(cfg)}) + "\n")
        if not state.started:  # damaged: the settings are known to be the same
            _write_started(state, None)
        return state.folder
    old = aside = None
    try:
        if action is Action.SET_ASIDE:
            aside = _set_aside(state.folder)
        elif action is Action.REPLACE:
            what = "finished" if state.ending == "whole" else "unfinished" if state.has_saved else None
            old = _move_away(state.folder)
            if what is not None:
                print(f"{state.folder}: the {what} run there is replaced", flush=True)
        state.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # between the check and now: no more room, another's folder
        raise UserError(f"output: {state.folder} cannot be created: {error.strerror or error}") from error
    _write_start(state, aside)
    if old:
        shutil.rmtree(old)
    return state.folder


def _write_start(state, aside):
    """Writes what is known of a run when it starts. aside: where the run before it was set aside; None."""
    settings = yaml.safe_dump({"stage": state.stage, **state.settings}, sort_keys=False, allow_unicode=True)
    write_text(state.folder / "config.yaml", settings)
    write_json(state.folder / "versions.json", versions(state.cfg))
    _write_started(state, aside)


def _write_started(state, aside):
    """Writes what `finish_run` and later runs tell this run by."""
    write_json(
        state.folder / "started.json",
        {
            "stage": state.stage,
            "recipe": state.recipe,
            "inputs": state.input_hashes,
            "started": now(),
            **({"set_aside": str(aside)} if aside else {}),
        },
    )


def _move_away(folder):
    """Renames a run that is to be deleted -> the new folder around it."""
    around = Path(tempfile.mkdtemp(prefix=f".{folder.name}-replaced-", dir=folder.absolute().parent))
    os.rename(folder, around / folder.name)
    return around


def _set_aside(folder):
    """Renames an unfinished run, over nothing, and says so -> its new place."""
    place = manifest.aside(folder)
    os.rename(folder, place)
    print(
        f"{folder}: the unfinished run there was set aside, with all that it had saved: {place}", flush=True
    )
    return place


def finish_run(folder, summary):
    """Marks a run as ended well: summary.json, then finished.json with the hashes that open_run took."""
    if rank() != 0:
        return
    folder = Path(folder)
    write_json(folder / "summary.json", summary)
    write_json(folder / "finished.json", {**read_json(folder / "started.json"), "finished": now()})


def read_summary(folder):
    """Returns the summary of a finished run; an empty one where it cannot be read any more."""
    return read_json(Path(folder).expanduser() / "summary.json")
