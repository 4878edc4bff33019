"""Compares a new run with the stored results of the same device: `make bench-compare`.

Exit code 1 means a regression; each one is named.

Ratios within a run are compared, so a slower or busier machine alone is no regression: this library's fastest
round over eager torch's fastest round, and over the floor if it is near the floor (stored ratio under 20). If
a ratio is more than 10 % worse than the stored one, it is measured once more, together with its eager row;
the better of the two measurements counts.

python bench/compare.py                      measures and compares with the newest stored file of this device
python bench/compare.py STORED FRESH         compares two results files, measures nothing
saferlhf-fast bench --compare STORED         the same on a user's machine, with a table
                                             (saferlhf_fast/commands/bench.py)
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import ceilings  # noqa: E402
import run  # noqa: E402
from table import OURS  # noqa: E402

if run.CHECKOUT:
    sys.path.insert(0, str(HERE.parent))

WORSE, NEAR = 1.10, 20.0


class Regression(NamedTuple):
    """One ratio (time over `against`: smaller is better) that became worse."""

    key: tuple[str, str, str]
    against: str
    was: float
    now: float

    def __str__(self):
        op, shape, version = self.key
        return (
            f"regression: {op}, {shape}, {version}: {self.now:.3g} x {self.against}, was {self.was:.3g} x "
            f"({self.now / self.was - 1:+.0%})"
        )


def rows(results):
    """Returns {(op, shape, version): extra_info} of the rows that have a time."""
    return {
        (row["op"], row["shape"], row["version"]): row
        for row in (entry["extra_info"] for entry in results["benchmarks"])
        if row.get("best")
    }


def ratios(results, times=False):
    """Returns {(op, shape, version): {"eager": ratio, "the floor": ratio}} of this library's versions.

    A ratio that cannot be computed is left out. times: add {"one second": the time itself}, which depends as
    much on the machine's load as on the code.
    """
    timed, table = rows(results), {}
    for (op, shape, version), row in timed.items():
        if version not in OURS:
            continue
        eager, floor = (
            timed.get((op, shape, "eager")),
            ceilings.floor(row, results["machine_info"].get("ceilings")),
        )
        table[op, shape, version] = {}
        if eager:
            table[op, shape, version]["eager"] = row["best"] / eager["best"]
        if floor:
            table[op, shape, version]["the floor"] = row["best"] / floor
        if times:
            table[op, shape, version]["one second"] = row["best"]
    return table


def regressions(stored, fresh, limit=WORSE):
    """Returns (list of Regression, list of stored keys that were not measured now) of two `ratios` tables.

    limit: the largest now / was that is no regression.
    """
    worse, gone = [], []
    for key, before in stored.items():
        if key not in fresh:
            gone.append(key)
            continue
        for against, was in before.items():
            now = fresh[key].get(against)
            if against == "the floor" and was >= NEAR:
                continue
            if now is None:
                gone.append((*key[:2], f"{key[2]} against {against}"))
            elif now > was * limit:
                worse.append(Regression(key, against, was, now))
    return worse, gone


def better(first, second):
    """Merges two `ratios` tables, with the smaller of each ratio."""
    merged = {key: dict(value) for key, value in first.items()}
    for key, value in second.items():
        for against, ratio in value.items():
            merged.setdefault(key, {})[against] = min(ratio, merged.get(key, {}).get(against, ratio))
    return merged


def tests_of(worse, results):
    """Returns the pytest names of the rows that became worse and of their eager rows."""
    wanted = {key for regression in worse for key in (regression.key, (*regression.key[:2], "eager"))}
    names = {
        (
            entry["extra_info"].get("op"),
            entry["extra_info"].get("shape"),
            entry["extra_info"].get("version"),
        ): entry["extra_info"].get("turns") or [entry["fullname"]]
        for entry in results["benchmarks"]
    }
    return sorted(name for key in wanted for name in names.get(key, []))


def newest(device, folder):
    """Returns the newest stored file of `device`, or None."""
    return max(folder.glob(f"{run.slug(device)}-????-??-??.json"), default=None)


def _measured(arguments):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "results.json"
        run.measure(path, arguments)
        return json.loads(path.read_text()) if path.exists() and path.stat().st_size else None


def settled(stored, fresh, measured, named, limit=WORSE, tries=1, times=False):
    """Measures worse ratios up to `tries` more times; returns (new ratios, list of Regression, missing keys).

    A disturbed machine makes a ratio worse for a while, a change of the code permanently: the better of the
    measurements counts. stored: a `ratios` table. fresh: results. measured(arguments): results or None.
    named: the stored file's name.
    """
    fresh_ratios = ratios(fresh, times)
    worse, gone = regressions(stored, fresh_ratios, limit)
    while worse and tries:
        print(f"{len(worse)} ratio(s) worse than in {named}: measuring those once more", flush=True)
        again = measured(["--ours", *tests_of(worse, fresh)])
        fresh_ratios = better(fresh_ratios, ratios(again, times)) if again else fresh_ratios
        worse, gone = regressions(stored, fresh_ratios, limit)
        tries -= 1
    return fresh_ratios, worse, gone


def report(worse, gone):
    """Prints one line per finding and returns the exit code."""
    for regression in worse:
        print(regression)
    for key in gone:
        print("not measured any more:", ", ".join(key))
    if not worse and not gone:
        print("no regression past 10 %")
    return 1 if worse or gone else 0


def main(arguments, folder=HERE / "results", measured=_measured):
    if len(arguments) == 2:
        stored, fresh = (json.loads(Path(path).read_text()) for path in arguments)
        return report(*regressions(ratios(stored), ratios(fresh)))
    if not list(folder.glob("*.json")):
        print(f"no stored results in {folder}: `make bench` writes them", file=sys.stderr)
        return 2
    os.environ.setdefault("BENCH_COMMAND", "make bench-compare")
    fresh = measured(["--ours", *arguments])
    if fresh is None:
        print("nothing was measured", file=sys.stderr)
        return 2
    device = fresh["machine_info"]["device"]
    path = newest(device, folder)
    if path is None:
        print(
            f"no stored results of this device ({device}) in {folder}: `make bench` writes them",
            file=sys.stderr,
        )
        return 2
    _, worse, gone = settled(ratios(json.loads(path.read_text())), fresh, measured, path.name)
    return report(worse, gone)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
