"""report.html of the demo: did PPO-Lag do what the paper says, on every seed?

Reads <folder>/demo.json: {"threshold": d, "seeds": {"0": {"sft": {…}, "ppo": {…}, "ppo_lag": {…}}, …}}.
Each policy has helpfulness, cost, unsafe_share (gold), model_reward, model_cost, kl and multiplier; a seed
may have its own "threshold" and "seconds" {stage: s}. Reads beside it, where they exist: seed-N/ppo and
seed-N/ppo-lag (run folders), seed-N/sft, reward and cost (run folders of the supervised stages), and
seed-N/test-{sft,ppo,ppo-lag}.jsonl (rows of the evaluation).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluation.report import page
from ..evaluation.report.read import read_json, read_lines, read_run
from ..evaluation.report.scatter import scatter
from ..runtime.console import clock, number
from ..runtime.disk import write_text
from .plots import POLICIES, bars, score_models, tradeoff, training

if TYPE_CHECKING:
    from ..evaluation.report.plots import Plot
    from ..evaluation.report.read import Run

COLUMNS = (
    "seed",
    "policy",
    "helpfulness (gold)",
    "cost (gold)",
    "unsafe (gold)",
    "model reward",
    "model cost",
    "threshold d",
    "KL (nats)",
    "λ",
)
SAMPLES = 10
CLAIMS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("PPO is more helpful than SFT", lambda s: s["ppo"]["helpfulness"] > s["sft"]["helpfulness"]),
    ("PPO is less safe than SFT", lambda s: s["ppo"]["unsafe_share"] > s["sft"]["unsafe_share"]),
    ("PPO-Lag is more helpful than SFT", lambda s: s["ppo_lag"]["helpfulness"] > s["sft"]["helpfulness"]),
    ("PPO-Lag's model cost is at or under d", lambda s: s["ppo_lag"]["model_cost"] <= s["threshold"]),
    ("PPO-Lag is safer than SFT", lambda s: s["ppo_lag"]["unsafe_share"] < s["sft"]["unsafe_share"]),
)
"""The findings of the paper, and whether one seed's entry shows them."""


def write_demo_report(folder: str | Path) -> Path:
    """Writes report.html and plots/*.png into a demo's folder.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder has no results.
    """
    folder = Path(folder)
    seeds = read_seeds(folder / "demo.json")
    across = [tradeoff(seeds), bars(seeds)]
    sections = [
        page.cards(
            [
                ("claims that hold", *claims_text(seeds)),
                ("seeds", ", ".join(seeds), ""),
                *([("time", clock(total), "")] if (total := total_seconds(seeds)) else []),
            ]
        ),
        section_of_results(seeds),
        page.section("Helpfulness and safety", *map(page.figure, across)),
    ]
    plots = list(across)
    for seed in seeds:
        seed_plots, section = section_of_seed(folder / f"seed-{seed}", seed, seeds[seed])
        plots += seed_plots
        sections.append(section)
    sections += [section_of_seconds(seeds), section_of_settings(folder)]
    for plot in plots:
        plot.png(folder / "plots")
    path = folder / "report.html"
    write_text(
        path,
        page.page(
            "Safe RLHF on the embedded world",
            "SFT, PPO without the constraint, and PPO-Lag, judged on held-out prompts by gold scores that no "
            "training and no selection saw",
            sections,
        ),
    )
    return path


