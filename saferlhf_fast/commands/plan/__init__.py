"""`saferlhf-fast plan`: what a recipe needs in memory, stage by stage and model by model, before anything is
loaded.

    saferlhf-fast plan recipe.yaml --gpus 8 --memory 80
    results = plan("recipe.yaml", {"sft.model": "DIR"}, Hardware(gpus=8, memory=80 << 30))

zero_memory.py knows what DeepSpeed keeps, communication.py what it sends, passes.py how many passes a step
has, trace.py and pass_memory.py what they take, phases.py what stages are put together from, stage_phases.py
and ppo_phases.py who is in a stage and when, options.py what to change; bench/plan_memory.py compares with
real peaks. docs/memory.md and docs/scaling.md say how right it is.
"""

import json

from ...errors import UserError

HELP = """usage: saferlhf-fast plan recipe.yaml [--gpus N] [--memory GiB] [--device cuda|cpu] [--json]
                          [stage=KIND] [key=value …] [--debug]

What each stage of a recipe needs in memory on each GPU, model by model and moment by moment, whether it fits, and if not which
settings make it fit; and what each GPU sends in a step. Nothing is loaded: a model's folder needs its config.json alone, data
need not be there. Every sequence counts as long as max_length allows.

examples:
  saferlhf-fast plan paper --gpus 8 --memory 80 sft.model=DIR       a shipped recipe; DIR holds the model's config.json
  saferlhf-fast plan recipe.yaml --gpus 2 ppo-lag.engine.zero_stage=3
  saferlhf-fast plan stage=sft model=DIR data=none output=none      one stage, without a recipe

settings:
  gpus  (whole number above 0; default: 1)
      Processes that the run is spread over, one on each GPU.
  memory  (number above 0; default: 80)
      Memory of a GPU (GiB).
  device  (one of cuda, cpu; default: "cuda")
      What the stages run on; on a CPU `memory` is what each process may take.
  node  (whole number above 0; default: 8)
      GPUs of a node.
  nvlink  (number above 0; default: 450)
      What a GPU can send to others of its node (GB/s).
  network  (number above 0; default: 50)
      What a GPU can send to other nodes (GB/s); 50 is a card of 400 Gb/s for each.
  stage  (one of {stages}; default: null)
      The stage of a recipe that has no `stages`.
  json  (true or false; default: false)
      Print JSON instead of tables; sizes in bytes.
  Any other key is the recipe's own, as in saferlhf-fast run: sft.train.micro_tokens=4096, root=DIR."""

LINKS = {"node": int, "nvlink": float, "network": float}
# bytes of a GPU that are not the plan's: CUDA's context, cuBLAS and NCCL; not measured by us
ALLOWANCE = 3 << 29
FRAGMENTED = 0.03  # share of a GPU that torch's allocator may leave between blocks; not measured by us


def plan(recipe, overrides, hardware, stage=None, options=True):
    """-> [(StagePlan, Advice or None)]. Advice: for a stage that does not fit, where options.

    recipe: path or name of a shipped one; None with `stage` alone · overrides: {key: value} as on the command
    line.
    """
    from .options import advise
    from .stage_phases import plan_stage

    results, earlier, room = [], {}, usable(hardware)
    for name, kind, cfg in _steps(recipe, overrides, stage):
        made = plan_stage(name, kind, cfg, hardware, earlier)
        does_not_fit = options and made.worst.total > room
        results.append(
            (made, advise(name, kind, cfg, hardware, dict(earlier), room) if does_not_fit else None)
        )
        if cfg.output:
            earlier[cfg.output] = cfg
    return results


def usable(hardware):
    """Bytes of a device that a stage may take."""
    return (
        hardware.memory if hardware.device == "cpu" else int(hardware.memory * (1 - FRAGMENTED)) - ALLOWANCE
    )


def _steps(recipe, overrides, stage):
    """-> [(name, kind, config)] of a recipe, its settings checked."""
    from ...config import checks, load
    from .. import run

    if recipe is not None and "stages" in load.read_recipe(recipe):
        if stage is not None:
            raise UserError(f"stage: {recipe} has stages of its own; expected none, got {stage}")
        return run.steps_of(recipe, overrides)[1]
    if stage is None and recipe is not None:
        stage = load.read_recipe(recipe).get("stage")
    if stage not in load.SETTINGS or stage not in run.STAGES:
        known = ", ".join(run.STAGES)
        raise UserError(f"stage: expected one of {known} for a recipe without stages, got {stage or 'none'}")
    cfg = load.load(stage, recipe, overrides)
    checks.check_settings(stage, cfg)
    return [(stage, stage, cfg)]


def main(words):
    """Runs `saferlhf-fast plan WORDS`."""
    from ...config.overrides import split_words

    as_json = "--json" in words
    recipe, overrides = split_words("run", [word for word in words if word != "--json"])
    own = {
        key: overrides.pop(key) for key in ("gpus", "memory", "device", "stage", *LINKS) if key in overrides
    }
    if recipe is None and "stage" not in own:
        raise UserError("plan: missing: a recipe, e.g. saferlhf-fast plan quickstart")
    if own.get("device", "cuda") not in ("cuda", "cpu"):
        raise UserError(f"command line: device: expected one of cuda, cpu, got {own['device']}")
    gpus, memory = (
        _number("gpus", own.get("gpus", "1"), int),
        _number("memory", own.get("memory", "80"), float),
    )
    from . import table
    from .phases import Hardware

    links = {key: _number(key, own[key], kind) for key, kind in LINKS.items() if key in own}
    hardware = Hardware(gpus, int(memory * 2**30), own.get("device", "cuda"), **links)
    results = plan(recipe, overrides, hardware, own.get("stage"))
    if as_json:
        print(json.dumps(table.as_dict(results, hardware, usable(hardware)), indent=1))
    else:
        table.show(results, hardware, usable(hardware))


def help_text():
    """The whole `--help`."""
    from ...config.stages import STAGES

    return HELP.format(stages=", ".join(STAGES))


def _number(key, text, kind):
    try:
        value = kind(text)
    except (TypeError, ValueError):
        value = -1
    if not 0 < value < 1e9:
        raise UserError(
            f"command line: {key}: expected a {'whole ' if kind is int else ''}number above 0, got {text}"
        )
    return value
