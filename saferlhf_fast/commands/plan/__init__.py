"""`saferlhf-fast plan`: what a recipe needs in memory, stage by stage and model by model, before loading.

    saferlhf-fast plan recipe.yaml --gpus 8 --memory 80
    results = plan("recipe.yaml", {"sft.model": "DIR"}, Hardware(gpus=8, memory=80 << 30))

Each file answers one question:

    sizes.py          how many parameters a model has, from its configuration alone
    zero_memory.py    what DeepSpeed keeps of a model: weights, gradients, optimiser states
    trace.py          what one forward and backward pass takes
    pass_memory.py    what the passes of a stage take
    passes.py         how many passes a step has
    phases.py         what all stages' plans consist of: models, phases, parts
    stage_phases.py   which models take part in a supervised stage, and in which phases
    ppo_phases.py     the same of ppo, ppo-lag and evaluate
    communication.py  what a step sends between GPUs
    options.py        which settings make a stage fit
    table.py          how a plan is printed

bench/plan_memory.py compares plans with measured peaks. docs/memory.md and docs/scaling.md say how exact they
are.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import UserError

if TYPE_CHECKING:
    from .options import Advice
    from .phases import Hardware
    from .stage_phases import StagePlan

HELP = """usage: saferlhf-fast plan recipe.yaml [--gpus N] [--memory GiB] [--device cuda|cpu] [--json]
                          [stage=KIND] [key=value …] [--debug]

Says what each stage of a recipe needs in memory on each GPU, model by model and phase by phase, and whether
it fits. If a stage does not fit, it names settings that make it fit. It also says what each GPU sends in a
step. Nothing is loaded: a model's folder needs only its config.json, and the data need not exist. The plan
assumes that every sequence is as long as max_length allows.

examples:
  saferlhf-fast plan paper --gpus 8 --memory 80 sft.model=DIR    a shipped recipe; DIR holds a config.json
  saferlhf-fast plan recipe.yaml --gpus 2 ppo-lag.engine.zero_stage=3
  saferlhf-fast plan stage=sft model=DIR data=none output=none   one stage, without a recipe

settings:
  gpus  (whole number above 0; default: 1)
      How many processes the run has, one on each GPU.
  memory  (number above 0; default: 80)
      Memory of a GPU (GiB).
  device  (one of cuda, cpu; default: "cuda")
      What the stages run on; on a CPU `memory` is what each process may take.
  node  (whole number above 0; default: 8)
      GPUs of a node.
  nvlink  (number above 0; default: 450)
      How much a GPU can send to the others of its node (GB/s).
  network  (number above 0; default: 50)
      How much a GPU can send to other nodes (GB/s); 50 is one card of 400 Gb/s for each GPU.
  stage  (one of {stages}; default: null)
      The stage of a recipe that has no `stages`.
  json  (true or false; default: false)
      Print JSON instead of tables; sizes in bytes.
  Any other key is the recipe's own, as in saferlhf-fast run: sft.train.micro_tokens=4096, root=DIR."""

LINKS: dict[str, Callable[[Any], float]] = {"node": int, "nvlink": float, "network": float}
# Bytes of a GPU that the plan does not count: CUDA's context, cuBLAS and NCCL. An estimate, not measured.
ALLOWANCE = 3 << 29
FRAGMENTED = 0.03  # share of a GPU that torch's allocator may leave between blocks; an estimate, not measured

_Number = TypeVar("_Number", int, float)


