"""One stage, or several one after the other: `run_stage` and `saferlhf-fast run recipe.yaml`.

A recipe of `run` has `output` and `stages`, and may have `root` and `seed`:

    root: ???                          # to be given: root=/data
    output: runs/mine
    stages:
      - sft: {model: ${root}/llama, data: ${root}/alpaca.json}
      - reward: {model: ${output}/sft/model, data: ${root}/pairs.json}
      - {name: small, cost: {model: ${output}/sft/model, data: ${root}/safety.json}}

A stage is called by its `name`, its kind when none is given, and its output is <output>/<name>. All stages
are checked before the first one starts. A finished stage with the same settings and inputs is not done again,
an unfinished one goes on from its newest checkpoint or starts anew (what it had saved is set aside, see
runtime/run_decision.py), any other existing output needs overwrite=true.
"""

import dataclasses
import gc
import re
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from saferlhf_fast.config import checks, inputs, redact
from saferlhf_fast.config.load import apply, build, read_recipe, resolve, where
from saferlhf_fast.config.schema import leaves, nearest, show
from saferlhf_fast.config.stage_table import WITH_SETTINGS
from saferlhf_fast.config.stages import STAGES, RunConfig
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import provenance, run_folder
from saferlhf_fast.runtime.run_decision import Action, asked_by
from saferlhf_fast.runtime.run_state import RunState, is_ours

ENTRIES = {name: spec.entry for name, spec in WITH_SETTINGS.items() if spec.entry}
"""Where a stage lives; each takes its config and `restart`, and returns a summary that JSON can hold."""


class Step(NamedTuple):
    """One stage of a run: what it is called, what kind it is, its config."""

    name: str
    kind: str
    cfg: Any


def run_stage(stage, cfg, restart=False, key="output"):
    """Checks a stage's inputs and output, runs it, marks its folder finished, returns its summary.

    restart: an unfinished run of the same stage in its output may be started again without `overwrite` · key:
    what a refusal calls the output. torch is imported by the stage's own module, after the checks. A stage
    opens its folder itself, with `run_folder.open_run`, once it has read its models and data: bad input
    leaves an existing output untouched.
    """
    checks.check(stage, cfg)
    if stage == "demo":
        cfg = run_folder.with_output(stage, cfg)
    if run_folder.check_output(stage, cfg, key, restart) is Action.SKIP:
        _say(f"{stage}: finished before with the same settings and inputs; see {cfg.output}")
        return run_folder.read_summary(cfg.output)
    module, name = ENTRIES[stage].split(":")
    folder = Path(cfg.output).expanduser() if cfg.output else None
    begun = time.perf_counter()
    try:
        summary = getattr(import_module(module), name)(cfg, restart=restart)
    except UserError:
        raise
    except Exception as e:  # a bug of ours: keep where it happened, since the terminal shows one line
        kept = _keep_traceback(folder)
        if kept:
            e.add_note(f"traceback: {kept}")
        raise
    if folder and (folder / "started.json").exists() and not (folder / "finished.json").exists():
        run_folder.finish_run(folder, summary)
    if folder and run_folder.rank() == 0 and (folder / "metrics.jsonl").exists():
        from saferlhf_fast.evaluation.report import write_report

        write_report(folder)  # last: a chart that cannot be drawn must not undo hours of training
    _say(f"{stage}: done in {time.perf_counter() - begun:.0f} s" + (f"; see {folder}" if folder else ""))
    return summary


