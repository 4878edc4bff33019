"""What happens to an output folder: a table from its content and the request to an Action.

`decide` goes through the rows from the top: the first whose condition is true decides. Deciding changes
nothing: run_folder.py checks the decision before a stage starts, and carries it out when the stage opens its
folder. The content is a RunState, the request is a Request.
"""

from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime.checkpoint import compatibility, manifest

if TYPE_CHECKING:
    from saferlhf_fast.runtime.run_state import OutputConfig, RunState


class Action(Enum):
    """What happens to an output folder."""

    SKIP = "skip"  # nothing: it holds the wanted run, finished
    NEW = "new"  # it is created, or was empty
    RESUME = "resume"  # it stays, and its run is resumed
    REPLACE = "replace"  # its run is deleted once the new one has been written
    SET_ASIDE = "set aside"  # its run is renamed and kept
    REFUSE = "refuse"  # nothing, and the stage does not start


class Request(NamedTuple):
    """What a stage's settings request for its output folder.

    Attributes:
        resume: None, "auto" or the folder of a checkpoint, as in the settings.
        overwrite: As in the settings: the folder's content may be deleted if it is a run folder.
        restart: An unfinished run of the same stage may be started again without `overwrite`, as `run` does
            with its stages.
        skip: A finished run of the same stage, settings and inputs counts as done.
    """

    resume: str | None
    overwrite: bool
    restart: bool = False
    skip: bool = False


class Decision(NamedTuple):
    """An action, and the sentence that gives the reason for REFUSE."""

    action: Action
    sentence: str = ""


class Row(NamedTuple):
    """One case of the table.

    Attributes:
        condition: Takes state and request; what it returns is true when the row decides. A mapping gives
            words for the sentence.
        action: What happens then.
        sentence: Template of a refusal, with {key} for the name of the output, {state.…}, {requested.…}, and
            the condition's words.
    """

    condition: "Callable[[RunState, Request], Met]"
    action: Action
    sentence: str = ""


Met = bool | Mapping[str, Any] | None
"""What a condition returns: whether it is met, or words for the sentence."""


def request_of(cfg: "OutputConfig", restart: bool = False, skip: bool = False) -> Request:
    """What a stage's config asks for.

    Args:
        cfg: Config of the stage.
        restart: See Request.
        skip: See Request.
    """
    return Request(cfg.resume, cfg.overwrite, restart, skip)


def decide(state: "RunState", requested: Request, key: str = "output") -> Decision:
    """Says what happens to an output folder; changes nothing.

    Args:
        state: What the folder holds.
        requested: What the stage's settings request.
        key: Name of the output in a refusal.
    """
    for row in ROWS:
        met = row.condition(state, requested)
        if met:
            words = met if isinstance(met, dict) else {}
            return Decision(
                row.action, row.sentence.format(key=key, state=state, requested=requested, **words)
            )
    raise AssertionError("the last row decides whatever is left")


def _names_no_checkpoint(state: "RunState", requested: Request) -> Met:
    """Whether `resume` names a folder that is no checkpoint."""
    if requested.resume is None or requested.resume == "auto":
        return None
    try:
        manifest.read(Path(requested.resume).expanduser())
    except UserError as error:
        return {"why": error}
    return None


def _holds_own_input(state: "RunState", requested: Request) -> Met:
    """Whether the folder holds an input of the stage."""
    return state.own_input and dict(zip(("name", "value"), state.own_input))


def _resumes_another_stage(state: "RunState", requested: Request) -> Met:
    """Whether the checkpoint belongs to another stage."""
    return (
        state.resumes(requested.resume)
        and not state.same_stage
        and {"there": state.settings_there.get("stage")}
    )


def _resumes_with_changes(state: "RunState", requested: Request) -> Met:
    """Whether settings have changed that must not change within a run."""
    return (
        state.resumes(requested.resume)
        and bool(state.changed)
        and {"why": compatibility.incompatibility_message(state.folder, state.changed)}
    )


def _would_delete_its_checkpoint(state: "RunState", requested: Request) -> bool:
    """Whether the folder is not resumed, but holds the checkpoint that `resume` names."""
    return (
        requested.resume is not None
        and requested.resume != "auto"
        and state.content == "run"
        and state.holds(requested.resume)
    )


