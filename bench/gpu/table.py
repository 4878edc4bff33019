"""The table of a GPU window, of at most 10,000 characters.

It can be read from the end of a command's output.
"""

import json
from pathlib import Path

import ceilings
import targets
from gpu import predictions
from table import duration, size

LONGEST = 9_800


def read(path):
    """Returns the rows of a file; a line that was cut short becomes a failure."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append({"kind": "failure", "section": "", "what": "a row", "error": "cut short"})
    return rows


def of_kind(rows, *kinds):
    return [row for row in rows if row["kind"] in kinds]


def heading(rows):
    run = next(iter(of_kind(rows, "run")), {})
    device = next(iter(of_kind(rows, "device")), {})
    top = next(iter(of_kind(rows, "ceilings")), {})
    named = {name: top[name] for name in top if name.endswith("_s")}
    lines = [
        f"Device: {device.get('device', 'not known')} ({device.get('state', '')}). Date: {run.get('date')}. "
        f"Commit: {run.get('commit')}. Command: `{run.get('command')}`."
        + (f" A rehearsal ({run['rehearsal']}): these are no figures." if run.get("rehearsal") else ""),
        f"Python {device.get('python')}, torch {device.get('torch')}, triton {device.get('triton')}, "
        f"numpy {device.get('numpy')}.",
    ]
    for name, value in named.items():
        expected = predictions.CEILINGS.get(name)
        lines.append(
            f"{name}: {value:.4g}" + (f" (predicted {expected[0]}-{expected[1]})" if expected else "")
        )
    return lines


def predicted(row):
    prediction = predictions.of(row)
    if prediction is None:
        return ""
    field, low, high = prediction
    what = "a call: " if field == "call" else ""
    return f"{what}{duration(low)} - {duration(high)}"


def measured(row, top):
    """Returns one line of the table of times."""
    floor = ceilings.floor(row, top) if top else None
    moved = row.get("reads", 0) + row.get("writes", 0)
    rate = (
        f"{row['flops'] / row['seconds'] / 1e12:.3g} TFLOP/s"
        if row.get("flops")
        else (f"{moved / row['seconds'] / 1e9:.4g} GB/s" if moved else "")
    )
    notes = [
        rate,
        f"a call {duration(row['call'])}" if row.get("call") else "",
        f"{row['launches']} launches" if row.get("launches") else "",
        size(row["peak"]) if (row.get("peak") or 0) > 1 << 28 else "",
        row["wrong"],
    ]
    of_floor = f"{row['seconds'] / floor:.2f}x" if floor else ""
    return (
        f"| {row['version']} | {duration(row['seconds'])} | {predicted(row)} | {of_floor}"
        f" | {', '.join(filter(None, notes))} |"
    )


def times(rows):
    """Returns one table of the timed rows: a line for each op and shape, and one for each version of it."""
    top = next((row for row in rows if row["kind"] == "ceilings"), None)
    groups = {}
    for row in of_kind(rows, "row"):
        if row["section"] != "products":
            groups.setdefault((row["op"], row["shape"]), []).append(row)
    lines = ["", "| version | time | predicted | of the floor | |", "|---|---|---|---|---|"] if groups else []
    for (op, shape), some in groups.items():
        lines.append(f"| **{op}**, {shape} | | | | |")
        lines += [measured(row, top) for row in sorted(some, key=lambda row: row["seconds"])]
    return lines


def products(rows):
    """Returns the bare products, one line each, with the rates by shape."""
    groups = {}
    for row in of_kind(rows, "row"):
        if row["section"] == "products":
            groups.setdefault(row["op"], []).append(
                f"{row['shape']} {duration(row['seconds'])} "
                f"({row['flops'] / row['seconds'] / 1e12:.3g} TFLOP/s)"
            )
    return (
        ["", "**Products**", *(f"- {op}: {'; '.join(some)}" for op, some in groups.items())] if groups else []
    )


def target_outcomes(rows):
    """Returns the targets that are meant for this device."""
    device = next((row.get("device", "") for row in of_kind(rows, "device")), "")
    top = next((row for row in rows if row["kind"] == "ceilings"), None)
    some, lines = of_kind(rows, "row"), []
    for target in targets.TARGETS:
        if targets.applies_to(target, {"device": device}):
            value = targets.value(target, some, top, ceilings.floor)
            lines.append(
                f"- {target.op}, {target.shape}: {targets.text(target)}: "
                f"{'' if value is None else f'{value:.3g}, '}{targets.outcome(target, value)}"
            )
    return ["", "**Targets**", *lines] if lines else []


def checks(rows):
    """Returns how many checks were right, and those that were wrong."""
    some = of_kind(rows, "check")
    wrong = [row for row in some if row["result"] != "right"]
    lines = ["", f"**Checks**: {len(some) - len(wrong)} of {len(some)} right"] if some else []
    lines += [f"- {row['op']} {row['what']}, {row['impl']}: {row['result']}" for row in wrong[:12]]
    return lines + [f"- {row['what']}: {row['value']}" for row in of_kind(rows, "figure")]


def troubles(rows):
    """Returns what failed, what did not run (counted by reason), and sections that did not end normally."""
    lines = [
        f"- failed in {row['section']}: {row['what']}: {row['error'][:160]}"
        for row in of_kind(rows, "failure")[:15]
    ]
    lines += [f"- test: {row['test']}: {row['error'][:100]}" for row in of_kind(rows, "test")[:10]]
    reasons = {}
    for row in of_kind(rows, "not run"):
        reasons.setdefault(row["reason"][:120], []).append(row["what"])
    lines += [
        f"- not run ({len(what)}): {reason}: {', '.join(sorted(set(what)))[:160]}"
        for reason, what in reasons.items()
    ]
    lines += [
        f"- {row['section']}: {row['ended'][:120]}"
        for row in of_kind(rows, "section")
        if row["ended"] != "done"
    ]
    return ["", "**What failed or did not run**", *lines] if lines else []


def counters(rows):
    return (
        [
            "",
            "**Counters**",
            *(
                f"- {row['kernel']}: "
                + ", ".join(
                    f"{name} {value}"
                    for name, value in row.items()
                    if name not in ("kind", "section", "at", "kernel")
                )
                for row in of_kind(rows, "counters")
            ),
        ]
        if of_kind(rows, "counters")
        else []
    )


def text(rows):
    """Returns the whole table. If it would be too long, its times are cut first; the file has all of them."""
    head, tail = heading(rows), [*checks(rows), *counters(rows), *target_outcomes(rows), *troubles(rows)]
    sections = of_kind(rows, "section")
    tail += ["", "Sections: " + ", ".join(f"{row['section']} {row['seconds']} s" for row in sections)]
    middle, room = times(rows) + products(rows), LONGEST - sum(len(line) + 1 for line in head + tail)
    kept = []
    for line in middle:
        room -= len(line) + 1
        if room < 60:
            kept.append("… more rows are in rows.jsonl")
            break
        kept.append(line)
    return "\n".join([*head, *kept, *tail])[: LONGEST + 150]
