"""`saferlhf-fast bench`: the kernel benches of bench/ on this machine; keeps their figures and finds what
became slower.

Measuring and comparing are bench/run.py and bench/compare.py, as `make bench` and `make bench-compare` use
them; here are the command line, the checks of a stored file, and the table. Standard library only until
something is measured.
"""

import difflib
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from saferlhf_fast.errors import UserError

HELP = """usage: saferlhf-fast bench [--ops OP …] [--quick] [--save FILE] [--compare FILE] [--worse P] [--times] [--force]

Measures every op of this machine's device: our implementations and eager torch, on random data, each result checked against
float64 before it is timed. Prints a table. Needs pytest and pytest-benchmark: pip install 'saferlhf-fast[bench]'

  --ops OP …      these ops alone: {ops}
  --quick         small shapes, seconds for an op; noisier: take a larger --worse
  --save FILE     also writes the results (JSON); an existing file is kept unless --force
  --compare FILE  measures what FILE has again and compares; exit code 1 when something became slower
  --worse P       per cent that count as slower; default: 10
  --times         compares the times themselves too: only on a machine that does nothing else
  --force         overwrites; compares with another device's file

What is compared is a version's time over that of eager torch in the same run (and over the floor of the machine's memory
bandwidth, where it is near): a machine that is busy or slower today slows both and leaves the ratio as it is. A slower kernel
raises it, and so does a faster eager torch, as an update of torch may bring: the head of the table says what eager torch took.
The fastest round counts. What seems worse is measured up to twice more, and the best measurement counts. A version that FILE
has and that does not run any more fails too. Keep one file for each machine and number of threads; other versions are named.

exit codes: 0 nothing became slower, 1 something did (or gave wrong results), 2 bad input

examples:
  saferlhf-fast bench --quick --ops gae token_logprob      a first look, in seconds
  saferlhf-fast bench --save base.json                     before an update of torch, a driver or saferlhf-fast
  saferlhf-fast bench --compare base.json                  after it
  saferlhf-fast bench --compare base.json --worse 5 --ops ppo_lag_advantage"""

HERE = Path(__file__).resolve().parents[1]
BENCH = (HERE / "bench").resolve()
TRIES = 2  # how often what seems slower is measured again
TURNS = {True: 3, False: 2}  # of every row, for small shapes and for the usual ones


class Request(NamedTuple):
    """What the command line asks for. ops: None means all, or those of the stored file."""

    ops: list[str] | None = None
    quick: bool = False
    save: Path | None = None
    compare: Path | None = None
    worse: float = 10.0
    times: bool = False
    force: bool = False


def known_ops():
    """Names of the ops that have a bench."""
    return sorted(
        room.parent.name
        for room in (HERE / "kernels").glob("*/__init__.py")
        if (BENCH / f"bench_{room.parent.name}.py").is_file()
    )


def help_text():
    """`saferlhf-fast bench --help`."""
    return HELP.format(ops=", ".join(known_ops()).replace(", ppo_lag", ",\n                  ppo_lag", 1))


# ---------------------------------------------------------------- what is asked for


def request(words):
    """Words of the command line -> Request. UserError for what bench does not take."""
    asked, rest = {}, list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        key = name.removeprefix("--")
        if not name.startswith("--") or key not in Request._fields:
            raise UserError(
                f"bench: expected one of {', '.join(f'--{field}' for field in Request._fields)}, got {name}"
            )
        if key in asked:
            raise UserError(f"bench: --{key} is given twice")
        if key in ("quick", "times", "force"):
            if equals:
                raise UserError(f"bench: --{key} takes no value, got {value}")
            asked[key] = True
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--") and (key == "ops" or not values):
            values.append(rest.pop(0))
        if not any(values):
            raise UserError(f"bench: --{key}: expected {_EXPECTED[key]} after it")
        asked[key] = _READ[key](values)
    return Request(**asked)


def _ops(values):
    ops, known = [op for value in values for op in value.split(",") if op], known_ops()
    for op in ops:
        if op not in known:
            close = difflib.get_close_matches(op, known, n=1)
            raise UserError(
                f"bench: --ops: unknown op {op!r}{f'; did you mean {close[0]}?' if close else ''}; "
                f"there is {', '.join(known)}"
            )
    return sorted(set(ops))


