"""`saferlhf-fast bench`: runs the kernel benches on this machine, stores the times, finds what became slower.

bench/run.py measures and bench/compare.py compares, as for `make bench` and `make bench-compare`;
bench_request.py reads the command line. This file has the checks of a stored file, and the table. Only the
standard library is imported until something is measured.
"""

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from saferlhf_fast.commands.bench_request import BENCH, Request, help_text, known_ops, request
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import disk

__all__ = ["BENCH", "Request", "help_text", "known_ops", "main", "request"]

Results = dict[str, Any]
"""A results file of pytest-benchmark, read."""
Key = tuple[str, str, str]
"""(op, shape, version)."""
Ratios = Mapping[Key, Mapping[str, float]]
"""{key: {what the time is divided by: ratio}}, as `compare.ratios` returns it."""

TRIES = 2  # how often what seems slower is measured again
TURNS = {True: 3, False: 2}  # of every row, for small shapes and for the usual ones


# ---------------------------------------------------------------- the stored file


def op_of(entry: Mapping[str, Any]) -> str:
    """Returns the op whose bench wrote an entry of a results file."""
    return Path(entry["fullname"].partition("::")[0]).stem.removeprefix("bench_")


def stored(path: Path, ops: Collection[str] | None) -> Results:
    """Reads a results file.

    Args:
        path: The file.
        ops: The ops whose entries are wanted; None: all.

    Raises:
        UserError: The file does not exist, is not a results file, or has no entry of `ops`.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; saferlhf-fast bench --save {path} writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: expected a file of saferlhf-fast bench --save, got one that cannot be read: {error}"
        ) from error
    try:
        machine, entries = (
            results["machine_info"],
            [entry for entry in results["benchmarks"] if "op" in entry["extra_info"]],
        )
        if not isinstance(machine["device"], str):
            raise UserError(f"{path}: machine_info.device: expected a name, got {machine['device']!r}")
        for entry in entries:
            _check_entry(path, entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected a file of saferlhf-fast bench --save, got another one "
            f"({type(error).__name__}: {error})"
        ) from error
    wanted = [entry for entry in entries if ops is None or op_of(entry) in ops]
    if not wanted:
        raise UserError(
            f"{path} has no rows in common with this run: expected {', '.join(ops or known_ops())}, "
            f"got {', '.join(sorted({op_of(entry) for entry in entries})) or 'none'}"
        )
    return {**results, "benchmarks": wanted}


def _check_entry(path: Path, entry: Mapping[str, Any]) -> None:
    """Checks an entry of a results file, and takes the smaller of its two figures as its best time."""
    row = entry["extra_info"]
    texts = {"fullname": entry["fullname"], **{name: row[name] for name in ("op", "shape", "version")}}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f"{path}: {name} of an entry: expected a text, got {value!r}")
    if not (isinstance(row["best"], (int, float)) and 0 < row["best"] < math.inf):
        raise UserError(
            f"{path}: {row['op']}, {row['shape']}, {row['version']}: expected a time above 0, "
            f"got {row['best']}"
        )
    # On a CPU pytest-benchmark's own figure is the same one; where a file was edited, either counts.
    host = entry["stats"].get("min", math.inf) if row.get("device") == "cpu" else math.inf
    row["best"] = min(row["best"], host) if isinstance(host, float) and host > 0 else row["best"]


def refuse_unwritable(path: Path, force: bool) -> None:
    """Raises UserError, before anything is measured, when the results could not be written.

    Args:
        path: Where they would be written.
        force: Whether an existing file may be overwritten.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--save {path}: expected a file in a folder that exists")
    if path.exists() and not force:
        raise UserError(f"--save {path}: exists already; --force overwrites it")


# ---------------------------------------------------------------- measuring


