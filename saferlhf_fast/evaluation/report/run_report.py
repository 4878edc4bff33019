"""report.html of one run, of any stage that writes metrics.jsonl."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.sections import PAIR
from ...config.stage_table import stages_of
from ...runtime.console import clock, number
from ...runtime.disk import write_text
from ..statistics import interval_text, summarise
from . import page
from .alarms import section_of_alarms
from .curves import ppo_plots, supervised_plots
from .read import read_run
from .scatter import counts, scatter, scored

if TYPE_CHECKING:
    from .read import Run

SAMPLES = 12  # responses shown openly
MORE_SAMPLES = 60  # at most so many more behind a line
MEASURES = (
    ("reward", "reward (reward model units)"),
    ("cost", "cost (cost model units)"),
    ("unsafe_share", "share with cost above 0 (%)"),
    ("kl", "KL to the reference (nats per response)"),
    ("length", "response length (tokens)"),
)


def write_report(folder: str | Path) -> Path:
    """Writes report.html and plots/*.png into a run folder, and returns the path of the page.

    `saferlhf_fast.evaluation.report.read` says which files it reads.
    """
    run = read_run(folder)
    is_ppo = run.stage in stages_of("ppo") or run.has("train/actor_loss")
    plots = ppo_plots(run) if is_ppo else supervised_plots(run)
    quadrants = scatter([("Before", run.before), ("After", run.after)], run.threshold)
    if quadrants is not None:
        plots.insert(len([p for p in plots if p.name in ("multiplier", "cost", "reward")]), quadrants)
    for plot in plots:
        plot.png(run.folder / "plots")
    parts = [
        page.cards(headline(run)),
        section_of_alarms(run),
        section_of_numbers(run),
        section_of_data(run),
        page.section("Curves", *(page.figure(plot) for plot in plots)),
        section_of_samples(run),
        section_of_settings(run),
    ]
    path = run.folder / "report.html"
    name = Path(folder).resolve().name
    title = run.stage if name == run.stage else f"{run.stage} · {name}"
    write_text(path, page.page(title, subtitle(run), parts))
    return path


def subtitle(run: "Run") -> str:
    """Steps, time, seed, device and commit, those that are known."""
    steps = max((row["step"] for row in run.metrics), default=0)
    seconds = max((row.get("time") or 0 for row in run.metrics), default=0)
    known = [f"{steps} steps in {clock(seconds)}"]
    known += [
        f"{label} {run.versions[key]}"
        for key, label in (("seed", "seed"), ("device", "on"), ("saferlhf-fast", "saferlhf-fast"))
        if run.versions.get(key) is not None
    ]
    if run.versions.get("git_commit"):
        commit, _, dirty = run.versions["git_commit"].partition("-")
        known.append(f"commit {commit[:10]}" + (" with changes" if dirty else ""))
    return " · ".join(known)


def headline(run: "Run") -> list[tuple[str, str, str]]:
    """The figures that one looks for first, as (label, value, kind) of cards."""
    before, after = columns(run.before), columns(run.after)
    items = []
    for key, label in (("reward", "mean reward"), ("cost", "mean cost"), ("unsafe_share", "cost above 0")):
        if key in after:
            start = f"{_mean_text(before[key], key)} → " if key in before else ""
            items.append((label, start + _mean_text(after[key], key), ""))
    if run.threshold is not None and "cost" in after:
        words, kind = met(after["cost"], run.threshold)
        items.append(("threshold d", f"{number(run.threshold)}, {words}", kind))
    if run.curve("train/lambda")[1]:
        items.append(("λ at the end", number(run.curve("train/lambda")[1][-1]), ""))
    for name, label in (
        ("eval/loss", "evaluation loss"),
        ("eval/accuracy", "pair accuracy"),
        ("eval/accuracy_sign", "sign accuracy"),
        ("train/loss", "training loss, last step"),
    ):
        if not run.after and run.has(name):
            last = run.curve(name)[1][-1]
            items.append((label, f"{100 * last:.1f} %" if "accuracy" in name else number(last), ""))
    return items


def _mean_text(interval: dict[str, Any], key: str) -> str:
    """The mean of an interval: shares in per cent."""
    return f"{100 * interval['mean']:.1f} %" if key == "unsafe_share" else number(interval["mean"])


def met(cost: dict[str, Any], threshold: float) -> tuple[str, str]:
    """Whether the constraint holds.

    The answer is yes or no only when the whole interval is on one side of d; with d inside it the answer
    would depend on chance.

    Args:
        cost: Interval of the mean cost.
        threshold: d, in cost model units.

    Returns:
        (the answer in words, the kind of its card: "good", "bad" or "").
    """
    if cost["low"] is None:  # one response has no interval
        return "within the noise", ""
    if cost["high"] <= threshold:
        return "met", "good"
    return ("not met", "bad") if cost["low"] > threshold else ("within the noise", "")


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Intervals of an evaluation by measure; empty without rows."""
    if not rows:
        return {}
    return summarise(*([row.get(key) for row in rows] for key in (*PAIR, "kl", "length")))


def section_of_numbers(run: "Run") -> page.Raw:
    """Before and after with intervals and quadrants; for other stages the numbers of the summary."""
    if not run.after:
        scalars = [
            [key, number(value) if isinstance(value, float) else value]
            for key, value in run.summary.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        return page.section("Final numbers", page.table(["measure", "value"], scalars))
    before, after = columns(run.before), columns(run.after)
    rows = [
        [label, *(interval(side.get(key), key) for side in (before, after)), after[key]["n"]]
        for key, label in MEASURES
        if key in after
    ]
    kept = run.summary.get("kept_step")
    note = f" The policy of step {kept} was kept." if kept is not None else ""
    return page.section(
        "Final numbers",
        page.paragraph(
            "Before is the starting policy, after the one that was kept, on the same evaluation prompts. In "
            "brackets: 95 % intervals (t for means, Wilson for shares) over prompts." + note
        ),
        *remarks(run, after),
        page.table(["measure", "before", "after", "n"], rows),
        _table_of_quadrants(run),
    )


def _table_of_quadrants(run: "Run") -> page.Raw:
    """How many responses are in each quadrant of reward and cost, before and after."""
    before, after = scored(run.before), scored(run.after)
    if not (before and after):
        return page.Raw("")
    mean_reward = sum(row["reward"] for row in before) / len(before)
    sides = [(counts(rows, mean_reward), len(rows)) for rows in (before, after)]
    return page.table(
        ["quadrant", "before", "after"],
        [[key, *(f"{c[key]} ({100 * c[key] / n:.1f} %)" for c, n in sides)] for key in sides[0][0]],
    )


def remarks(run: "Run", after: dict[str, Any]) -> Iterable[page.Raw]:
    """What the numbers do not say by themselves: which prompts they are of, and when d counts as met."""
    lines = []
    if run.evaluates_on_training_prompts:
        lines.append(
            f"The evaluation prompts are training prompts, the first {len(run.after)}: evaluation.fraction "
            "is 0 and there is no evaluation.data. What the policy does on new prompts is not measured here."
        )
    if run.threshold is not None and "cost" in after:
        lines.append(
            "The threshold d counts as met when the whole interval of the mean cost is at or under it, as "
            "not met when it is above; else the difference is within the noise of so many prompts."
        )
    return map(page.paragraph, lines)


def section_of_data(run: "Run") -> page.Raw:
    """What became of the rows of each source: read, dropped and why, flagged and why."""
    data = run.summary.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    rows = []
    for source in sources or []:
        rows.append(
            [source.get("path"), "read", f"of {source.get('available')} in the source", source.get("rows")]
        )
        rows += [
            ["", word, reason, count]
            for word in ("dropped", "flagged")
            for reason, count in (source.get(word) or {}).items()
        ]
        rows.append(["", "used", "examples", source.get("kept")])
    return (
        page.section(
            "Data",
            page.paragraph(
                "Rows read of each source, and what became of them. Flagged ones were used all the same. A "
                "row can hold several examples."
            ),
            page.table(["source", "rows", "why", "count"], rows, names=3),
        )
        if rows
        else page.Raw("")
    )


def interval(value: dict[str, Any] | None, key: str) -> str | None:
    """Text of one cell: shares in per cent."""
    if value is None:
        return None
    if key == "unsafe_share":
        return interval_text({end: 100 * value[end] for end in ("mean", "low", "high")}, 1)
    return interval_text(value, 1 if key == "length" else 3)


def section_of_samples(run: "Run") -> page.Raw:
    """The same prompts before and after, in the order of the evaluation; none is picked."""
    if not run.after:
        return page.Raw("")
    names, numeric = ["prompt", "before", *PAIR, "after", *PAIR], (2, 3, 5, 6)

    def scores(row: dict[str, Any]) -> list[str]:
        return [number(row.get(key)) for key in PAIR]

    rows = []
    for i, row in enumerate(run.after[: SAMPLES + MORE_SAMPLES]):
        first = (
            run.before[i] if i < len(run.before) and run.before[i].get("prompt") == row.get("prompt") else {}
        )
        rows.append(
            [row.get("prompt"), first.get("response"), *scores(first), row.get("response"), *scores(row)]
        )
    return page.section(
        "Samples",
        page.paragraph("The first evaluation prompts in their order; not picked."),
        page.text_table(names, rows[:SAMPLES], numeric),
        page.folded(f"{len(rows[SAMPLES:])} more", page.text_table(names, rows[SAMPLES:], numeric))
        if rows[SAMPLES:]
        else page.Raw(""),
    )


def section_of_settings(run: "Run") -> page.Raw:
    """config.yaml and versions.json."""
    versions = [[key, value] for key, value in run.versions.items()]
    return page.section(
        "Settings and versions",
        page.folded("config.yaml", page.preformatted(run.config)),
        page.folded("versions", page.table(["what", "version"], versions)),
    )