def _percent(values):
    try:
        worse = float(values[0].removesuffix("%"))
    except ValueError:
        worse = math.nan
    if not 0 <= worse < math.inf:
        raise UserError(f"bench: --worse: expected per cent, 0 or more, got {values[0]}")
    return worse


def _path(values):
    return Path(values[0]).expanduser()


_READ = {"ops": _ops, "worse": _percent, "save": _path, "compare": _path}
_EXPECTED = {"ops": "names of ops", "worse": "per cent", "save": "a file", "compare": "a file"}


def op_of(entry):
    """The op whose bench made an entry of a results file."""
    return Path(entry["fullname"].partition("::")[0]).stem.removeprefix("bench_")


def stored(path, ops):
    """A results file, without the entries of ops that are not asked for. UserError for what is none."""
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
        assert isinstance(machine["device"], str), "the device is a name"
        for entry in entries:
            row = entry["extra_info"]
            assert all(
                isinstance(value, str)
                for value in (entry["fullname"], row["op"], row["shape"], row["version"])
            )
            if not (isinstance(row["best"], (int, float)) and 0 < row["best"] < math.inf):
                raise UserError(
                    f"{path}: {row['op']}, {row['shape']}, {row['version']}: expected a time above 0, "
                    f"got {row['best']}"
                )
            # On a CPU pytest-benchmark's own figure is the same one; where a file was edited, either counts.
            host = entry["stats"].get("min", math.inf) if row.get("device") == "cpu" else math.inf
            row["best"] = min(row["best"], host) if isinstance(host, float) and host > 0 else row["best"]
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{path}: expected a file of saferlhf-fast bench --save, got another one "
            f"({type(error).__name__}: {error})"
        ) from error
    kept = [entry for entry in entries if ops is None or op_of(entry) in ops]
    if not kept:
        raise UserError(
            f"{path} has no rows in common with this run: expected {', '.join(ops or known_ops())}, "
            f"got {', '.join(sorted({op_of(entry) for entry in entries})) or 'none'}"
        )
    return {**results, "benchmarks": kept}