def main(words: Sequence[str]) -> int:
    """Runs `saferlhf-fast bench WORDS`.

    Returns:
        The exit code: 0, or 1 when something became slower or a version failed.

    Raises:
        UserError: A word, or the stored file, is wrong.
    """
    options = request(words)
    if options.save:
        refuse_unwritable(options.save, options.force)
    base = stored(options.compare, options.ops) if options.compare else None
    quick = options.quick
    if base is not None:
        quick = bool(base["machine_info"].get("quick"))
        if options.quick and not quick:
            raise UserError(f"--quick: {options.compare} was measured without it; its shapes are others")
    ops = options.ops or (
        known_ops() if base is None else sorted({op_of(entry) for entry in base["benchmarks"]})
    )
    if missing := sorted(set(ops) - set(known_ops())):
        raise UserError(
            f"{options.compare}: expected ops of {', '.join(known_ops())}, got {', '.join(missing)}"
        )
    os.environ.update(
        BENCH_QUICK=str(int(quick)),
        BENCH_TURNS=str(TURNS[quick]),
        BENCH_PROGRESS="1",
        BENCH_COMMAND=" ".join(["saferlhf-fast bench", *words]),
    )
    sys.path.insert(0, str(BENCH))
    ceilings, table = _bench_module("ceilings"), _bench_module("table")

    if base is not None:
        refuse_other_device(options, base, ceilings.device_name())
        refuse_nothing_to_compare(options, base)
    print(
        f"measuring {', '.join(ops)} on {ceilings.device_name()}{', small shapes' if quick else ''}",
        file=sys.stderr,
    )
    results, failed = measured(["--ours", *(f"bench_{op}.py" for op in ops)])
    if results is None:
        raise RuntimeError(f"nothing was measured: {failed}")
    if base is None:
        print("\n".join(table.table(results, with_targets=False)))
        code = 0
    else:
        code = compared(options, base, results)
    for line in failed:
        print(f"failed: {line}")
    if options.save and failed:
        print(f"{options.save} was not written: not every version gave right results", file=sys.stderr)
    elif options.save:
        save(options.save, results)
    return 1 if failed else code


def _bench_module(name: str) -> Any:
    """Imports a file of bench/, which `main` puts on the search path."""
    return import_module(name)


def refuse_other_device(options: Request, base: Results, device: str) -> None:
    """Raises UserError for the file of another device or number of threads, unless --force is given.

    Args:
        options: The command line.
        base: The stored results.
        device: The name of this machine's device.
    """
    other = base["machine_info"]["device"]
    if other != device and not options.force:
        raise UserError(
            f"{options.compare}: expected results of {device}, got those of {other}; --force compares all "
            f"the same"
        )


def comparable(ratios: Ratios) -> list[Key]:
    """Returns the keys with a ratio that counts.

    Keys without eager torch's time whose ratio to the floor is large are left out.
    """
    compare = _bench_module("compare")
    return [
        key
        for key, row in ratios.items()
        if any(against != "the floor" or ratio < compare.NEAR for against, ratio in row.items())
    ]


def refuse_nothing_to_compare(options: Request, base: Results) -> None:
    """Raises UserError, before anything is measured, for a file in which nothing can be found slower.

    Args:
        options: The command line.
        base: The stored results.
    """
    compare = _bench_module("compare")
    was = compare.ratios(base, options.times)
    if not comparable(was):
        rows = f"{len(was)} rows of saferlhf-fast without either" if was else "no row of saferlhf-fast"
        raise UserError(
            f"{options.compare}: expected times of saferlhf-fast and, to compare them with, of eager torch "
            f"or a floor near them, got {rows}; "
            f"{'' if options.times or not was else '--times compares the times themselves; '}"
            "saferlhf-fast bench --save writes a whole file"
        )


def measured(arguments: Sequence[str]) -> tuple[Results | None, list[str]]:
    """Runs the benches once.

    Args:
        arguments: Bench files and options, as for bench/run.py.

    Returns:
        The results, or None when nothing was measured, and a line for each bench that failed.
    """
    run = _bench_module("run")
    with tempfile.TemporaryDirectory() as scratch:
        path, log = Path(scratch) / "results.json", Path(scratch) / "log"
        with log.open("w", encoding="utf-8") as file:
            code = run.measure(path, arguments, file)
        lines = log.read_text(encoding="utf-8").splitlines()
        results = json.loads(path.read_text()) if path.exists() and path.stat().st_size else None
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if code and not failed:
        failed = [line for line in lines if line.strip()][-1:] or [f"pytest ended with {code}"]
    return results, failed


