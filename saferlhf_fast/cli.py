"""The command line: saferlhf-fast COMMAND [recipe.yaml] [key=value …] [--key value …] [--debug].

This file and `info` need the standard library only. Before torch is imported the command line checks a
stage's settings, whether its models and data exist in a form that can be read, and its output, so a mistake
in them ends the command in well under two seconds. What the data contains is checked when it is read, with
torch but before a model is trained or an output is written. Exit codes: 0 success, 1 a bug in this package
(or a regression that `bench` found), 2 bad input or a disk that takes no files, 130 interrupted, 143 or 138
stopped by SIGTERM or SIGUSR1 after a checkpoint.
"""

import argparse
import atexit
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from saferlhf_fast.config.overrides import split_words
from saferlhf_fast.config.stage_table import DEMO, JUDGE, MODERATION, RUN, STAGE_SPECS, WITH_SETTINGS
from saferlhf_fast.errors import EXIT_CODE, DiskError, UserError, require
from saferlhf_fast.runtime import preemption, terminal
from saferlhf_fast.version import __version__

COMMANDS = {
    **{name: spec.help for name, spec in STAGE_SPECS.items()},
    **{name: spec.help for name, spec in (MODERATION | JUDGE).items()},
    "run": RUN.help,
    "data": "inspect data sets, convert them to other forms, split them by prompt",
    "plan": "what a recipe needs in memory on each GPU, and which settings make it fit, before anything is "
    "loaded",
    "checkpoint": "look at a run's checkpoints, convert them for other numbers of processes, export their "
    "models",
    "demo": DEMO.help,
    "bench": "measure the kernels on this machine, keep the figures, fail when one has become slower",
    "info": "versions, device, and which implementation of each op runs here and why",
}

NEEDED = (
    "pydantic",
    "omegaconf",
    "yaml",
    "rich",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "deepspeed",
)

TOP_HELP = """usage: saferlhf-fast COMMAND [recipe.yaml] [key=value …] [--key value …] [--debug]

Safe RLHF from instruction data to a policy that is helpful and safe, stage by stage:

{commands}

examples:
  saferlhf-fast demo                                             see the whole loop work, from nothing
  saferlhf-fast sft model=DIR data=FILE output=DIR               one stage, without a recipe
  saferlhf-fast run quickstart sft.train.max_steps=10            a shipped recipe, one setting changed
  saferlhf-fast ppo-lag --help                                   every setting of a stage, with its default
  saferlhf-fast bench --quick                                    how fast the kernels are here, on small
  shapes

options:
  -h, --help     this text, or a command's settings
  --version      the version
  --debug        show the traceback of an error
  --processes N  start N processes on this machine; default: one for each GPU, one on a CPU
                 (docs/multi-node.md: more machines)
  --grace S      seconds that they get after SIGTERM or SIGUSR1 to end their step and write a checkpoint;
                 default: 120
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after `saferlhf-fast`; None for those of this process.

    Returns:
        The exit code.
    """
    is_program, argv = argv is None, sys.argv[1:] if argv is None else list(argv)
    with terminal.outliving_full_disks() as lost:
        terminal.make_readable(sys.stdout, sys.stderr)
        code = _main(argv)
        # what a run prints is its log; what another command prints is its result
        if lost() and code == 0 and (not {*WITH_SETTINGS} & {*argv} or {"-h", "--help"} & {*argv}):
            print("error: standard output was not written: its disk takes no files", file=sys.stderr)
            code = EXIT_CODE
        return _end_rank(code) if is_program else code