def refuse_unwritable(path, force):
    """UserError before anything is measured when the results could not be kept."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--save {path}: expected a file in a folder that exists")
    if path.exists() and not force:
        raise UserError(f"--save {path}: exists already; --force overwrites it")


# ---------------------------------------------------------------- measuring


def main(words):
    """Runs the command and returns its exit code: 0, or 1 when something became slower or a version failed."""
    asked = request(words)
    if asked.save:
        refuse_unwritable(asked.save, asked.force)
    base = stored(asked.compare, asked.ops) if asked.compare else None
    quick = asked.quick
    if base is not None:
        quick = bool(base["machine_info"].get("quick"))
        if asked.quick and not quick:
            raise UserError(f"--quick: {asked.compare} was measured without it; its shapes are others")
    ops = asked.ops or (
        known_ops() if base is None else sorted({op_of(entry) for entry in base["benchmarks"]})
    )
    if missing := sorted(set(ops) - set(known_ops())):
        raise UserError(
            f"{asked.compare}: expected ops of {', '.join(known_ops())}, got {', '.join(missing)}"
        )
    os.environ.update(
        BENCH_QUICK=str(int(quick)),
        BENCH_TURNS=str(TURNS[quick]),
        BENCH_PROGRESS="1",
        BENCH_COMMAND=" ".join(["saferlhf-fast bench", *words]),
    )
    sys.path.insert(0, str(BENCH))
    import ceilings
    import table

    if base is not None:
        refuse_other_device(asked, base, ceilings.device_name())
        refuse_nothing_to_compare(asked, base)
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
        code = compared(asked, base, results)
    for line in failed:
        print(f"failed: {line}")
    if asked.save and failed:
        print(f"{asked.save} was not written: not every version gave right results", file=sys.stderr)
    elif asked.save:
        keep(asked.save, results)
    return 1 if failed else code


def refuse_other_device(asked, base, device):
    """UserError for a file of another device or number of threads, unless it is forced."""
    other = base["machine_info"]["device"]
    if other != device and not asked.force:
        raise UserError(
            f"{asked.compare}: expected results of {device}, got those of {other}; --force compares all the "
            f"same"
        )


def comparable(ratios):
    """The keys of a `compare.ratios` table with a ratio that counts: none without eager torch's time, far
    from the floor.
    """
    import compare

    return [
        key
        for key, row in ratios.items()
        if any(against != "the floor" or x < compare.NEAR for against, x in row.items())
    ]


def refuse_nothing_to_compare(asked, base):
    """UserError for a file with which no version could be found slower, before anything is measured."""
    import compare

    was = compare.ratios(base, asked.times)
    if not comparable(was):
        got = f"{len(was)} rows of ours without either" if was else "no row of ours"
        raise UserError(
            f"{asked.compare}: expected times of ours and, to compare them with, of eager torch or a floor "
            f"near "
            f"them, got {got}; {'' if asked.times or not was else '--times compares the times themselves; '}"
            "saferlhf-fast bench --save writes a whole file"
        )


def measured(arguments):
    """(results or None, lines about what failed) of one run of the benches."""
    import run

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


def keep(path, results):
    """Writes results whole or not at all."""
    partial = path.with_name(path.name + ".new")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    print(f"wrote {path}")


# ---------------------------------------------------------------- comparing


def compared(asked, base, results):
    """Prints where both files come from and the table; the exit code."""
    import compare

    was = compare.ratios(base, asked.times)
    if not was.keys() & compare.ratios(results).keys():
        raise UserError(
            f"{asked.compare} has no rows in common with this run: expected shapes as in "
            f"{_key(next(iter(compare.ratios(results)), ('no rows',)))}, got "
            f"{_key(next(iter(was), ('no rows',)))}"
        )
    now, worse, gone = compare.settled(
        was,
        results,
        lambda arguments: measured(arguments)[0],
        asked.compare.name,
        1 + asked.worse / 100,
        TRIES,
        asked.times,
    )
    said = verdicts(was, now, worse, gone, asked.worse, len(comparable(was)))
    print("\n".join([*head(asked.compare.name, base, results, compare.rows), "", *said]))
    return 1 if worse or gone else 0


def _key(key):
    return ", ".join(key)


def head(name, base, results, rows):
    """Lines that say what is compared, and what else differs between the two."""
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
            f"which "
            "ratios leave out, or eager torch itself, which they do not"
        )
    return lines


def verdicts(was, now, worse, gone, percent, compared):
    """The table's lines, regressions on top; a last line that sums up. compared: how many of `was` have a
    ratio that counts.
    """
    bad = {(row.key, row.against) for row in worse}
    lines = []
    for key in {**was, **now}:
        for against in {**was.get(key, {}), **now.get(key, {})}:
            before, after = was.get(key, {}).get(against), now.get(key, {}).get(against)
            verdict = (
                "REGRESSION"
                if (key, against) in bad
                else "GONE"
                if after is None
                else "new"
                if before is None
                else "not counted"
                if after > before * (1 + percent / 100)
                else "faster"
                if after < before / (1 + percent / 100)
                else "same"
            )
            change = f"{after / before - 1:+.1%}" if before and after else ""
            lines.append(
                (*key, against, *("" if x is None else f"{x:.4g}" for x in (before, after)), change, verdict)
            )
    order = {"REGRESSION": 0, "GONE": 1}
    lines.sort(key=lambda line: (order.get(line[-1], 2), line))
    lines = [("op", "shape", "version", "time over", "was", "now", "change", "verdict"), *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    ]
    slower = len({key for key, _ in bad})
    said = [f"{slower} of {compared} rows became slower by more than {percent:g} %"] if slower else []
    said += [f"{len(gone)} were not measured any more"] if gone else []
    said = said or [f"no regression past {percent:g} % in {compared} row{'s' * (compared != 1)}"]
    said += (
        [f"{len(was) - compared} could not be compared: no eager torch in that file"]
        if compared < len(was)
        else []
    )
    return [*text, "", "; ".join(said)]
