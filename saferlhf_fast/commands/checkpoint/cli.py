"""saferlhf-fast checkpoint inspect | convert | export."""

import argparse
from pathlib import Path

from ...errors import UserError
from ...runtime.checkpoint import manifest
from .verify import newest

HELP = """usage: saferlhf-fast checkpoint inspect PATH [--quick]
       saferlhf-fast checkpoint convert PATH [--output FOLDER]
       saferlhf-fast checkpoint export  PATH --output FOLDER [--model NAME] [--dtype fp32|bf16|fp16]

PATH is a checkpoint (runs/lag/checkpoints/step-00000012) or the folder of a run, whose newest one is then meant.

  inspect   what checkpoints there are, of what, and whether every file is as it was written (--quick: sizes only)
  convert   makes one that any number of processes can go on from; resume=auto then finds it
  export    writes a trained model as a Hugging Face folder; NAME is actor, reward_critic, cost_critic (ppo, ppo-lag) or model
            (sft, dpo, reward, cost). No GPU is needed, whatever the run had.

A run goes on with: saferlhf-fast <stage> <recipe> resume=auto"""


def main(words):
    """Runs one of the commands. words: what follows `checkpoint`."""
    parser = argparse.ArgumentParser(
        prog="saferlhf-fast checkpoint", add_help=False, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("action", choices=("inspect", "convert", "export"))
    parser.add_argument("path")
    parser.add_argument("--output")
    parser.add_argument("--model")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--quick", action="store_true")
    parser.error = _refuse
    try:
        args = parser.parse_args(words)
    except argparse.ArgumentError as error:
        _refuse(error)
    if args.action == "inspect":
        return inspect(Path(args.path).expanduser(), args.quick)
    folder = newest(args.path)
    if args.action == "convert":
        from . import convert

        convert.say(convert.convert(folder, args.output))
        return None
    if not args.output:
        raise UserError("checkpoint export: missing: --output, a new folder for the model")
    from ...runtime import console
    from . import export

    console.say(export.describe_output(export.export(folder, args.output, args.model, args.dtype)))
    return None


def _refuse(message):
    raise UserError(f"checkpoint: {message}; saferlhf-fast checkpoint --help shows the three forms")


def inspect(path, quick):
    """Prints what a checkpoint, or each of a run's, holds; UserError at the end when one is damaged."""
    if manifest.step_of(path) or (path / manifest.NAME).exists():
        folders = [path]
    else:
        folders = [folder for _, folder in manifest.listed(path)]
    if not folders:
        raise UserError(f"{path}: expected a checkpoint, or the folder of a run that has some")
    damaged = []
    for folder in folders:
        lines, why = _describe(folder, quick)
        print("\n".join(lines))
        damaged += [why] if why else []
    if damaged:
        raise UserError(f"{len(damaged)} of {len(folders)} cannot be used: {damaged[0]}")


def _describe(folder, quick):
    """-> (lines about a checkpoint, why it cannot be used or None)."""
    try:
        values = manifest.read(folder)
        why = _sizes(folder, values) if quick else manifest.problem(folder, values)
    except UserError as error:
        return [f"{folder}: {error}"], str(error)
    size = sum(said["bytes"] for said in values["files"].values())
    for_whom = "any number of processes" if values["universal"] else f"{values['world_size']} process(es)"
    state = why or ("sizes are right" if quick else "whole: every SHA-256 is right")
    lines = [
        f"{folder}",
        f"  {values['stage']} step {values['step']}, written {values['written']} by saferlhf-fast "
        f"{values['saferlhf-fast']}, for {for_whom}",
        f"  {len(values['files'])} files, {size / 1e9:.3g} GB: {state}",
    ]
    for name, kind in values["models"].items():
        lines.append(f"  {name}: {kind['weights']:,} weights, ZeRO {kind['zero_stage']}, {kind['precision']}")
    if values.get("score"):
        lines.append(f"  evaluation: {evaluation(values)}")
    return lines, why


def evaluation(values):
    """What a manifest's score says, in words: of ppo and ppo-lag (is feasible, reward or −cost), else one
    metric, −loss.
    """
    from ...runtime.console import number

    score, config = values["score"], values.get("config") or {}
    if len(score) == 1:
        name = (config.get("train") or {}).get("best_metric") or "eval/loss"
        return f"{name.removeprefix('eval/')} {number(-score[0] if 'loss' in name else score[0])}"
    if values["stage"] == "ppo":
        return f"reward {number(score[1])}"
    limit = "the threshold" + (" less the margin" if (config.get("evaluation") or {}).get("margin") else "")
    return (
        f"cost within {limit}, reward {number(score[1])}"
        if score[0]
        else f"cost {number(-score[1])}, above {limit}"
    )


def _sizes(folder, values):
    for name, said in values["files"].items():
        path = Path(folder) / name
        if not manifest.is_inside(name) or not path.is_file() or path.stat().st_size != said["bytes"]:
            return f"{path} is missing or has another size than {said['bytes']} bytes"
    return None
