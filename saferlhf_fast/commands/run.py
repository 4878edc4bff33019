"""Runs one stage (`run_stage`), or several one after the other (`saferlhf-fast run recipe.yaml`).

A recipe of `run` has `output` and `stages`, and may have `root` and `seed`:

    root: ???                          # the user gives it: root=/data
    output: runs/mine
    stages:
      - sft: {model: ${root}/llama, data: ${root}/alpaca.json}
      - reward: {model: ${output}/sft/model, data: ${root}/pairs.json}
      - {name: small, cost: {model: ${output}/sft/model, data: ${root}/safety.json}}

The name of a stage is its `name`, or its kind when none is given; its output is <output>/<name>. All stages
are checked before the first one starts. A finished stage with the same settings and inputs is skipped. An
unfinished one resumes from its newest checkpoint; without one it starts again, and what it had saved is set
aside (see runtime/run_decision.py). Any other existing output needs overwrite=true.
"""

import dataclasses
import gc
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import OmegaConf

from saferlhf_fast.commands import disk_failure, run_files
from saferlhf_fast.config import checks, inputs
from saferlhf_fast.config.dotted_keys import with_settings_beside_stages
from saferlhf_fast.config.load import apply, build, read_recipe, resolve, where
from saferlhf_fast.config.schema import leaves, nearest, show
from saferlhf_fast.config.stage_table import WITH_SETTINGS
from saferlhf_fast.config.stages import STAGES, RunConfig
from saferlhf_fast.errors import DiskError, UserError
from saferlhf_fast.runtime import provenance, run_folder, run_lock
from saferlhf_fast.runtime.quiet_libraries import quiet_libraries
from saferlhf_fast.runtime.run_decision import Action, request_of
from saferlhf_fast.runtime.run_state import RunState, is_ours

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from saferlhf_fast.config.stages import (
        DemoConfig,
        DPOConfig,
        EvaluateConfig,
        ModerationConfig,
        PPOConfig,
        PreferenceConfig,
        SFTConfig,
    )

    StepConfig = SFTConfig | PreferenceConfig | DPOConfig | PPOConfig | ModerationConfig | EvaluateConfig

ENTRIES = {name: spec.entry for name, spec in WITH_SETTINGS.items() if spec.entry}
"""{stage: "module:function"}: it takes the config and `restart`, and returns a summary that JSON can hold."""


class Step(NamedTuple):
    """One stage of a run."""

    name: str
    kind: str
    cfg: "StepConfig"


@run_lock.session()
def run_stage(
    stage: str, cfg: "StepConfig | DemoConfig", restart: bool = False, key: str = "output"
) -> dict[str, Any]:
    """Checks a stage's inputs and output, runs it, and marks its folder as finished.

    The stage's own module imports torch, after the checks. A stage opens its folder itself, with
    `run_folder.open_run`, once it has read its models and data, so that bad input leaves an existing output
    untouched.

    Args:
        stage: The kind of stage, or "demo".
        cfg: Its config.
        restart: Whether an unfinished run of the same stage in its output may be started again without
            `overwrite`.
        key: What error messages call the output.

    Returns:
        The stage's summary; that of the earlier run when the stage is already finished.

    Raises:
        UserError: An input, a setting or the output cannot be used.
    """
    checks.check(stage, cfg)
    if stage == "demo":
        cfg = run_folder.with_output(stage, cfg)
    if run_folder.check_output(stage, cfg, key, restart) is Action.SKIP:
        assert cfg.output is not None, "only a stage with an output can be finished already"
        _say(f"{stage}: finished before with the same settings and inputs; see {cfg.output}")
        run_files.write_report(Path(cfg.output).expanduser(), only_missing=True)
        return run_folder.read_summary(cfg.output)
    quiet_libraries()
    module, name = ENTRIES[stage].split(":")
    folder = Path(cfg.output).expanduser() if cfg.output else None
    begun = time.perf_counter()
    try:
        summary = getattr(import_module(module), name)(cfg, restart=restart)
        if folder and (folder / "started.json").exists() and not (folder / "finished.json").exists():
            run_folder.finish_run(folder, summary)
        run_files.write_report(folder)  # last: a chart that cannot be drawn must not undo hours of training
    except Exception as e:
        disk_error = disk_failure.of_run(e, folder)
        if disk_error is not None:
            raise disk_error from e
        if isinstance(e, UserError):
            raise
        # a bug: its traceback is written, since the terminal shows one line
        path = run_files.write_traceback(folder)
        if path:
            e.add_note(f"traceback: {path}")
        raise
    _say(f"{stage}: done in {time.perf_counter() - begun:.0f} s" + (f"; see {folder}" if folder else ""))
    return summary