def plan(
    recipe: str | Path | None,
    overrides: dict[str, Any],
    hardware: "Hardware",
    stage: str | None = None,
    options: bool = True,
) -> "list[tuple[StagePlan, Advice | None]]":
    """Plans every stage of a recipe.

    Args:
        recipe: Path of a recipe or name of a shipped one; None when `stage` alone is planned.
        overrides: {key: value} as on the command line.
        hardware: What the stages would run on.
        stage: The kind of stage, for a recipe that has no `stages`.
        options: Whether to look for settings that make a stage fit that does not.

    Returns:
        The plan of each stage, in order, with advice where `options` is set and the stage does not fit.

    Raises:
        UserError: The recipe or a setting is wrong, or a model's configuration cannot be read.
    """
    from .options import advise
    from .stage_phases import plan_stage

    results: list[tuple[StagePlan, Advice | None]] = []
    earlier: dict[str, Any] = {}
    room = usable(hardware)
    for name, kind, cfg in _steps(recipe, overrides, stage):
        stage_plan = plan_stage(name, kind, cfg, hardware, earlier)
        does_not_fit = options and stage_plan.worst.total > room
        results.append(
            (stage_plan, advise(name, kind, cfg, hardware, dict(earlier), room) if does_not_fit else None)
        )
        if cfg.output:
            earlier[cfg.output] = cfg
    return results


def usable(hardware: "Hardware") -> int:
    """Returns how many bytes of a device a stage may take."""
    return (
        hardware.memory if hardware.device == "cpu" else int(hardware.memory * (1 - FRAGMENTED)) - ALLOWANCE
    )


def _steps(
    recipe: str | Path | None, overrides: dict[str, Any], stage: str | None
) -> Sequence[tuple[str, str, Any]]:
    """Returns (name, kind, config) of each stage of a recipe, its settings checked."""
    from ...config import checks, load
    from .. import run

    if recipe is not None and "stages" in load.read_recipe(recipe):
        if stage is not None:
            raise UserError(f"stage: {recipe} has stages of its own; expected none, got {stage}")
        return run.steps_of(recipe, overrides)[1]
    if stage is None and recipe is not None:
        stage = load.read_recipe(recipe).get("stage")
    if stage is None or stage not in load.SETTINGS or stage not in run.STAGES:
        known = ", ".join(run.STAGES)
        raise UserError(f"stage: expected one of {known} for a recipe without stages, got {stage or 'none'}")
    cfg = load.load(stage, recipe, overrides)
    checks.check_settings(stage, cfg)
    return [(stage, stage, cfg)]


def main(words: list[str]) -> None:
    """Runs `saferlhf-fast plan WORDS`."""
    from ...config.overrides import split_words

    as_json = "--json" in words
    recipe, overrides = split_words("run", [word for word in words if word != "--json"])
    own = {
        key: overrides.pop(key) for key in ("gpus", "memory", "device", "stage", *LINKS) if key in overrides
    }
    if recipe is None and "stage" not in own:
        raise UserError("plan: missing: a recipe, e.g. saferlhf-fast plan quickstart")
    device, stage = str(own.get("device", "cuda")), own.get("stage")
    if device not in ("cuda", "cpu"):
        raise UserError(f"command line: device: expected one of cuda, cpu, got {device}")
    gpus, memory = (
        _number("gpus", own.get("gpus", "1"), int),
        _number("memory", own.get("memory", "80"), float),
    )
    from . import table
    from .phases import Hardware

    links: dict[str, Any] = {key: _number(key, own[key], kind) for key, kind in LINKS.items() if key in own}
    hardware = Hardware(gpus, int(memory * 2**30), device, **links)
    results = plan(recipe, overrides, hardware, None if stage is None else str(stage))
    if as_json:
        print(json.dumps(table.as_dict(results, hardware, usable(hardware)), indent=1))
    else:
        table.show(results, hardware, usable(hardware))


def help_text() -> str:
    """Returns the whole `--help`."""
    from ...config.stages import STAGES

    return HELP.format(stages=", ".join(STAGES))


def _number(key: str, text: object, kind: Callable[[Any], _Number]) -> _Number:
    """Reads a number above 0; `kind` is int or float. UserError otherwise."""
    try:
        value = kind(text)
    except (TypeError, ValueError):
        value = kind("-1")
    if not 0 < value < 1e9:
        raise UserError(
            f"command line: {key}: expected a {'whole ' if kind is int else ''}number above 0, got {text}"
        )
    return value
