"""The folder of a run: opened once its inputs are known to be good, finished with a summary, never lost.

    config.yaml      every setting, resolved, with `stage`
    versions.json    packages, device, seed, git commit
    started.json     hashes of the settings and inputs
    finished.json    the same, once the run has ended well
    summary.json     what the stage reports
    model/, metrics.jsonl, …
                     the stage's own files
    checkpoints/     what the run can resume from
    resumed.jsonl    when it was resumed, and with which versions
    in_use.<n>.json  which process writes into the folder, while it does (run_lock.py)

run_decision.py decides what happens to an output that is not empty, by the facts that run_state.py collects.

Only rank 0 writes. An environment variable is never written.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import disk, run_lock
from saferlhf_fast.runtime.checkpoint import manifest
from saferlhf_fast.runtime.folder_claims import PREFIX, PROBE
from saferlhf_fast.runtime.provenance import now, read_json, versions, write_json, write_text
from saferlhf_fast.runtime.run_decision import Action, Request, decide, request_of
from saferlhf_fast.runtime.run_state import RunState, is_ours

if TYPE_CHECKING:
    from saferlhf_fast.runtime.run_state import OutputConfig

    AnyOutputConfig = TypeVar("AnyOutputConfig", bound=OutputConfig)


def rank() -> int:
    """Index of this process among those of the run; 0 without a launcher. torch is not imported."""
    return int(os.environ.get("RANK", "0"))


def check_output(
    stage: str, cfg: "OutputConfig", key: str = "output", restart: bool = False
) -> Action | None:
    """Checks that a stage may use its output folder, and can; changes nothing. Rank 0 decides for all.

    Args:
        stage: Name of the stage.
        cfg: Its config.
        key: Name of the output in a refusal.
        restart: As in `open_run`.

    Returns:
        Action.SKIP, on every rank, where resume=auto finds the stage finished. Else, on rank 0, the Action
        that `open_run` would take; None on other ranks and without an output.

    Raises:
        UserError: The folder may not be used, or cannot be.
    """
    if cfg.output is None:
        return None
    state, requested = RunState(stage, cfg), request_of(cfg, restart, skip=cfg.resume == "auto")
    # every rank works this out: all of them have to skip a finished run
    done = requested.skip and state.is_done
    if rank() != 0:
        return Action.SKIP if done else None
    return checked_action(state, requested, key)


def checked_action(
    state: RunState, requested: Request, key: str = "output", patience: float | None = 0.0
) -> Action:
    """Decides what happens to an output folder, and tries whether the folder can be written.

    Args:
        state: What the folder holds.
        requested: What the stage's settings request.
        key: Name of the output in a refusal.
        patience: Seconds to watch whether a process of another machine writes to the folder, beyond those of
            a check before a run; None for as long as it takes.

    Raises:
        UserError: The decision is to refuse, another process writes to the folder, or it cannot be written.
    """
    try:
        action, sentence = decide(state, requested, key)
        _refuse_other_writers(state.folder, action, key, patience)
        if action is Action.REFUSE:
            raise UserError(sentence)
        if action in (Action.NEW, Action.RESUME):
            check_place(state.folder, key)
        elif action in (Action.REPLACE, Action.SET_ASIDE):
            check_place(state.folder.absolute().parent, key, state.folder)
    except (OSError, RuntimeError) as error:
        # a name that is too long, a folder above it that may not be entered, a loop of links
        raise UserError(
            f"{key}: {state.folder} cannot be used: {getattr(error, 'strerror', None) or error}"
        ) from error
    return action


def _refuse_other_writers(folder: Path, action: Action, key: str, patience: float | None) -> None:
    """Raises where another process writes to a folder that an action would change."""
    if action is Action.SKIP or not folder.is_dir():
        return
    patience = None if patience is None else patience + run_lock.quick_patience()
    run_lock.refuse_if_in_use(folder, key, patience)
    if action not in (Action.NEW, Action.REFUSE):
        run_lock.refuse_around(folder, key, patience, action in (Action.REPLACE, Action.SET_ASIDE))


def check_place(folder: Path, key: str, wanted: Path | None = None) -> None:
    """Checks that a folder can be created, or written into if it exists.

    It creates and removes a folder there, since permissions do not say what root can do.

    Args:
        folder: The folder to check.
        key: Name of the setting in a refusal.
        wanted: The folder that a refusal names, if it is another one.

    Raises:
        UserError: The folder cannot be created or written into.
    """
    wanted, place = wanted or folder, folder.absolute()
    what = "cannot be created"
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        what = "cannot be written into" if place == wanted.absolute() else what
        if not place.is_dir():
            raise UserError(f"{key}: {wanted} {what}: {place} is a file; expected a folder")
        os.rmdir(tempfile.mkdtemp(prefix=PROBE, dir=place))
    except OSError as error:
        raise UserError(
            f"{key}: {wanted} {what}: {place} takes no folder: {error.strerror or error}"
        ) from error


def with_output(stage: str, cfg: "AnyOutputConfig") -> "AnyOutputConfig":
    """Returns a config that has an output: runs/<stage>-<date and time> where none is given (demo).

    Args:
        stage: Name of the stage.
        cfg: Its config, which is not changed.
    """
    if cfg.output is not None:
        return cfg
    return dataclasses.replace(cfg, output=f"runs/{stage}-{time.strftime('%Y-%m-%d-%H%M%S')}")


def open_run(stage: str, cfg: "OutputConfig", restart: bool = False) -> Path:
    """Creates the folder of a run; to be called when models and data have been read without an error.

    run_decision.py decides what happens to the folder's content. A run that is replaced is first renamed, and
    deleted once the new one is written. A run that is resumed stays as it is. Where a run is set aside, a
    line on the terminal says where it is.

    Args:
        stage: Name of the stage.
        cfg: Its config.
        restart: An unfinished run of the same stage may be started again without `overwrite`, as `run` does
            with its stages.

    Returns:
        The folder's path, on every rank.

    Raises:
        UserError: The folder may not be used, or cannot be.
    """
    cfg = with_output(stage, cfg)
    state = RunState(stage, cfg)
    if rank() != 0:
        return state.folder
    checked_action(state, request_of(cfg, restart))
    held = run_lock.is_held(state.folder)
    run_lock.hold(state.folder)
    try:
        # Only now nobody else changes what the folder holds. The state before may be that of minutes ago.
        state = state.anew()
        return _opened(state, checked_action(state, request_of(cfg, restart), patience=None))
    except BaseException:
        if not held:
            run_lock.release(state.folder)
        raise


def _opened(state: RunState, action: Action) -> Path:
    """Carries out an action on a folder that this process holds; returns the folder."""
    if action is Action.RESUME:
        path = state.folder / "resumed.jsonl"
        with disk.writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now(), **versions(state.cfg)}) + "\n")
        if not state.started:  # the file is damaged; the settings are known to be the same
            _write_started(state, None)
        return state.folder
    old: Path | None = None
    aside: Path | None = None
    try:
        if action is Action.SET_ASIDE:
            aside = _set_aside(state.folder)
        elif action is Action.REPLACE:
            kind = "finished" if state.ending == "finished" else "unfinished" if state.has_saved else None
            old = _move_away(state.folder)
            if kind is not None:
                print(f"{state.folder}: the {kind} run there is replaced", flush=True)
    except OSError as error:
        # since the check the disk has filled up
        _move_back(old, state.folder)
        raise UserError(f"output: {state.folder} cannot be moved: {error.strerror or error}") from error
    try:
        run_lock.hold(state.folder)  # anew, where its folder was moved
    except UserError as error:  # somebody else was faster, or the disk is full
        _move_back(old, state.folder)
        left = aside or (old if old and old.exists() else None)
        before = f"; the run that was there is in {left}" if left else ""
        raise UserError(f"{error}{before}") from error
    try:
        _write_start(state, aside)
    except BaseException:
        # half of these files would be a run that can neither be resumed nor started again
        for name in ("config.yaml", "versions.json", "started.json"):
            (state.folder / name).unlink(missing_ok=True)
        run_lock.release(state.folder)
        _move_back(old, state.folder)
        raise
    if old:
        _delete(old)
    return state.folder


def _delete(old: Path) -> None:
    """Deletes a run that was replaced; what cannot be deleted is no reason to end the new run."""
    try:
        shutil.rmtree(old)
    except OSError as error:
        print(f"{old}: the run that was replaced could not be deleted whole: {error.strerror}", flush=True)


def _write_start(state: RunState, aside: Path | None) -> None:
    """Writes what is known of a run when it starts. aside: where a previous run was set aside."""
    settings = yaml.safe_dump({"stage": state.stage, **state.settings}, sort_keys=False, allow_unicode=True)
    write_text(state.folder / "config.yaml", settings)
    write_json(state.folder / "versions.json", versions(state.cfg))
    _write_started(state, aside)


def _write_started(state: RunState, aside: Path | None) -> None:
    """Writes the hashes by which `finish_run` and later runs identify this run."""
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


def _move_away(folder: Path) -> Path:
    """Moves a run that is to be deleted into a new folder, and returns that folder."""
    around = Path(tempfile.mkdtemp(prefix=f".{folder.name}-replaced-", dir=folder.absolute().parent))
    try:
        _rename(folder, around / folder.name)
    except OSError:
        around.rmdir()
        raise
    return around


def _rename(folder: Path, place: Path) -> None:
    """Renames a folder that this process holds."""
    real = folder.resolve()
    os.rename(folder, place)
    run_lock.moved(real, place)


def _move_back(old: Path | None, folder: Path) -> None:
    """Undoes `_move_away`, as far as it goes. old: what `_move_away` has returned; None for nothing moved."""
    if old is not None:
        with contextlib.suppress(OSError):
            if folder.exists():
                folder.rmdir()
            os.rename(old / folder.name, folder)
            old.rmdir()


def _set_aside(folder: Path) -> Path:
    """Renames an unfinished run to a free name, prints it, and returns the new path."""
    place = manifest.aside(folder)
    _rename(folder, place)
    print(
        f"{folder}: the unfinished run there was set aside, with all that it had saved: {place}", flush=True
    )
    return place


def hold_output(output: Path, key: str) -> None:
    """Claims what another command than a stage writes: the run folder that it is in, else the output's name.

    Args:
        output: A folder that the command will write.
        key: Name of the output in a refusal.

    Raises:
        UserError: Another process writes there.
    """
    output = output.absolute()
    run = next((folder for folder in output.parents[:2] if is_ours(folder)), None)
    if run is not None:
        run_lock.hold(run, key)
    elif output.is_dir() and not os.access(output.parent, os.W_OK):  # a mounted folder
        run_lock.hold(output, key)
    else:
        run_lock.hold(output.parent, f"{key}: {output}", f"{output.name}.{PREFIX}")


def finish_run(folder: str | Path, summary: Mapping[str, Any]) -> None:
    """Marks a run as finished: writes summary.json, then finished.json with the hashes that open_run took.

    The folder is then released, unless run_stage does so when the report is written.

    Args:
        folder: Folder of the run.
        summary: What the stage reports, as JSON can hold it.

    Raises:
        UserError: The folder is not this run's any more.
    """
    if rank() != 0:
        return
    folder = Path(folder)
    run_lock.require_held(folder)
    write_json(folder / "summary.json", summary)
    write_json(folder / "finished.json", {**read_json(folder / "started.json"), "finished": now()})
    run_lock.finish(folder)


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Returns the summary of a finished run; an empty one where it cannot be read."""
    return read_json(Path(folder).expanduser() / "summary.json")