def _may_start_again(state: "RunState", requested: Request) -> bool:
    """Whether the folder holds an unfinished run that a new one may replace without `overwrite`."""
    if state.content != "run" or state.ending == "finished":
        return False
    by_recipe = requested.restart and state.ending == "unfinished" and state.same_stage
    return by_recipe or (requested.resume == "auto" and state.same_settings)


def _needs_overwrite(state: "RunState", requested: Request) -> bool:
    """Whether `overwrite` is missing."""
    return not requested.overwrite and not _may_start_again(state, requested)


ROWS = (
    Row(lambda state, requested: requested.skip and state.is_done, Action.SKIP),
    # --- requests that are wrong, whatever the folder holds; and outputs that cannot be a run folder
    Row(
        lambda state, requested: not state.output.strip(),
        Action.REFUSE,
        "{key}: expected a folder, got an empty text",
    ),
    Row(
        _names_no_checkpoint,
        Action.REFUSE,
        "resume: expected auto or the folder of a checkpoint, got {requested.resume}: {why}",
    ),
    Row(
        lambda state, requested: state.content == "file",
        Action.REFUSE,
        "{key}: {state.folder} is a file; expected a folder",
    ),
    Row(
        lambda state, requested: state.content == "link",
        Action.REFUSE,
        "{key}: {state.folder} is a link that leads to no folder; expected a folder",
    ),
    Row(
        _holds_own_input,
        Action.REFUSE,
        "{key}: {state.folder} holds this run's own input {name}={value}; choose another folder",
    ),
    Row(lambda state, requested: state.content in ("absent", "empty"), Action.NEW),
    # --- the folder has a checkpoint of its own to resume from
    Row(
        lambda state, requested: state.resumes(requested.resume) and not state.settings_there,
        Action.REFUSE,
        "{key}: {state.folder}/config.yaml cannot be read, so that it is unknown whether the run there is "
        "this one; expected the settings that it was started with. Choose another folder, or overwrite=true "
        "without resume",
    ),
    Row(
        _resumes_another_stage,
        Action.REFUSE,
        "resume: {state.folder} belongs to the stage {there}; expected one of {state.stage}, another output, "
        "or a new start (overwrite=true without resume)",
    ),
    Row(_resumes_with_changes, Action.REFUSE, "{why}"),
    Row(lambda state, requested: state.resumes(requested.resume), Action.RESUME),
    # --- the folder's content would have to be removed
    Row(
        _would_delete_its_checkpoint,
        Action.REFUSE,
        "{key}: {state.folder} holds the checkpoint that resume names, and a finished run; choose another "
        "folder",
    ),
    Row(
        lambda state, requested: _needs_overwrite(state, requested) and state.content == "foreign",
        Action.REFUSE,
        "{key}: {state.folder} is not empty; choose another folder, or overwrite=true",
    ),
    Row(
        lambda state, requested: _needs_overwrite(state, requested) and state.ending != "unfinished",
        Action.REFUSE,
        "{key}: {state.folder} holds a finished run; choose another folder, or overwrite=true",
    ),
    Row(
        lambda state, requested: _needs_overwrite(state, requested),
        Action.REFUSE,
        "{key}: {state.folder} holds an unfinished run; choose another folder, or overwrite=true",
    ),
    Row(
        lambda state, requested: state.content == "foreign",
        Action.REFUSE,
        "{key}: {state.folder} is not empty and no run folder of saferlhf-fast: overwrite=true does not "
        "delete it; delete it yourself or choose another folder",
    ),
    # It would be renamed: relative paths of this command would then lead into the old folder.
    Row(
        lambda state, requested: state.holds_working_directory,
        Action.REFUSE,
        "{key}: {state.folder} holds the folder that this command was started in; start it elsewhere",
    ),
    # --- the folder's run is removed: set aside where it may still be worth something, else deleted
    Row(
        lambda state, requested: not _may_start_again(state, requested), Action.REPLACE
    ),  # overwrite=true asks for it
    Row(lambda state, requested: state.same_start and state.has_saved, Action.SET_ASIDE),
    Row(lambda state, requested: not state.same_start and not requested.overwrite, Action.SET_ASIDE),
    Row(lambda state, requested: True, Action.REPLACE),
)
"""All cases, from the first that is tried; tests/runtime/test_run_decision.py lists their outcomes."""
