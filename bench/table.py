"""Prints a Markdown table of one results file: `python bench/table.py RESULTS.json > TABLE.md`.

For each op and shape it has one row per version: time, ratio to eager torch of the same run, the floor (from
the ceilings of the same run) and the ratio to it, the rate, peak memory above inputs and outputs, the error
against float64. Then it lists the targets, and what could not be measured and why. A figure that is not in
the file is "not measured"; nothing is estimated.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import ceilings  # noqa: E402
import targets  # noqa: E402

NONE = "not measured"
HEAD = (
    "| version | time | against eager | floor | of the floor | rate | peak memory | error |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
)
OURS = ("reference", "triton", "native")


def duration(seconds):
    if seconds is None:
        return NONE
    for size, unit, digits in ((1, "s", 2), (1e-3, "ms", 2), (1e-6, "µs", 1)):
        if seconds >= size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 1e-6:.3f} µs"


def size(count):
    if count is None:
        return NONE
    if count < 1 << 20:
        return "< 1 MiB"
    return f"{count / (1 << 20):.0f} MiB" if count < 1 << 30 else f"{count / (1 << 30):.2f} GiB"


def rate(row):
    """TFLOP/s if matrix products dominate, otherwise GB/s of the bytes that must move."""
    if row.get("flops"):
        return f"{row['flops'] / row['seconds'] / 1e12:.3g} TFLOP/s"
    moved = row.get("reads", 0) + row.get("writes", 0)
    return f"{moved / row['seconds'] / 1e9:.3g} GB/s" if moved else NONE


def named(row):
    if row["version"] not in OURS:
        return row["version"]
    return f"**ours: {row['version']}**" + (" (auto)" if row.get("auto") else "")


def header(machine):
    top = machine.get("ceilings") or {}
    rates = (
        [f"copy {top['copy_gb_s']:.1f} GB/s (read and write counted)", f"read {top['read_gb_s']:.1f} GB/s"]
        if top
        else []
    )
    rates += [
        f"{name.removesuffix('_tflop_s')} products {top[name]:.3g} TFLOP/s"
        for name in top
        if name.endswith("_tflop_s")
    ]
    cache = machine.get("cache_bytes")
    return [
        f"Device: {machine.get('device', 'not noted')}. Commit: {machine.get('commit', 'not noted')}. "
        f"Date: {machine.get('date', 'not noted')}. torch {machine.get('torch', 'not noted')}. "
        f"Command: `{machine.get('command', 'not noted')}`.",
        "",
        f"Ceilings of this machine in this run: {', '.join(rates) or NONE}. "
        f"Last-level cache as the machine names it: {size(cache) if cache else 'not known'}.",
    ]


def section(op, shape, rows, top):
    """Returns the rows of one op and shape, the fastest first."""
    eager = next((row["seconds"] for row in rows if row["version"] == "eager"), None)
    lines = [
        "",
        f"### {op}, {shape}" + (" (in the caches)" if any(row.get("warm") for row in rows) else ""),
        "",
        *HEAD,
    ]
    for row in sorted(rows, key=lambda row: row["seconds"]):
        floor = ceilings.floor(row, top)
        lines.append(
            "| "
            + " | ".join(
                [
                    named(row),
                    duration(row["seconds"]),
                    NONE if eager is None else f"{eager / row['seconds']:.2f}x",
                    duration(floor),
                    NONE if floor is None else f"{row['seconds'] / floor:.2f}x",
                    rate(row),
                    size(row.get("peak")),
                    NONE if row.get("error") is None else f"{row['error']:.0e}",
                ]
            )
            + " |"
        )
    return lines


def target_lines(rows, machine):
    lines = ["", "## Targets", "", "| op | shape | target | measured | verdict |", "|---|---|---|---:|---|"]
    top = machine.get("ceilings")
    for target in targets.TARGETS:
        here = targets.applies_to(target, machine)
        measured = targets.value(target, rows, top, ceilings.floor) if here else None
        where = "CPU, two threads" if target.where == "cpu" else target.where
        lines.append(
            f"| {target.op} | {target.shape} | {where}: {targets.text(target)} | "
            f"{NONE if measured is None else f'{measured:.3g}'} | "
            f"{targets.outcome(target, measured)}{'' if here else ' (another machine)'} |"
        )
    return lines


def missing_lines(notes):
    """Returns one line per version and reason, with the affected ops."""
    ops_of = {}
    for note in notes:
        ops_of.setdefault((note["version"], note["reason"]), set()).add(note["op"])
    if not ops_of:
        return []
    return [
        "",
        "## Not measured",
        "",
        "| version | ops | reason |",
        "|---|---|---|",
        *(
            f"| {version} | {', '.join(sorted(ops))} | {reason} |"
            for (version, reason), ops in sorted(ops_of.items())
        ),
    ]


def table(results, with_targets=True):
    """Returns lines of Markdown for a loaded results file.

    with_targets: include the project's targets, each of which is for one machine.
    """
    machine, entries = results["machine_info"], results["benchmarks"]
    rows = [entry["extra_info"] for entry in entries if entry["extra_info"].get("seconds")]
    lines = header(machine)
    for key in sorted({(row["op"], row["shape"]) for row in rows}):
        lines += section(
            *key, [row for row in rows if (row["op"], row["shape"]) == key], machine.get("ceilings")
        )
    others = [entry for entry in entries if "op" not in entry["extra_info"]]
    if others:
        lines += ["", "### a whole PPO-Lag step and its parts", "", "| part | time |", "|---|---:|"]
        lines += [f"| {entry['name']} | {duration(entry['stats']['median'])} |" for entry in others]
    return (
        lines
        + (target_lines(rows, machine) if with_targets else [])
        + missing_lines(results.get("not_measured", []))
    )


if __name__ == "__main__":
    print("\n".join(table(json.loads(Path(sys.argv[1]).read_text()))))