def run(recipe, overrides=None):
    """Runs the stages of a recipe and returns {name: {kind, state, seconds, output, summary}}, as in
    summary.json.

    overrides: {key: value}; a key is one of the recipe's own (root, output, seed, overwrite), or
    `<stage>.<its key>`, e.g. sft.train.max_steps.
    """
    top, steps = plan(recipe, overrides or {})
    output = Path(top.output).expanduser()
    done = {}
    for step in steps:
        entry = {"kind": step.kind, "output": step.cfg.output, "state": "done", "seconds": None}
        state = RunState(step.kind, step.cfg)
        if state.is_done:
            _say(f"{step.name}: finished before with the same settings and inputs; skipped")
            entry |= {"state": "skipped", "summary": run_folder.read_summary(step.cfg.output)}
        else:
            begun = time.perf_counter()
            entry["summary"] = run_stage(
                step.kind, _resumed(step, top.resume, state), True, f"{step.name}.output"
            )
            entry["seconds"] = round(time.perf_counter() - begun, 1)
            gc.collect()  # a stage's models must be gone before the next stage loads its own
        done[step.name] = entry
        if run_folder.rank() == 0:
            output.mkdir(parents=True, exist_ok=True)
            provenance.write_json(output / "summary.json", {"recipe": str(recipe), "stages": done})
    if run_folder.rank() == 0:
        _print_table(done, output)
    return done


def plan(recipe, overrides):
    """Returns (top settings, steps) of a recipe, everything validated: settings, inputs, outputs.

    Changes nothing.
    """
    top, steps = steps_of(recipe, overrides)
    for i, step in enumerate(steps):
        checks.check(step.kind, step.cfg, [earlier.cfg.output for earlier in steps[:i]], f"{step.name}.")
    _check_outputs(top, steps)
    return top, steps


def steps_of(recipe, overrides):
    """Returns (top settings, steps) of a recipe, settings validated; models, data and outputs are not looked
    at.
    """
    raw = read_recipe(recipe)
    if "stages" not in raw:
        raise UserError(
            f"{recipe}: no stages; a recipe of one stage is started with: saferlhf-fast sft {recipe}"
        )
    named = _stages(raw, recipe)
    for key, value in overrides.items():
        _override(raw, named, key, value, recipe)
    values = resolve(raw, recipe, lambda key: _as_override(key, named))
    origin = where(recipe, overrides)
    top = build("run", values, origin)
    steps, produced = [], []
    for i, (name, kind) in enumerate(named):
        given = values["stages"][i][kind] or {}
        if not isinstance(given, dict):
            raise UserError(f"{recipe}: stages.{i}.{kind}: expected a mapping of settings, got {show(given)}")
        common = {"output": f"{top.output}/{name}", "seed": top.seed, "overwrite": top.overwrite}
        cfg = build(kind, {**common, **given}, origin, f"{name}.")
        checks.check_settings(kind, cfg, f"{name}.")
        _check_apart(f"{recipe}: {name}.output", cfg.output, top.output, produced)
        produced.append(cfg.output)
        steps.append(Step(name, kind, cfg))
    return top, steps


def _check_apart(key, output, top, others):
    """Refuses an output that is another stage's, or lies in it or around it, since replacing one would take
    the other along, and one that is, or lies around, the folder of the whole run.
    """
    if output is None:
        return
    for other in filter(None, others):
        if inputs.is_inside(output, other) and inputs.is_inside(other, output):
            raise UserError(f"{key}: {output} is another stage's output too")
        if inputs.is_inside(output, other) or inputs.is_inside(other, output):
            raise UserError(
                f"{key}: {output} and another stage's output, {other}, lie in one another; expected folders "
                f"apart"
            )
    if inputs.is_inside(top, output):
        raise UserError(
            f"{key}: {output} holds the folder of the whole run, {top}; expected a folder of its own"
        )


def _stages(raw, recipe):
    """Returns [(name, kind)] of a recipe's stages, and makes an empty mapping of a stage without settings."""
    if not OmegaConf.is_list(raw._get_node("stages")):
        raise UserError(f"{recipe}: stages: expected a list of stages (- sft: …), got something else")
    named = []
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
        if name in [n for n, _ in named]:
            raise UserError(
                f"{recipe}: stages.{i}: a second stage {name}; give it a name: - {{name: …, {kind}: …}}"
            )
        if entry._get_node(kind)._is_none():
            entry[kind] = {}
        named.append((name, kind))
    if not named:
        raise UserError(f"{recipe}: stages: expected at least one stage")
    return named


