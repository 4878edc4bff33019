"""The command line: saferlhf-fast COMMAND [recipe.yaml] [key=value …] [--key value …] [--debug].

This file and `info` need the standard library only. A stage's settings, whether its models and data are there
and of a kind that can be read, and its output are checked before torch is imported, so a mistake in them ends
in well under two seconds; what the data holds is seen when it is read, with torch but before a model is
trained or an output is touched. Exit codes: 0 done, 1 a bug of ours (or a regression that `bench` found), 2
bad input, 130 interrupted, 143 or 138 stopped by SIGTERM or SIGUSR1 after a checkpoint.
"""

import argparse
import os
import sys
import time
import traceback

from saferlhf_fast.config.overrides import split_words
from saferlhf_fast.config.stage_table import DEMO, RUN, STAGE_SPECS
from saferlhf_fast.errors import EXIT_CODE, UserError, require
from saferlhf_fast.runtime import preemption
from saferlhf_fast.version import __version__

COMMANDS = {
    **{name: spec.help for name, spec in STAGE_SPECS.items()},
    "run": RUN.help,
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
  saferlhf-fast bench --quick                                    how fast the kernels are here, on small shapes

options:
  -h, --help     this text, or a command's settings
  --version      the version
  --debug        show the traceback of an error
  --processes N  start N processes on this machine; default: one for each GPU, one on a CPU (docs/multi-node.md: more machines)
  --grace S      seconds that they get after SIGTERM or SIGUSR1 to end their step and write a checkpoint; default: 120
"""


def main(argv=None):
    """Runs one command and returns the exit code."""
    parser = argparse.ArgumentParser(prog="saferlhf-fast", add_help=False, allow_abbrev=False)
    parser.add_argument("command", nargs="?")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--processes", nargs="?", const="")
    parser.add_argument("--grace", nargs="?", const="")
    # deepspeed's launcher adds it; LOCAL_RANK says it too
    parser.add_argument("--local_rank", "--local-rank", nargs="?")
    argv = sys.argv[1:] if argv is None else list(argv)
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
        return _done(_dispatch(args, words, argv))
    except UserError as e:
        return _failed(e, EXIT_CODE, f"error: {_one_line(e)}", args.debug)
    except KeyboardInterrupt as e:
        return _failed(e, 130, "interrupted")
    except preemption.Preempted as e:  # after a checkpoint: no fault
        if os.environ.get("RANK", "0") == "0":
            print(e, file=sys.stderr)
        return _done(e.code, limit=20)
    except SystemExit:
        _done(None, limit=20)
        raise
    except BrokenPipeError as e:  # `saferlhf-fast info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _failed(e, 0, "")
    except Exception as e:
        hint = (
            "" if args.debug else "; ".join(["", *getattr(e, "__notes__", ["--debug shows the traceback"])])
        )
        return _failed(e, 1, f"bug: {type(e).__name__}: {_one_line(e)}{hint}", args.debug)


def _done(code, limit=None):
    """Ends the watch over other ranks, where there is one: this one is done. Returns the exit code."""
    if "saferlhf_fast.runtime.watchdog" in sys.modules:
        sys.modules["saferlhf_fast.runtime.watchdog"].end(limit)
    return code


def _failed(error, code, line, debug=False):
    """Says in one line why this process ends, or which other rank is to blame; returns the exit code."""
    if debug:
        traceback.print_exc()
    watch = sys.modules.get("saferlhf_fast.runtime.watchdog")
    blame = watch.failed(error, code) if watch else None
    if blame is None:
        if line and os.environ.get("LOCAL_RANK", "0") != "0":
            # settings are as wrong for the machine's first rank: its launcher ends this one for it
            time.sleep(2)
        if line:
            _complain(line)
        return code
    said, code = blame
    if said is None and line:
        _complain(line)
    elif said:
        print(said, file=sys.stderr)
    watch.leave(code)


def _dispatch(args, words, argv):
    """Runs a command and returns the exit code. argv: the whole command line, for the processes that it may
    start.
    """
    command, wants_help = args.command, args.help
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{_guess(command)}; saferlhf-fast --help lists them")
    from saferlhf_fast.runtime import launcher, process_environment

    cluster_check = command == "info" and "--cluster" in words
    if command not in launcher.COMMANDS and not cluster_check and not wants_help:
        for option, value in (("--processes", args.processes), ("--grace", args.grace)):
            if value is not None:
                raise UserError(
                    f"{option}: {command} runs in one process"
                    + ("; info --cluster runs in several" if command == "info" else "")
                )
    if cluster_check and not wants_help:
        from saferlhf_fast.commands import preflight

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
    if command == "plan":
        from saferlhf_fast.commands import plan

        print(plan.help_text()) if wants_help else plan.main(words)
        return 0
    from saferlhf_fast.config import schema

    if wants_help:
        print(schema.help_text(command))
        return 0
    recipe, overrides = split_words(command, words)
    if command == "run" and recipe is None:
        raise UserError("run: missing: a recipe, e.g. saferlhf-fast run quickstart")
    from saferlhf_fast.commands import run
    from saferlhf_fast.config import load

    if command in launcher.COMMANDS:
        process_environment.adopt()
        processes = launcher.wanted(args.processes, lambda: _check(command, recipe, overrides))
        if processes > 1:
            return launcher.start(argv, processes, args.grace)
    if command == "run":
        run.run(recipe, overrides)
    else:
        run.run_stage(command, load.load(command, recipe, overrides))
    return 0


def _check(command, recipe, overrides):
    """Refuses what a stage, or `run`, would refuse before it imports torch."""
    from saferlhf_fast.commands import run
    from saferlhf_fast.config import checks, load
    from saferlhf_fast.runtime import run_folder

    if command == "run":
        run.plan(recipe, overrides)
        return
    cfg = load.load(command, recipe, overrides)
    checks.check(command, cfg)
    run_folder.check_output(command, cfg)


def _top_help():
    width = max(map(len, COMMANDS))
    return TOP_HELP.format(commands="\n".join(f"  {name:{width}}  {line}" for name, line in COMMANDS.items()))


def _guess(command):
    import difflib

    close = difflib.get_close_matches(command, COMMANDS, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(error):
    return " ".join(str(error).split())


def _complain(line):
    process = os.environ.get("RANK", "0")
    print(line if process == "0" else f"[rank {process}] {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