def _end_rank(code: int) -> int:
    """Ends the process if it is a rank of several; else returns the exit code.

    A regular exit takes apart the process group while its threads still run, which aborts a rank now and then
    ("terminate called without an active exception") after all its work is done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return code
    if distributed.get_world_size() == 1:
        return code
    from saferlhf_fast.runtime import watchdog

    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()  # trackers send what is left, folders are released
    return watchdog.leave(code)


def _main(argv: list[str]) -> int:
    """As `main`, with output that can be written."""
    parser = argparse.ArgumentParser(prog="saferlhf-fast", add_help=False, allow_abbrev=False)
    parser.add_argument("command", nargs="?")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--processes", nargs="?", const="")
    parser.add_argument("--grace", nargs="?", const="")
    # deepspeed's launcher adds it; LOCAL_RANK says it too
    parser.add_argument("--local_rank", "--local-rank", nargs="?")
    args, words = parser.parse_known_args(argv)
    if args.version:
        print(f"saferlhf-fast {__version__}")
        return 0
    if args.command == "help":  # help sft: sft --help
        args.command, args.help = words.pop(0) if words else None, True
    if args.command is None:
        print(_top_help())
        return 0 if args.help else EXIT_CODE
    try:
        code = _dispatch(args, words, argv)
        _end_watchdog()
        return code
    except DiskError as e:
        return _failed_by_disk(e, args, words, argv)
    except UserError as e:
        return _failed(e, EXIT_CODE, f"error: {_one_line(e)}", args.debug)
    except KeyboardInterrupt as e:
        return _failed(e, 130, "interrupted")
    except preemption.Preempted as e:  # after a checkpoint: no fault
        if os.environ.get("RANK", "0") == "0":
            print(e, file=sys.stderr)
        _end_watchdog(limit=20)
        assert isinstance(e.code, int), f"a preempted run ends with a number, got {e.code!r}"
        return e.code
    except SystemExit:
        _end_watchdog(limit=20)
        raise
    except BrokenPipeError as e:  # `saferlhf-fast info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _failed(e, 0, "")
    except Exception as e:
        from saferlhf_fast.commands import disk_failure

        disk_error = disk_failure.of_command(e)
        if disk_error is not None:
            return _failed_by_disk(disk_error, args, words, argv)
        hint = (
            "" if args.debug else "; ".join(["", *getattr(e, "__notes__", ["--debug shows the traceback"])])
        )
        return _failed(e, 1, f"bug: {type(e).__name__}: {_one_line(e)}{hint}", args.debug)


def _failed_by_disk(error: DiskError, args: argparse.Namespace, words: list[str], argv: Sequence[str]) -> int:
    """As `_failed`, for a disk: no mistake of the user's, so the line ends with the command that goes on."""
    from saferlhf_fast.commands import disk_failure

    line = f"error: {_one_line(error)}{disk_failure.continuation(args.command, words, argv)}"
    return _failed(error, EXIT_CODE, line, args.debug)


def _end_watchdog(limit: float | None = None) -> None:
    """Ends the watchdog over other ranks, if there is one: this rank is done. limit: seconds at most."""
    if "saferlhf_fast.runtime.watchdog" in sys.modules:
        sys.modules["saferlhf_fast.runtime.watchdog"].end(limit)


def _failed(error: BaseException, code: int, line: str, debug: bool = False) -> int:
    """Says in one line why this process ends, or which other rank is to blame; returns the exit code."""
    if debug:
        traceback.print_exc()
    watchdog = sys.modules.get("saferlhf_fast.runtime.watchdog")
    blame = watchdog.failed(error, code) if watchdog else None
    if watchdog is None or blame is None:
        if line and os.environ.get("LOCAL_RANK", "0") != "0":
            # settings are as wrong for the machine's first rank: its launcher ends this one for it
            time.sleep(2)
        if line:
            _complain(line)
        return code
    other_line, code = blame
    if other_line is None and line:
        _complain(line)
    elif other_line:
        print(other_line, file=sys.stderr)
    return watchdog.leave(code)  # which ends the process


def _dispatch(args: argparse.Namespace, words: list[str], argv: Sequence[str]) -> int:
    """Runs a command.

    Args:
        args: The options of the command line.
        words: What follows the command, without those options.
        argv: The whole command line, for the processes that the command may start.

    Returns:
        The exit code.
    """
    if args.command == "moderation":
        require("moderation", "train", *NEEDED)
        words = _moderation_verb(args, words)
    if f"{args.command} {(words or [''])[0]}" in JUDGE:
        args.command = f"{args.command} {words.pop(0)}"
    command, wants_help = args.command, args.help
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{_guess(command)}; saferlhf-fast --help lists them")
    cluster_check = command == "info" and "--cluster" in words
    if not cluster_check and not wants_help:
        _refuse_processes(command, args)
    if cluster_check and not wants_help:
        from saferlhf_fast.commands import preflight
        from saferlhf_fast.runtime import launcher, process_environment

        process_environment.adopt()
        processes = launcher.wanted(args.processes, lambda: preflight.arguments(words))
        return preflight.main(words) if processes == 1 else launcher.start(argv, processes, args.grace)
    if command == "info":
        if words and not wants_help:
            raise UserError(f"info takes no settings but --cluster and its own, got {' '.join(words)}")
        from saferlhf_fast.commands import info

        print(info.HELP if wants_help else info.text())
        return 0
    if command == "bench":
        require("bench", "bench", "torch", "pytest", "pytest_benchmark")
        from saferlhf_fast.commands import bench

        if not wants_help:
            return bench.main(words)
        print(bench.help_text())
        return 0
    require(command, "train", *NEEDED)
    if command == "checkpoint":
        from saferlhf_fast.commands.checkpoint import cli

        print(cli.HELP) if wants_help else cli.main(words)
        return 0
    if command == "data":
        from saferlhf_fast.commands.data import cli as data_cli

        print(data_cli.help_text()) if wants_help else data_cli.main(words)
        return 0
    if command == "plan":
        from saferlhf_fast.commands import plan

        print(plan.help_text()) if wants_help else plan.main(words)
        return 0
    if command in MODERATION and not wants_help:
        from saferlhf_fast.commands import moderation

        moderation.main(command, words)
        return 0
    if command in JUDGE and not wants_help:
        from saferlhf_fast.commands import judge

        judge.main(command, words)
        return 0
    return _run_with_settings(args, words, argv)