def save(path: Path, results: Results) -> None:
    """Writes results; a file that exists stays whole until the new one is complete."""
    disk.write_text(path, json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")


# ---------------------------------------------------------------- comparing


def compared(options: Request, base: Results, results: Results) -> int:
    """Prints where both results come from, and the table of their ratios.

    Args:
        options: The command line, with `compare`.
        base: The stored results.
        results: The fresh ones.

    Returns:
        The exit code: 1 when something became slower or was not measured any more.
    """
    compare = _bench_module("compare")
    assert options.compare is not None, "only called with a file to compare with"
    was = compare.ratios(base, options.times)
    if not was.keys() & compare.ratios(results).keys():
        raise UserError(
            f"{options.compare} has no rows in common with this run: expected shapes as in "
            f"{', '.join(next(iter(compare.ratios(results)), ('no rows',)))}, got "
            f"{', '.join(next(iter(was), ('no rows',)))}"
        )
    now, worse, gone = compare.settled(
        was,
        results,
        lambda arguments: measured(arguments)[0],
        options.compare.name,
        1 + options.worse / 100,
        TRIES,
        options.times,
    )
    lines = outcome_lines(was, now, worse, gone, options.worse, len(comparable(was)))
    print("\n".join([*head(options.compare.name, base, results, compare.rows), "", *lines]))
    return 1 if worse or gone else 0


def head(
    name: str, base: Results, results: Results, rows: Callable[[Results], Mapping[Key, Mapping[str, Any]]]
) -> list[str]:
    """Returns the lines that say what is compared, and what else differs between the two.

    Args:
        name: The stored file's name.
        base: The stored results.
        results: The fresh ones.
        rows: `compare.rows`.
    """
    then, now = base["machine_info"], results["machine_info"]
    lines = [
        f"{label}: {machine.get('device')}; saferlhf-fast {machine.get('version', 'not noted')} "
        f"({machine.get('commit', 'not noted')}), torch {machine.get('torch', 'not noted')}, "
        f"{machine.get('date', 'not noted')}"
        for label, machine in ((name, then), ("now", now))
    ]
    for what in ("device", "torch", "version"):
        if then.get(what) != now.get(what):
            lines.append(
                f"differs: {'saferlhf-fast' if what == 'version' else what}: {then.get(what)} then, "
                f"{now.get(what)} now"
            )
    before, after = rows(base), rows(results)
    eager = [after[key]["best"] / before[key]["best"] for key in before if key[2] == "eager" and key in after]
    if eager:
        lines.append(
            f"eager torch takes {statistics.median(eager):.2f} x what it took then: the machine or its load, "
            "which ratios leave out, or eager torch itself, which they do not"
        )
    return lines


def outcome_lines(
    was: Ratios,
    now: Ratios,
    worse: Sequence[Any],
    gone: Sequence[Key],
    percent: float,
    compared: int,
) -> list[str]:
    """Returns the table's lines, regressions on top, and a last line that sums up.

    Args:
        was: The stored ratios.
        now: The fresh ones.
        worse: The ratios that became worse (`compare.Regression`).
        gone: The keys that were not measured any more.
        percent: How many per cent count as slower.
        compared: How many keys of `was` have a ratio that counts.
    """
    regressions = {(row.key, row.against) for row in worse}
    lines: list[tuple[str, ...]] = []
    for key in {**was, **now}:
        for against in {**was.get(key, {}), **now.get(key, {})}:
            before, after = was.get(key, {}).get(against), now.get(key, {}).get(against)
            outcome = (
                "REGRESSION" if (key, against) in regressions else _outcome(before, after, 1 + percent / 100)
            )
            change = f"{after / before - 1:+.1%}" if before and after else ""
            lines.append(
                (*key, against, *("" if x is None else f"{x:.4g}" for x in (before, after)), change, outcome)
            )
    order = {"REGRESSION": 0, "GONE": 1}
    lines.sort(key=lambda line: (order.get(line[-1], 2), line))
    lines = [("op", "shape", "version", "time over", "was", "now", "change", "verdict"), *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    ]
    slower = len({key for key, _ in regressions})
    summary = [f"{slower} of {compared} rows became slower by more than {percent:g} %"] if slower else []
    summary += [f"{len(gone)} were not measured any more"] if gone else []
    summary = summary or [f"no regression past {percent:g} % in {compared} row{'s' * (compared != 1)}"]
    if compared < len(was):
        summary.append(f"{len(was) - compared} could not be compared: no eager torch in that file")
    return [*text, "", "; ".join(summary)]


def _outcome(before: float | None, after: float | None, limit: float) -> str:
    """Returns the outcome for a ratio that is no regression. limit: from which factor on it counts."""
    if after is None:
        return "GONE"
    if before is None:
        return "new"
    if after > before * limit:
        return "not counted"
    return "faster" if after < before / limit else "same"
