"""Rows, targets and the table of bench_step.py.

A row is {name, ours, other, ratio, unit, device, commit, date, command, work, note} with ratio = other ÷
ours. Above 1, saferlhf-fast ("ours") is faster or smaller (for tokens/s: below 1). A side that did not run
has None for its numbers and the reason in `note`.
"""

import statistics

PARTS = {
    "score+update": ("score", "update"),
    "step": ("rollout", "score", "update"),
    "rollout": ("rollout",),
    "score": ("score",),
    "update": ("update",),
}
PROMISED = {"score+update": "s", "step": "s", "memory": "GiB"}  # rows of a side that did not run
NOTES = {"ref": "", "trl": "GRPO: no critics, no λ", "unfused": ""}
OTHERS = tuple(NOTES)

# (row, kind of device, models): (the least ratio, the desired ratio). memory: 1 / the largest share.
TARGETS = {
    ("score+update/ref", "cpu", ("cpu-small",)): (5.0, None),
    ("step/ref", "cpu", ("cpu-small",)): (2.0, 3.0),
    ("memory/ref", "cpu", ("cpu-small",)): (2.0, None),
    ("step/ref", "cuda", ("0.5b", "1.5b")): (5.0, None),
    ("memory/ref", "cuda", ("0.5b", "1.5b")): (2.5, None),
    ("memory/80 GB", "cuda", ("8b-lora",)): (1.0, None),
}


def seconds(result, part):
    """Returns the median over the measured steps of the time of a part (a name in PARTS)."""
    return statistics.median(sum(step[name] for name in PARTS[part]) for step in result["steps"])


def tokens(result):
    return statistics.median(step["tokens"] for step in result["steps"])


def rate(result):
    """Returns the response tokens per second of whole steps."""
    return tokens(result) / seconds(result, "step")


def row(name, ours, other, unit, note=""):
    return {
        "name": name,
        "ours": ours,
        "other": other,
        "ratio": other / ours if ours and other else None,
        "unit": unit,
        "note": note,
    }


def against(name, ours, other):
    """Returns the rows of one other side. other: its result, or the reason why there is none."""
    if isinstance(other, str) or isinstance(ours, str):
        note = other if isinstance(other, str) else f"ours: {ours}"
        return [row(f"{part}/{name}", None, None, unit, note) for part, unit in PROMISED.items()]
    times = [
        row(f"{part}/{name}", seconds(ours, part), seconds(other, part), "s", NOTES[name]) for part in PARTS
    ]
    return [
        *times,
        row(f"tokens per second/{name}", rate(ours), rate(other), "tokens/s", NOTES[name]),
        row(f"memory/{name}", gib(ours["peak"]), gib(other["peak"]), "GiB", NOTES[name]),
    ]


def grown(factor, base, result):
    """Returns the rows of saferlhf-fast at `factor` times the prompts, compared with itself at one time."""
    if isinstance(result, str) or isinstance(base, str):
        note = result if isinstance(result, str) else base
        return [
            row(f"growth/{factor}x", None, None, "tokens/s", note),
            row(f"growth memory/{factor}x", None, None, "GiB", note),
        ]
    return [
        row(f"growth/{factor}x", rate(result), rate(base), "tokens/s"),
        row(f"growth memory/{factor}x", gib(result["peak"]), gib(base["peak"]), "GiB"),
    ]


def divided(one, two, count):
    """Returns the row of `count` one-thread processes.

    It is compared with `count` times the rate of one such process.
    """
    if isinstance(two, str) or isinstance(one, str):
        return [row(f"processes/{count}", None, None, "tokens/s", two if isinstance(two, str) else one)]
    result = row(f"processes/{count}", rate(two), count * rate(one), "tokens/s")
    return [
        result
        | {
            "note": f"efficiency {rate(two) / (count * rate(one)):.0%} of {count} times one process of one "
            f"thread"
        }
    ]


def in_80_gb(ours):
    """Returns the row of a step that must fit into 80 GB."""
    if isinstance(ours, str):
        return row("memory/80 GB", None, None, "GB", ours)
    return row(
        "memory/80 GB",
        ours["peak"] / 1e9,
        80.0,
        "GB",
        f"step {seconds(ours, 'step'):.2f} s, {rate(ours):.0f} tokens/s",
    )


def gib(count):
    return None if count is None else count / (1 << 30)


def target(entry, device, model):
    """Returns (least ratio, desired ratio) of a row, or None."""
    return next(
        (
            limits
            for (name, where, models), limits in TARGETS.items()
            if name == entry["name"] and where == device and model in models
        ),
        None,
    )


def outcome(entry, device, model):
    """Returns "met", "missed" or "not measured", with the target; "" if the row has no target."""
    limits = target(entry, device, model)
    if limits is None:
        return ""
    least, aim = limits
    wanted = f"≥ {least:g}" + (f", aim {aim:g}" if aim else "")
    if entry["ratio"] is None:
        return f"{wanted}: not measured"
    return f"{wanted}: {'met' if entry['ratio'] >= least else 'missed'}"


def disagreements(ours, other, tolerance):
    """Returns the names of the check's sums in which two sides differ by more than a relative tolerance."""
    shared = set(ours["check"]) & set(other["check"])

    def scale(name):
        return max(abs(ours["check"][name]), abs(other["check"][name]), 1e-3)

    return sorted(
        name for name in shared if abs(ours["check"][name] - other["check"][name]) > tolerance * scale(name)
    )


def number(value, unit):
    return "not measured" if value is None else f"{value:.3g} {unit}"


def table(rows, device, model):
    """Returns lines of Markdown."""
    lines = ["| row | saferlhf-fast | other | other ÷ saferlhf-fast | target |", "|---|---:|---:|---:|---|"]
    for entry in rows:
        ratio = "not measured" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
        outcomes = "; ".join(filter(None, (outcome(entry, device, model), entry["note"])))
        lines.append(
            f"| {entry['name']} | {number(entry['ours'], entry['unit'])} | "
            f"{number(entry['other'], entry['unit'])} | "
            f"{ratio} | {outcomes} |"
        )
    return lines
