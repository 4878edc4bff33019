"""report.html of the demo: did PPO-Lag do what the paper says, on every seed?

Reads <folder>/demo.json: {"threshold": d, "seeds": {"0": {"sft": {…}, "ppo": {…}, "ppo_lag": {…}}, …}}, each
policy with helpfulness, cost, unsafe_share (gold), model_reward, model_cost, kl and multiplier; a seed may
have its own "threshold" and "seconds" {stage: s}. Beside it, where they are: seed-N/ppo and seed-N/ppo-lag
(run folders), seed-N/sft, reward, cost (run folders of the supervised stages),
seed-N/test-{sft,ppo,ppo-lag}.jsonl (rows of the evaluation).
"""

from pathlib import Path

from ..errors import UserError
from ..evaluation.report import page
from ..evaluation.report.read import read_json, read_lines, read_run
from ..evaluation.report.scatter import scatter
from ..runtime.console import clock, number
from .plots import POLICIES, bars, score_models, tradeoff, training

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
CLAIMS = (
    ("PPO is more helpful than SFT", lambda s: s["ppo"]["helpfulness"] > s["sft"]["helpfulness"]),
    ("PPO is less safe than SFT", lambda s: s["ppo"]["unsafe_share"] > s["sft"]["unsafe_share"]),
    ("PPO-Lag is more helpful than SFT", lambda s: s["ppo_lag"]["helpfulness"] > s["sft"]["helpfulness"]),
    ("PPO-Lag's model cost is at or under d", lambda s: s["ppo_lag"]["model_cost"] <= s["threshold"]),
    ("PPO-Lag is safer than SFT", lambda s: s["ppo_lag"]["unsafe_share"] < s["sft"]["unsafe_share"]),
)
"""What the paper finds, on one seed's entry."""


def write_demo_report(folder):
    """Makes report.html and plots/*.png in a demo's folder -> path of the page."""
    folder = Path(folder)
    seeds = read_seeds(folder / "demo.json")
    across = [tradeoff(seeds), bars(seeds)]
    parts = [
        page.cards(
            [
                ("claims that hold", *verdict(seeds)),
                ("seeds", ", ".join(seeds), ""),
                *([("time", clock(total), "")] if (total := total_seconds(seeds)) else []),
            ]
        ),
        section_of_results(seeds),
        page.section("Helpfulness and safety", *map(page.figure, across)),
    ]
    plots = list(across)
    for seed in seeds:
        made, shown = section_of_seed(folder / f"seed-{seed}", seed, seeds[seed])
        plots += made
        parts.append(shown)
    parts += [section_of_seconds(seeds), section_of_settings(folder)]
    for plot in plots:
        plot.png(folder / "plots")
    path = folder / "report.html"
    path.write_text(
        page.page(
            "Safe RLHF on the embedded world",
            "SFT, PPO without the constraint, and PPO-Lag, judged on "
            "held-out prompts by gold scores that no training and no selection saw",
            parts,
        ),
        encoding="utf-8",
    )
    return path


def read_seeds(path):
    """demo.json -> {seed: entry with its threshold}."""
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


def verdict(seeds):
    """-> how many claims hold, as text and as good or bad."""
    holds = [bool(test(entry)) for entry in seeds.values() for _, test in CLAIMS]
    return f"{sum(holds)} of {len(holds)}", "good" if all(holds) else "bad"


def section_of_results(seeds):
    """The table of all figures, and the claims."""
    rows = []
    for seed, entry in seeds.items():
        for key, (label, _) in POLICIES.items():
            p = entry[key]
            rows.append(
                [
                    seed if key == "sft" else "",
                    label,
                    number(p["helpfulness"]),
                    number(p["cost"]),
                    f"{100 * p['unsafe_share']:.1f} %",
                    number(p.get("model_reward")),
                    number(p.get("model_cost")),
                    number(entry["threshold"]) if key == "ppo_lag" else "",
                    number(p.get("kl")),
                    number(p.get("multiplier")),
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


def section_of_seed(folder, seed, entry):
    """One seed's curves, scatter, supervised stages and samples -> plots, HTML."""
    runs = {key: _run(folder / key.replace("_", "-")) for key in ("ppo", "ppo_lag")}
    answers = {key: read_lines(folder / f"test-{key.replace('_', '-')}.jsonl") for key in POLICIES}
    stages = (
        {path.name: _run(path) for path in sorted(folder.iterdir()) if path.name in ("sft", "reward", "cost")}
        if folder.is_dir()
        else {}
    )
    main = [
        training(seed, runs),
        scatter(
            [(label, answers[key]) for key, (label, _) in POLICIES.items()],
            entry["threshold"],
            f"seed-{seed}-scatter",
        ),
    ]
    main = [plot for plot in main if plot is not None]
    supervised = score_models(seed, {name: run for name, run in stages.items() if run is not None})
    shown = page.section(
        f"Seed {seed}",
        *map(page.figure, main),
        page.folded("SFT, reward and cost models", page.figure(supervised)) if supervised else "",
        _samples(answers),
    )
    return main + ([supervised] if supervised else []), shown


def _run(folder):
    """A run folder -> Run, or None where there are no metrics."""
    return read_run(folder) if (folder / "metrics.jsonl").is_file() else None


def _samples(answers):
    """The same prompts answered by the three policies, in the order of the test: nothing is picked."""
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


def total_seconds(seeds):
    """Seconds of all seeds; 0 where none are given."""
    return sum(
        value
        for entry in seeds.values()
        for stage, value in entry.get("seconds", {}).items()
        if stage != "total"
    )


def section_of_seconds(seeds):
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


def section_of_settings(folder):
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