def _moderation_verb(args: argparse.Namespace, words: list[str]) -> list[str]:
    """Takes the verb after `moderation`, completes the command by it, and returns the other words.

    Settings without a verb are those of the stage, moderation train, as with every other stage.
    """
    verbs = ["train", *(name.partition(" ")[2] for name in MODERATION)]
    verb = words[0] if words else None
    if verb in verbs:
        if verb != "train":
            args.command = f"moderation {verb}"
        return words[1:]
    if verb is None and args.help:
        return words
    if verb is None or not ("=" in verb or verb.startswith("-") or verb.endswith((".yaml", ".yml"))):
        raise UserError(f"moderation: expected {', '.join(verbs)} after it, got {verb or 'nothing'}")
    return words


def _refuse_processes(command: str, args: argparse.Namespace) -> None:
    """Raises UserError for --processes or --grace with a command that runs in one process."""
    from saferlhf_fast.runtime import launcher

    if command in launcher.COMMANDS:
        return
    for option, value in (("--processes", args.processes), ("--grace", args.grace)):
        if value is not None:
            raise UserError(
                f"{option}: {command} runs in one process"
                + ("; info --cluster runs in several" if command == "info" else "")
            )


def _run_with_settings(args: argparse.Namespace, words: list[str], argv: Sequence[str]) -> int:
    """Runs a stage, a recipe or the demo, or starts the processes that do; returns the exit code."""
    from saferlhf_fast.config import schema

    command = args.command
    if args.help:
        print(schema.help_text(command))
        return 0
    recipe, overrides = split_words(command, words)
    if command == "run" and recipe is None:  # below, a recipe that is None is of another command
        raise UserError("run: missing: a recipe, e.g. saferlhf-fast run quickstart")
    from saferlhf_fast.commands import run
    from saferlhf_fast.config import load
    from saferlhf_fast.runtime import launcher, process_environment

    if command in launcher.COMMANDS:
        process_environment.adopt()
        processes = launcher.wanted(args.processes, lambda: _check(command, recipe, overrides))
        if processes > 1:
            return launcher.start(argv, processes, args.grace)
    if command == "run" and recipe is not None:
        run.run(recipe, overrides)
    else:
        run.run_stage(command, load.load(command, recipe, overrides))
    return 0


def _check(command: str, recipe: str | None, overrides: dict[str, Any]) -> None:
    """Raises the UserErrors that a stage, or `run`, would raise before it imports torch."""
    from saferlhf_fast.commands import run
    from saferlhf_fast.config import checks, load
    from saferlhf_fast.runtime import run_folder

    if command == "run" and recipe is not None:
        run.plan(recipe, overrides)
        return
    cfg = load.load(command, recipe, overrides)
    checks.check(command, cfg)
    run_folder.check_output(command, cfg)


def _top_help() -> str:
    width = max(map(len, COMMANDS))
    return TOP_HELP.format(commands="\n".join(f"  {name:{width}}  {line}" for name, line in COMMANDS.items()))


def _guess(command: str) -> str:
    import difflib

    close = difflib.get_close_matches(command, COMMANDS, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _complain(line: str) -> None:
    process = os.environ.get("RANK", "0")
    print(line if process == "0" else f"[rank {process}] {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
