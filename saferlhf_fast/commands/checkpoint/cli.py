"""The command line of `saferlhf-fast checkpoint inspect | convert | export`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...errors import UserError
from ...runtime.checkpoint import manifest
from .verify import newest

HELP = """usage: saferlhf-fast checkpoint inspect PATH [--quick]
       saferlhf-fast checkpoint convert PATH [--output FOLDER]
       saferlhf-fast checkpoint export  PATH --output FOLDER [--model NAME] [--dtype fp32|bf16|fp16]

PATH is a checkpoint (runs/lag/checkpoints/step-00000012) or the folder of a run, which stands for its newest
checkpoint.

  inspect   lists the checkpoints, says what each holds, and checks that every file is as it was written;
            --quick checks only sizes
  convert   writes a checkpoint from which any number of processes can resume; resume=auto then finds it
  export    writes a trained model as a Hugging Face folder. NAME is actor, reward_critic or cost_critic (ppo,
            ppo-lag), or model (sft, dpo, reward, cost). No GPU is needed, whatever the run used.

A run is resumed with: saferlhf-fast <stage> <recipe> resume=auto"""


def main(words: Sequence[str]) -> None:
    """Runs one of the commands.

    Args:
        words: What follows `checkpoint` on the command line.

    Raises:
        UserError: A word is wrong, or the checkpoint cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="saferlhf-fast checkpoint", add_help=False, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("action", choices=("inspect", "convert", "export"))
    parser.add_argument("path")
    parser.add_argument("--output")
    parser.add_argument("--model")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--quick", action="store_true")
    parser.error = _refuse  # type: ignore[method-assign]  # it prints usage and exits by itself
    try:
        args = parser.parse_args(words)
    except argparse.ArgumentError as error:
        _refuse(str(error))
    if args.action == "inspect":
        inspect(Path(args.path).expanduser(), args.quick)
        return
    folder = newest(args.path)
    if args.action == "convert":
        from . import convert

        convert.say(convert.convert(folder, args.output))
        return
    if not args.output:
        raise UserError("checkpoint export: missing: --output, a new folder for the model")
    from ...runtime import console
    from . import export

    console.say(export.describe_output(export.export(folder, args.output, args.model, args.dtype)))


def _refuse(message: str) -> NoReturn:
    raise UserError(f"checkpoint: {message}; saferlhf-fast checkpoint --help shows the three forms")


def inspect(path: Path, quick: bool) -> None:
    """Prints what a checkpoint holds, or each checkpoint of a run.

    Args:
        path: The folder of a checkpoint, or of a run.
        quick: Whether to check sizes only, instead of every file's SHA-256.

    Raises:
        UserError: There is no checkpoint, or, after all are printed, one is damaged.
    """
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


def _describe(folder: Path, quick: bool) -> tuple[list[str], str | None]:
    """Returns lines about a checkpoint, and why it cannot be used, or None."""
    try:
        values = manifest.read(folder)
        why = _sizes(folder, values) if quick else manifest.problem(folder, values)
    except UserError as error:
        return [f"{folder}: {error}"], str(error)
    size = sum(entry["bytes"] for entry in values["files"].values())
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


def evaluation(values: Mapping[str, Any]) -> str:
    """Writes a manifest's score in words.

    The score of ppo and ppo-lag is (is feasible, reward or −cost); that of other stages is one metric,
    negated for a loss.
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


def _sizes(folder: Path, values: Mapping[str, Any]) -> str | None:
    """Returns which file of a checkpoint has a wrong size, or None."""
    for name, entry in values["files"].items():
        path = Path(folder) / name
        if not manifest.is_inside(name) or not path.is_file() or path.stat().st_size != entry["bytes"]:
            return f"{path} is missing or has another size than {entry['bytes']} bytes"
    return None