def _override(raw, named, key, value, recipe):
    """Writes one override to where it belongs: the recipe's own keys, or those of the stage that it names."""
    top = leaves(RunConfig)
    first, _, rest = key.partition(".")
    names = [name for name, _ in named]
    if first in names and rest:
        kind = dict(named)[first]
        settings = raw.stages[names.index(first)][kind]
        apply(settings, {rest: value}, leaves(STAGES[kind]), recipe)
    elif key in top and key != "stages":
        apply(raw, {key: value}, top, recipe)
    else:
        known = [k for k in top if k != "stages"]
        known += [f"{name}.{k}" for name, kind in named for k in leaves(STAGES[kind])]
        guess = nearest(key, known)
        raise UserError(
            f"command line: {key}: unknown key; "
            + (f"did you mean {guess}?" if guess else f"stages are {', '.join(names)}")
        )


def _as_override(key, named):
    """Writes a key's place in the recipe, stages[0].sft.data or stages.0.sft.data, as an override:

    <stage>.data.
    """
    at = re.fullmatch(r"stages[.\[](\d+)\]?\.([^.]+)\.(.+)", key)
    return f"{named[int(at[1])][0]}.{at[3]}" if at and int(at[1]) < len(named) and at[2] != "name" else key


def _check_outputs(top, steps):
    """Refuses, before the first stage starts, what would be refused later.

    A finished stage that reads what an earlier one will make anew has to make room too.
    """
    if run_folder.rank() != 0:
        return
    if is_ours(top.output):
        raise UserError(f"output: {top.output} holds a run of a single stage; choose another folder")
    run_folder.check_place(Path(top.output).expanduser(), "output")  # summary.json lies there
    anew = []  # outputs of the stages that will run
    for step in steps:
        state = RunState(step.kind, step.cfg)
        reads_anew = any(inputs.is_inside(value, folder) for _, value, _ in state.sources for folder in anew)
        if reads_anew or not state.is_done_but_for_inputs:
            run_folder.checked_action(
                state, asked_by(_resumed(step, top.resume, state), restart=True), f"{step.name}.output"
            )
            anew += [step.cfg.output] if step.cfg.output else []


def _resumed(step, resume, state):
    """Returns a step's config, with resume=auto for a folder that holds an unfinished run which has a
    checkpoint; one of other settings will be refused by their names, unless overwrite=true says what is to
    become of it.
    """
    if resume == "auto" and state.resumes("auto") and not (step.cfg.overwrite and state.changed):
        return dataclasses.replace(step.cfg, resume="auto")
    return step.cfg


def _keep_traceback(folder):
    """Writes the traceback into the folder of the run that broke, when it has been opened; returns its path."""
    if not folder or not (folder / "started.json").exists() or (folder / "finished.json").exists():
        return None
    path = folder / f"error-rank{run_folder.rank()}.txt"
    path.write_text(redact.text(traceback.format_exc()), encoding="utf-8")
    return path


def _say(line):
    if run_folder.rank() == 0:
        print(line, flush=True)


def _print_table(done, output):
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"run {output}", title_justify="left")
    for column in ("stage", "state", "seconds", "result"):
        table.add_column(column, justify="right" if column == "seconds" else "left", overflow="fold")
    for name, entry in done.items():
        seconds = "" if entry["seconds"] is None else f"{entry['seconds']:.0f}"
        table.add_row(name, entry["state"], seconds, _result(entry["summary"]))
    Console().print(table)


def _result(summary, most=4):
    """Says the first few numbers of a summary."""
    if not isinstance(summary, dict):
        return ""
    numbers = [(k, v) for k, v in summary.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers[:most])