@run_lock.session()
def run(recipe: str | Path, overrides: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Runs the stages of a recipe.

    Args:
        recipe: Path of a recipe or name of a shipped one.
        overrides: {key: value}; a key is one of the recipe's own (root, output, seed, overwrite), or
            `<stage>.<its key>`, e.g. sft.train.max_steps.

    Returns:
        {name: {kind, state, seconds, output, summary}}, as in summary.json.

    Raises:
        UserError: A setting, an input or an output of any stage cannot be used.
    """
    top, steps = plan(recipe, overrides or {})
    output = Path(top.output).expanduser()
    if run_folder.rank() == 0:
        run_lock.hold(output)  # between two stages too, when neither holds its own folder
    results: dict[str, dict[str, Any]] = {}
    for step in steps:
        entry: dict[str, Any] = {
            "kind": step.kind,
            "output": step.cfg.output,
            "state": "done",
            "seconds": None,
        }
        state = RunState(step.kind, step.cfg)
        if step.cfg.output is not None and state.is_done:
            _say(f"{step.name}: finished before with the same settings and inputs; skipped")
            run_files.write_report(state.folder, only_missing=True)
            entry |= {"state": "skipped", "summary": run_folder.read_summary(step.cfg.output)}
        else:
            begun = time.perf_counter()
            try:
                entry["summary"] = run_stage(
                    step.kind, _resumed(step, top.resume, state), True, f"{step.name}.output"
                )
            except DiskError as e:
                done = f"; finished stages: {', '.join(results)}" if results else ""
                raise DiskError(f"stage {step.name}: {e}{done}") from e
            entry["seconds"] = round(time.perf_counter() - begun, 1)
            gc.collect()  # a stage's models must be gone before the next stage loads its own
        results[step.name] = entry
        if run_folder.rank() == 0:
            run_lock.require_held(output)
            provenance.write_json(output / "summary.json", {"recipe": str(recipe), "stages": results})
    if run_folder.rank() == 0:
        _print_table(results, output)
    return results


def plan(recipe: str | Path, overrides: dict[str, Any]) -> tuple[RunConfig, list[Step]]:
    """Validates a recipe: its settings, inputs and outputs. It changes nothing.

    Args:
        recipe: Path of a recipe or name of a shipped one.
        overrides: {key: value}, as in `run`.

    Returns:
        The recipe's own settings, and its stages in order.

    Raises:
        UserError: Something cannot be used; the message names the stage and the key.
    """
    top, steps = steps_of(recipe, overrides)
    for i, step in enumerate(steps):
        earlier_outputs = [earlier.cfg.output for earlier in steps[:i] if earlier.cfg.output is not None]
        checks.check(step.kind, step.cfg, earlier_outputs, f"{step.name}.")
    _check_outputs(top, steps)
    return top, steps


def steps_of(recipe: str | Path, overrides: dict[str, Any]) -> tuple[RunConfig, list[Step]]:
    """Validates the settings of a recipe, without looking at models, data and outputs.

    Args:
        recipe: Path of a recipe or name of a shipped one.
        overrides: {key: value}, as in `run`.

    Returns:
        The recipe's own settings, and its stages in order.

    Raises:
        UserError: A setting is wrong.
    """
    raw = read_recipe(recipe)
    if "stages" not in raw:
        raise UserError(
            f"{recipe}: no stages; a recipe of one stage is started with: saferlhf-fast sft {recipe}"
        )
    names_and_kinds = _stages(raw, recipe)
    raw = with_settings_beside_stages(raw, names_and_kinds, recipe)
    for key, value in overrides.items():
        _override(raw, names_and_kinds, key, value, recipe)
    values = resolve(raw, recipe, lambda key: _as_override(key, names_and_kinds))
    origin = where(recipe, overrides)
    top = build("run", values, origin)
    steps: list[Step] = []
    outputs: list[str | None] = []
    for i, (name, kind) in enumerate(names_and_kinds):
        given = values["stages"][i][kind] or {}
        if not isinstance(given, dict):
            raise UserError(f"{recipe}: stages.{i}.{kind}: expected a mapping of settings, got {show(given)}")
        common = {"output": f"{top.output}/{name}", "seed": top.seed, "overwrite": top.overwrite}
        cfg = build(kind, {**common, **given}, origin, f"{name}.")
        checks.check_settings(kind, cfg, f"{name}.")
        _check_separate(f"{recipe}: {name}.output", cfg.output, top.output, outputs)
        outputs.append(cfg.output)
        steps.append(Step(name, kind, cfg))
    return top, steps


def _check_separate(key: str, output: str | None, top: str, others: Iterable[str | None]) -> None:
    """Raises UserError when replacing an output would delete something else.

    That is so when the output is another stage's, contains it or is inside it, and when the output is the
    folder of the whole run or contains it.
    """
    if output is None:
        return
    for other in filter(None, others):
        if inputs.is_inside(output, other) and inputs.is_inside(other, output):
            raise UserError(f"{key}: {output} is another stage's output too")
        if inputs.is_inside(output, other) or inputs.is_inside(other, output):
            raise UserError(
                f"{key}: {output} and another stage's output, {other}, are inside one another; expected "
                f"separate folders"
            )
    if inputs.is_inside(top, output):
        raise UserError(
            f"{key}: {output} holds the folder of the whole run, {top}; expected a folder of its own"
        )


def _stages(raw: "DictConfig", recipe: str | Path) -> list[tuple[str, str]]:
    """Returns (name, kind) of each stage, and gives a stage without settings an empty mapping."""
    if not OmegaConf.is_list(raw._get_node("stages")):
        raise UserError(f"{recipe}: stages: expected a list of stages (- sft: …), got something else")
    names_and_kinds: list[tuple[str, str]] = []
    for i, entry in enumerate(raw.stages):
        kinds = [k for k in entry if k != "name"] if OmegaConf.is_dict(entry) else []
        if len(kinds) != 1:
            raise UserError(
                f"{recipe}: stages.{i}: expected one stage (- sft: …, with name: beside it if need be)"
            )
        kind, name = kinds[0], entry.get("name") or kinds[0]
        if kind not in STAGES:
            guess = nearest(str(kind), list(STAGES))
            raise UserError(
                f"{recipe}: stages.{i}: unknown stage {kind}; "
                + (f"did you mean {guess}?" if guess else f"expected one of {', '.join(STAGES)}")
            )
        if (
            not isinstance(name, str)
            or not name.strip()
            or name in leaves(RunConfig)
            or "." in name
            or "/" in name
        ):
            raise UserError(f"{recipe}: stages.{i}.name: {name} cannot be the name of a stage")
        if name in [n for n, _ in names_and_kinds]:
            raise UserError(
                f"{recipe}: stages.{i}: a second stage {name}; give it a name: - {{name: …, {kind}: …}}"
            )
        if entry._get_node(kind)._is_none():
            entry[kind] = {}
        names_and_kinds.append((name, kind))
    if not names_and_kinds:
        raise UserError(f"{recipe}: stages: expected at least one stage")
    return names_and_kinds


def _override(
    raw: "DictConfig",
    names_and_kinds: Sequence[tuple[str, str]],
    key: str,
    value: Any,
    recipe: str | Path,
) -> None:
    """Writes one override where it belongs: to the recipe's own keys, or to the stage that it names."""
    top = leaves(RunConfig)
    first, _, inner = key.partition(".")
    names = [name for name, _ in names_and_kinds]
    if first in names and inner:
        kind = dict(names_and_kinds)[first]
        settings = raw.stages[names.index(first)][kind]
        apply(settings, {inner: value}, leaves(STAGES[kind]), recipe)
    elif key in top and key != "stages":
        apply(raw, {key: value}, top, recipe)
    else:
        known = [k for k in top if k != "stages"]
        known += [f"{name}.{k}" for name, kind in names_and_kinds for k in leaves(STAGES[kind])]
        guess = nearest(key, known)
        raise UserError(
            f"command line: {key}: unknown key; "
            + (f"did you mean {guess}?" if guess else f"stages are {', '.join(names)}")
        )


def _as_override(key: str, names_and_kinds: Sequence[tuple[str, str]]) -> str:
    """Writes a key's place in the recipe as the user would override it.

    stages[0].sft.data and stages.0.sft.data become <stage>.data.
    """
    place = re.fullmatch(r"stages[.\[](\d+)\]?\.([^.]+)\.(.+)", key)
    if place is None or int(place[1]) >= len(names_and_kinds) or place[2] == "name":
        return key
    return f"{names_and_kinds[int(place[1])][0]}.{place[3]}"


def _check_outputs(top: RunConfig, steps: Sequence[Step]) -> None:
    """Raises, before the first stage starts, the UserErrors that a later stage would raise.

    A finished stage that reads what an earlier stage will replace runs again too.
    """
    if run_folder.rank() != 0:
        return
    if is_ours(top.output):
        raise UserError(f"output: {top.output} holds a run of a single stage; choose another folder")
    run_lock.refuse_if_in_use(Path(top.output).expanduser(), "output", run_lock.quick_patience())
    run_folder.check_place(Path(top.output).expanduser(), "output")  # for summary.json
    new_outputs: list[str] = []  # of the stages that will run
    for step in steps:
        if step.cfg.output is None:  # it prints its result and replaces nothing
            continue
        state = RunState(step.kind, step.cfg)
        reads_new_output = any(
            inputs.is_inside(value, folder) for _, value, _ in state.sources for folder in new_outputs
        )
        if reads_new_output or not state.is_done_but_for_inputs:
            run_folder.checked_action(
                state, request_of(_resumed(step, top.resume, state), restart=True), f"{step.name}.output"
            )
            new_outputs.append(step.cfg.output)


def _resumed(step: Step, resume: str, state: RunState) -> "StepConfig":
    """Returns a step's config, with resume=auto when its folder has an unfinished run with a checkpoint.

    A run of other settings is then refused by their names, unless overwrite=true allows to replace it.
    """
    if step.cfg.output is None or resume != "auto" or not state.resumes("auto"):
        return step.cfg
    if step.cfg.overwrite and state.changed:
        return step.cfg
    return dataclasses.replace(step.cfg, resume="auto")


def _say(line: str) -> None:
    """Prints a line, on rank 0."""
    if run_folder.rank() == 0:
        print(line, flush=True)


def _print_table(results: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"run {output}", title_justify="left")
    for column in ("stage", "state", "seconds", "result"):
        table.add_column(column, justify="right" if column == "seconds" else "left", overflow="fold")
    for name, entry in results.items():
        seconds = "" if entry["seconds"] is None else f"{entry['seconds']:.0f}"
        table.add_row(name, entry["state"], seconds, _result(entry["summary"]))
    Console().print(table)


def _result(summary: object, most: int = 4) -> str:
    """Writes the first few numbers of a summary."""
    if not isinstance(summary, dict):
        return ""
    numbers = [(k, v) for k, v in summary.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers[:most])
