"""`saferlhf-fast info --cluster`: checks, between all ranks, what a run relies on.

Run it under the run's own launcher.

    torchrun --nnodes 2 --nproc-per-node 8 … -m saferlhf_fast info --cluster --folder /shared/runs

It checks in this order:

1. Every rank shows up within a limit.
2. Versions, GPUs and drivers are equal.
3. Collectives give right sums. Their latency and bandwidth are printed.
4. The clocks agree, or there is a warning.
5. A shared folder is seen and written by all ranks, and a rename in it is atomic.
6. The disk has room, or there is a warning.

The first check that fails ends the program with exit code 1 and "rank 3 (host): reason". Exit code 0 means
that all checks passed.

reports.py has what each rank reports, ranks.py what runs between ranks, shared_folder.py the check of the
folder.
"""

import argparse
import os
from collections.abc import Sequence

from saferlhf_fast.commands.preflight import shared_folder
from saferlhf_fast.commands.preflight.ranks import Ranks, meet, print_reasons
from saferlhf_fast.commands.preflight.reports import EQUAL, compare, report, table, warnings
from saferlhf_fast.config import inputs
from saferlhf_fast.errors import UserError

__all__ = ["EQUAL", "arguments", "compare", "main", "report", "table", "warnings"]


def main(words: Sequence[str]) -> int:
    """Runs the checks in this rank.

    Args:
        words: The words of the command line behind `info`.

    Returns:
        The exit code: 0, or 1 when a check failed in any rank.

    Raises:
        UserError: A word of the command line is wrong.
    """
    args = arguments(words)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = report(args.folder)
    store, reports, reasons = meet(own, rank, world, args.limit) if world > 1 else (None, [own], [])
    reasons = reasons or compare(reports)
    if reasons:
        return print_reasons(reasons, rank)
    ranks = Ranks(store, reports, rank, world, args.limit)
    if rank == 0:
        print("\n".join(table(reports)), flush=True)
    if ranks.failed(ranks.wrong_sum()):
        return 1
    for line in [*ranks.bandwidth(), ranks.clocks()]:
        ranks.say(line)
    if args.folder and ranks.failed(shared_folder.problem(args.folder, ranks)):
        return 1
    if args.folder:
        ranks.say(f"folder {args.folder}: seen and written by all ranks, renames are atomic")
    ranks.say("\n".join(warnings(reports)) or "nothing to warn of")
    return 0


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Reads --folder DIR and --limit SECONDS.

    Returns:
        `folder`, None when it is not given, and `limit` (seconds).

    Raises:
        UserError: There is another word, or a value is wrong.
    """
    parser = argparse.ArgumentParser(prog="saferlhf-fast info", add_help=False, allow_abbrev=False)
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("--folder")
    parser.add_argument("--limit", default="60")
    args, unknown = parser.parse_known_args(words)
    if unknown:
        raise UserError(f"info --cluster takes --folder DIR and --limit SECONDS, got {' '.join(unknown)}")
    if not args.limit.isdigit() or not int(args.limit):
        raise UserError(f"--limit: expected whole seconds from 1 on, got {args.limit}")
    args.limit = int(args.limit)
    if args.folder == "":
        raise UserError("--folder: expected a folder, got an empty text")
    args.folder = inputs.check_home(args.folder, "--folder")
    return args
