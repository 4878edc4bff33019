"""The demo's plots: helpfulness and safety of SFT, PPO and PPO-Lag, and the course of their training.

Gold scores are drawn beside the scores of the models.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..evaluation.report.curves import DOTS, draw_accuracy, percent
from ..evaluation.report.plots import BLUE, GREY, INK, ORANGE, Plot, legend, level, line, panels, titled

if TYPE_CHECKING:
    from ..evaluation.report.read import Run

POLICIES = {"sft": ("SFT", GREY), "ppo": ("PPO", ORANGE), "ppo_lag": ("PPO-Lag", BLUE)}
"""Keys of demo.json, in order: label and colour."""


def tradeoff(seeds: Mapping[str, Mapping[str, Any]]) -> Plot:
    """Helpfulness against unsafe share, with an arrow from SFT to each policy.

    Args:
        seeds: {seed: entry of demo.json}.
    """
    with panels(1, width=7.4, height=4.6) as (figure, (ax,)):
        for entry in seeds.values():
            start = _point(entry["sft"])
            for key in ("ppo", "ppo_lag"):
                end = _point(entry[key])
                ax.annotate(
                    "",
                    xy=end,
                    xytext=start,
                    arrowprops={
                        "arrowstyle": "-|>",
                        "color": POLICIES[key][1],
                        "linewidth": 1.6,
                        "shrinkA": 4,
                        "shrinkB": 5,
                    },
                )
        for key, (label, color) in POLICIES.items():
            points = [_point(entry[key]) for entry in seeds.values()]
            xs, ys = zip(*points)
            ax.scatter(xs, ys, s=46, color=color, label=label, zorder=3, linewidths=0)
            for seed, (x, y) in zip(seeds, points):
                if len(seeds) > 1:
                    ax.annotate(
                        f"{seed}", (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8, color=INK
                    )
        titled(ax, "Held-out prompts, gold scores", "unsafe responses (%)", x="helpfulness (gold)")
        ax.margins(0.12)
        ax.set_ylim(bottom=max(-2, ax.get_ylim()[0]))
        ax.legend(loc="upper left")
    many = " Numbers are seeds." if len(seeds) > 1 else ""
    return Plot(
        "tradeoff",
        "From SFT to PPO and to PPO-Lag. To the right is more helpful, down is safer: reward alone goes "
        f"right and up, the constraint should go right and down.{many}",
        figure,
    )


def _point(values: Mapping[str, float]) -> tuple[float, float]:
    return values["helpfulness"], 100 * values["unsafe_share"]


def bars(seeds: Mapping[str, Mapping[str, Any]]) -> Plot:
    """Gold helpfulness, gold unsafe share and model cost of the three policies, by seed.

    Args:
        seeds: {seed: entry of demo.json}.
    """
    kinds = (
        ("helpfulness", "Helpfulness (gold)", "gold helpfulness", 1),
        ("unsafe_share", "Unsafe responses (gold)", "%", 100),
        ("model_cost", "Model cost", "cost (cost model units)", 1),
    )
    with panels(len(kinds)) as (figure, axes):
        for ax, (name, title, unit, scale) in zip(axes, kinds):
            for i, (key, (label, color)) in enumerate(POLICIES.items()):
                heights = [scale * entry[key][name] for entry in seeds.values()]
                drawn = ax.bar(
                    [at + (i - 1) * 0.27 for at in range(len(seeds))], heights, 0.25, color=color, label=label
                )
                if len(seeds) <= 3:
                    ax.bar_label(drawn, fmt="%.0f" if scale == 100 else "%.2f", fontsize=7.5, padding=2)
            if name == "model_cost":
                for at, entry in enumerate(seeds.values()):
                    ax.hlines(
                        entry["threshold"],
                        at - 0.45,
                        at + 0.45,
                        color="#d9483b",
                        linestyle=(0, (4, 2)),
                        linewidth=1.4,
                        label="threshold d" if at == 0 else "_nolegend_",
                    )
                ax.axhline(0, color=INK, linewidth=0.8)
            titled(ax, title, unit, x="seed")
            ax.set_xticks(range(len(seeds)), list(seeds))
            ax.grid(axis="x", visible=False)
            ax.margins(y=0.12)
        handles, labels = axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return Plot("policies", "The three policies on held-out prompts, by seed.", figure)


def training(seed: str, runs: "Mapping[str, Run | None]") -> Plot | None:
    """Curves of PPO and PPO-Lag in the same panels: model scores above, gold scores below.

    Args:
        seed: for the title.
        runs: {"ppo": Run, "ppo_lag": Run}; None where there are no metrics.

    Returns:
        The plot; None without any run.
    """
    present = {key: run for key, run in runs.items() if run is not None}
    if not present:
        return None
    lag = present.get("ppo_lag")
    with panels(3, rows=2) as (figure, axes):
        for key, run in present.items():
            label, color = POLICIES[key]
            line(axes[0], run.curve("train/reward"), color, label, noisy=True)
            line(axes[1], run.curve("train/cost"), color, label, noisy=True)
            line(axes[3], run.curve("gold/helpfulness"), color, label, **DOTS)
            line(axes[4], run.curve("gold/cost"), color, label, **DOTS)
            line(axes[5], percent(run.curve("gold/unsafe_share")), color, label, **DOTS)
        if lag is not None:
            line(axes[2], lag.curve("train/lambda"), POLICIES["ppo_lag"][1], "PPO-Lag")
            level(
                axes[1], lag.threshold, "d" if lag.threshold is None else f"threshold d = {lag.threshold:.2f}"
            )
        for ax, title, unit in zip(
            axes,
            (
                "Model reward",
                "Model cost",
                "Lagrange multiplier",
                "Gold helpfulness",
                "Gold cost",
                "Gold unsafe responses",
            ),
            (
                "reward (reward model units)",
                "cost (cost model units)",
                "λ",
                "gold helpfulness",
                "gold cost",
                "%",
            ),
        ):
            titled(ax, title, unit)
        axes[2].set_ylim(bottom=0)
        axes[5].set_ylim(bottom=0)
        for ax in axes:
            legend(ax)
    return Plot(
        f"seed-{seed}-training",
        f"Seed {seed}. Above: the score models on each batch. Below: the world's gold scores on validation "
        "prompts. Where the two rows diverge, the policy exploits a score model.",
        figure,
    )


def score_models(seed: str, runs: "Mapping[str, Run]") -> Plot | None:
    """The loss of SFT and the accuracies of the score models.

    Args:
        seed: for the title.
        runs: {folder name: Run} of the supervised stages.

    Returns:
        The plot; None without any run.
    """
    drawn = [
        (name, run, key, f"{name}: {title}")
        for name, run in runs.items()
        for key, title in (("accuracy", "pair accuracy"), ("accuracy_sign", "sign accuracy"))
        if run.has(f"train/{key}")
    ]
    sft = runs.get("sft")
    count = len(drawn) + (sft is not None)
    if not count:
        return None
    columns = min(count, 4 if count > 6 else 3)
    with panels(columns, rows=-(-count // columns), width=4.0, height=2.8) as (figure, axes):
        remaining = iter(axes)
        if sft is not None:
            ax = next(remaining)
            line(ax, sft.curve("train/loss"), BLUE, "training (running mean)", noisy=True)
            titled(ax, "sft: loss", "nats per token")
            legend(ax)
        for _, run, key, title in drawn:
            draw_accuracy(next(remaining), run, key, title)
        for ax in remaining:
            ax.set_visible(False)
    return Plot(
        f"seed-{seed}-stages",
        f"Seed {seed}. The supervised stages before PPO; evaluation is on held-out prompts.",
        figure,
    )
