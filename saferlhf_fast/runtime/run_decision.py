"""What becomes of an output folder: a table from what lies there (RunState) and what is asked for (Asked) to
one Action.

`decide` goes through the rows from the top: the first whose condition is true decides. Looking changes
nothing: run_folder.py checks by the decision before a stage starts, and acts by the decision when the stage
opens its folder.
"""

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime.checkpoint import compatibility, manifest


class Action(Enum):
    """What becomes of an output folder."""

    SKIP = "skip"  # nothing: the run there is the one that is wanted, and finished
    NEW = "new"  # it is made, or was empty
    RESUME = "resume"  # it stays, and the run there is resumed
    REPLACE = "replace"  # the run there is deleted once the new one has been written
    SET_ASIDE = "set aside"  # the run there is renamed and kept
    REFUSE = "refuse"  # nothing, and the stage does not start


class Asked(NamedTuple):
    """What is asked for.

    Attributes:
        resume: None, "auto" or the folder of a checkpoint, as in the settings.
        overwrite: As in the settings: what is there may be deleted, when it is a run folder.
        restart: An unfinished run of the same stage may be started again without `overwrite`, as `run` does
        with its stages. skip: A finished run of the same stage, settings and inputs is all that is wanted.
    """

    resume: str | None
    overwrite: bool
    restart: bool = False
    skip: bool = False


class Decision(NamedTuple):
    """An action; with REFUSE, the sentence that says why."""

    action: Action
    sentence: str = ""


class Row(NamedTuple):
    """One case. sentence is a template: {key} of the output, {state.…}, {asked.…} and the condition's words."""

    condition: Callable  # state, asked -> true when the row decides, or a dict of words for the sentence
    action: Action
    sentence: str = ""


def asked_by(cfg, restart=False, skip=False):
    """-> what a stage's config asks for."""
    return Asked(cfg.resume, cfg.overwrite, restart, skip)


def decide(state, asked, key="output"):
    """-> the Decision. key: what a refusal calls the output."""
    for row in ROWS:
        met = row.condition(state, asked)
        if met:
            words = met if isinstance(met, dict) else {}
            return Decision(row.action, row.sentence.format(key=key, state=state, asked=asked, **words))
    raise AssertionError("the last row decides whatever is left")


def _names_no_checkpoint(state, asked):
    if asked.resume in (None, "auto"):
        return None
    try:
        manifest.read(Path(asked.resume).expanduser())
    except UserError as error:
        return {"why": error}
    return None


def _own_input(state, asked):
    return state.own_input and dict(zip(("name", "value"), state.own_input))


def _another_stage_s(state, asked):
    return (
        state.resumes(asked.resume) and not state.same_stage and {"there": state.settings_there.get("stage")}
    )


def _resumes_otherwise(state, asked):
    return (
        state.resumes(asked.resume)
        and state.changed
        and {"why": compatibility.refusal(state.folder, state.changed)}
    )


def _its_checkpoint_would_go(state, asked):
    return asked.resume not in (None, "auto") and state.content == "run" and state.holds(asked.resume)


def _may_start_again(state, asked):
    """Whether an unfinished run lies there in whose place a new one may start without `overwrite`."""
    if state.content != "run" or state.ending == "whole":
        return False
    by_recipe = asked.restart and state.ending == "none" and state.same_stage
    return by_recipe or (asked.resume == "auto" and state.same_settings)


def _needs_overwrite(state, asked):
    return not asked.overwrite and not _may_start_again(state, asked)


ROWS = (
    Row(lambda state, asked: asked.skip and state.is_done, Action.SKIP),
    # --- what no folder could be right for
    Row(
        lambda state, asked: not state.cfg.output.strip(),
        Action.REFUSE,
        "{key}: expected a folder, got an empty text",
    ),
    Row(
        _names_no_checkpoint,
        Action.REFUSE,
        "resume: expected auto or the folder of a checkpoint, got {asked.resume}: {why}",
    ),
    Row(
        lambda state, asked: state.content == "file",
        Action.REFUSE,
        "{key}: {state.folder} is a file; expected a folder",
    ),
    Row(
        lambda state, asked: state.content == "link",
        Action.REFUSE,
        "{key}: {state.folder} is a link that leads to no folder; expected a folder",
    ),
    Row(
        _own_input,
        Action.REFUSE,
        "{key}: {state.folder} holds this run's own input {name}={value}; choose another folder",
    ),
    Row(lambda state, asked: state.content in ("absent", "empty"), Action.NEW),
    # --- a checkpoint of the folder's own is there to go on from
    Row(
        lambda state, asked: state.resumes(asked.resume) and not state.settings_there,
        Action.REFUSE,
        "{key}: {state.folder}/config.yaml cannot be read, so that nobody knows whether the run there is "
        "this one; expected the "
        "settings that it was started with. Choose another folder, or overwrite=true without resume",
    ),
    Row(
        _another_stage_s,
        Action.REFUSE,
        "resume: {state.folder} belongs to the stage {there}; expected one of {state.stage}, another output, "
        "or a new start "
        "(overwrite=true without resume)",
    ),
    Row(_resumes_otherwise, Action.REFUSE, "{why}"),
    Row(lambda state, asked: state.resumes(asked.resume), Action.RESUME),
    # --- what is there would have to make room
    Row(
        _its_checkpoint_would_go,
        Action.REFUSE,
        "{key}: {state.folder} holds the checkpoint that resume names, and a finished run; choose another "
        "folder",
    ),
    Row(
        lambda state, asked: _needs_overwrite(state, asked) and state.content == "foreign",
        Action.REFUSE,
        "{key}: {state.folder} is not empty; choose another folder, or overwrite=true",
    ),
    Row(
        lambda state, asked: _needs_overwrite(state, asked) and state.ending != "none",
        Action.REFUSE,
        "{key}: {state.folder} holds a finished run; choose another folder, or overwrite=true",
    ),
    Row(
        lambda state, asked: _needs_overwrite(state, asked),
        Action.REFUSE,
        "{key}: {state.folder} holds an unfinished run; choose another folder, or overwrite=true",
    ),
    Row(
        lambda state, asked: state.content == "foreign",
        Action.REFUSE,
        "{key}: {state.folder} is not empty and no run folder of ours: overwrite=true does not delete it; "
        "delete it yourself "
        "or choose another folder",
    ),
    # It would be renamed: relative paths would lead into the old one.
    Row(
        lambda state, asked: state.holds_working_directory,
        Action.REFUSE,
        "{key}: {state.folder} holds the folder that this command was started in; start it elsewhere",
    ),
    # --- it makes room: kept when it is worth more than its place
    Row(lambda state, asked: not _may_start_again(state, asked), Action.REPLACE),  # overwrite=true it is
    Row(lambda state, asked: state.same_start and state.has_saved, Action.SET_ASIDE),
    Row(lambda state, asked: not state.same_start and not asked.overwrite, Action.SET_ASIDE),
    Row(lambda state, asked: True, Action.REPLACE),
)
"""All cases, in the order in which they are asked; tests/runtime/test_run_decision.py lists what comes of them."""