def read_seeds(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of demo.json, {seed: entry with its threshold}.

    Raises:
        UserError: the file is missing or holds no seed, or an entry lacks a policy.
    """
    result = read_json(path, None)
    if not isinstance(result, dict) or not result.get("seeds"):
        raise UserError(
            f"{path}: expected the demo's results with at least one seed, found "
            + ("none" if result else "no such file")
        )
    seeds = {}
    for seed, entry in result["seeds"].items():
        missing = [key for key in POLICIES if key not in entry]
        if missing:
            raise UserError(f"{path}: seed {seed}: expected {', '.join(POLICIES)}, found no {missing[0]}")
        seeds[seed] = {**entry, "threshold": entry.get("threshold", result.get("threshold"))}
    return seeds


def claims_text(seeds: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """How many claims hold on all seeds together, such as "9 of 10", and "good" or "bad"."""
    holds = [bool(test(entry)) for entry in seeds.values() for _, test in CLAIMS]
    return f"{sum(holds)} of {len(holds)}", "good" if all(holds) else "bad"


def section_of_results(seeds: Mapping[str, Mapping[str, Any]]) -> page.Raw:
    """The table of all figures, and the claims."""
    rows = []
    for seed, entry in seeds.items():
        for key, (label, _) in POLICIES.items():
            policy = entry[key]
            rows.append(
                [
                    seed if key == "sft" else "",
                    label,
                    number(policy["helpfulness"]),
                    number(policy["cost"]),
                    f"{100 * policy['unsafe_share']:.1f} %",
                    number(policy.get("model_reward")),
                    number(policy.get("model_cost")),
                    number(entry["threshold"]) if key == "ppo_lag" else "",
                    number(policy.get("kl")),
                    number(policy.get("multiplier")),
                ]
            )
    claims = [
        [
            claim,
            *(
                page.Raw('<span class="good">yes</span>' if test(entry) else '<span class="bad">no</span>')
                for entry in seeds.values()
            ),
        ]
        for claim, test in CLAIMS
    ]
    return page.section(
        "Results on held-out prompts",
        page.table(COLUMNS, rows, names=2),
        page.table(["the paper's finding", *(f"seed {seed}" for seed in seeds)], claims),
    )


def section_of_seed(folder: Path, seed: str, entry: Mapping[str, Any]) -> "tuple[list[Plot], page.Raw]":
    """One seed's curves, scatter, supervised stages and samples.

    Args:
        folder: that of the seed.
        seed: for titles and file names.
        entry: its entry in demo.json.

    Returns:
        The plots, and the section of the page.
    """
    runs = {key: _run(folder / key.replace("_", "-")) for key in ("ppo", "ppo_lag")}
    answers = {key: read_lines(folder / f"test-{key.replace('_', '-')}.jsonl") for key in POLICIES}
    stages = (
        {path.name: _run(path) for path in sorted(folder.iterdir()) if path.name in ("sft", "reward", "cost")}
        if folder.is_dir()
        else {}
    )
    drawn = [
        training(seed, runs),
        scatter(
            [(label, answers[key]) for key, (label, _) in POLICIES.items()],
            entry["threshold"],
            f"seed-{seed}-scatter",
        ),
    ]
    plots = [plot for plot in drawn if plot is not None]
    supervised = score_models(seed, {name: run for name, run in stages.items() if run is not None})
    section = page.section(
        f"Seed {seed}",
        *map(page.figure, plots),
        page.folded("SFT, reward and cost models", page.figure(supervised)) if supervised else "",
        _samples(answers),
    )
    return plots + ([supervised] if supervised else []), section


def _run(folder: Path) -> "Run | None":
    """The run in a folder; None where there are no metrics."""
    return read_run(folder) if (folder / "metrics.jsonl").is_file() else None


def _samples(answers: Mapping[str, list[dict[str, Any]]]) -> page.Raw:
    """The first prompts of the test that all three policies answered, in its order, and the answers."""
    shortest = min(map(len, answers.values()))
    rows = []
    for i in range(min(SAMPLES, shortest)):
        triple = [answers[key][i] for key in POLICIES]
        if len({row.get("prompt") for row in triple}) != 1:
            break
        rows.append(
            [
                triple[0].get("prompt"),
                *(
                    page.Raw(
                        f'{page.text(row.get("response"))}\n<span class="soft">reward '
                        f"{number(row.get('reward'))}, "
                        f"cost {number(row.get('cost'))}</span>"
                    )
                    for row in triple
                ),
            ]
        )
    return (
        page.folded(
            f"the first {len(rows)} held-out prompts and the answers",
            page.text_table(["prompt", *(label for label, _ in POLICIES.values())], rows),
        )
        if rows
        else page.Raw("")
    )


def total_seconds(seeds: Mapping[str, Mapping[str, Any]]) -> float:
    """Seconds of all seeds; 0 where none are given."""
    return sum(
        value
        for entry in seeds.values()
        for stage, value in entry.get("seconds", {}).items()
        if stage != "total"
    )


def section_of_seconds(seeds: Mapping[str, Mapping[str, Any]]) -> page.Raw:
    """Seconds per stage and seed."""
    names = list(dict.fromkeys(name for entry in seeds.values() for name in entry.get("seconds", {})))
    rows = [
        [
            name,
            *(
                f"{entry['seconds'][name]:.1f}" if name in entry.get("seconds", {}) else None
                for entry in seeds.values()
            ),
        ]
        for name in names
    ]
    return page.section("Seconds per stage", page.table(["stage", *(f"seed {seed}" for seed in seeds)], rows))


def section_of_settings(folder: Path) -> page.Raw:
    """config.yaml and versions.json of the demo."""
    config = folder / "config.yaml"
    versions = read_json(folder / "versions.json", {})
    return page.section(
        "Settings and versions",
        page.folded(
            "config.yaml", page.preformatted(config.read_text(encoding="utf-8") if config.is_file() else "")
        ),
        page.folded("versions", page.table(["what", "version"], [[k, v] for k, v in versions.items()])),
    )
