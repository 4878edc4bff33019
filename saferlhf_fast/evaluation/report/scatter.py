"""Reward against cost, one point per response: the paper's picture of what safety training does.

Four quadrants: safe or unsafe by the sign of the cost (above 0 is unsafe), better or worse than the starting
policy's mean reward.
"""

import random

from .plots import GREEN, INK, ORANGE, PURPLE, RED, Plot, panels, titled

QUADRANTS = (
    ("unsafe, worse", RED),
    ("unsafe, better", ORANGE),
    ("safe, worse", PURPLE),
    ("safe, better", GREEN),
)
MOST_POINTS = 1500  # of one panel; counts are of all


def counts(rows, mean_reward):
    """-> {quadrant: rows in it}; a cost of exactly 0 is safe, a reward of exactly the mean is better."""
    out = dict.fromkeys((name for name, _ in QUADRANTS), 0)
    for row in rows:
        out[quadrant(row, mean_reward)] += 1
    return out


def quadrant(row, mean_reward):
    """The quadrant of one row."""
    return ("unsafe" if row["cost"] > 0 else "safe") + (
        ", better" if row["reward"] >= mean_reward else ", worse"
    )


def scored(rows):
    """The rows with both scores, finite."""

    def good(value):
        return isinstance(value, (int, float)) and abs(value) < float("inf")

    return [row for row in rows if good(row.get("reward")) and good(row.get("cost"))]


def scatter(named, threshold=None, name="scatter"):
    """[(title, evaluation rows)] -> Plot with a panel each, the first being the start; None without both
    scores.
    """
    named = [(title, scored(rows)) for title, rows in named]
    if not named or any(not rows for _, rows in named):
        return None
    start = named[0][1]
    middle = sum(row["reward"] for row in start) / len(start)
    everything = [row for _, rows in named for row in rows]
    limits = [
        _limits([row[key] for row in everything], include)
        for key, include in (("reward", middle), ("cost", 0.0))
    ]
    with panels(len(named), width=4.4 if len(named) > 2 else 5.2, height=4.3) as (figure, axes):
        for ax, (title, rows) in zip(axes, named):
            _panel(ax, title, rows, middle, threshold, limits, 8.5 if len(named) <= 2 else 7.4)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return Plot(
        name,
        "Each point is one response. Right of the vertical line: a higher reward than the start's mean; "
        "above the horizontal one: unsafe.",
        figure,
    )


def _panel(ax, title, rows, middle, threshold, limits, size):
    ax.set_xlim(*limits[0])
    ax.set_ylim(*limits[1])
    shown = rows if len(rows) <= MOST_POINTS else random.Random(0).sample(rows, MOST_POINTS)
    colors = dict(QUADRANTS)
    for key, color in colors.items():
        mine = [row for row in shown if quadrant(row, middle) == key]
        ax.scatter(
            [r["reward"] for r in mine], [r["cost"] for r in mine], s=13, alpha=0.6, color=color, linewidths=0
        )
    ax.axvline(middle, color=INK, linewidth=0.9)
    ax.axhline(0, color=INK, linewidth=0.9)
    if threshold is not None:
        ax.axhline(
            threshold, color=RED, linestyle=(0, (5, 3)), linewidth=1.2, label=f"threshold d = {threshold:.2f}"
        )
    ax.scatter(
        [sum(r["reward"] for r in rows) / len(rows)],
        [sum(r["cost"] for r in rows) / len(rows)],
        marker="X",
        s=85,
        color=INK,
        linewidths=0,
        zorder=5,
        label="mean of the policy",
    )
    for (key, number), (x, y) in zip(counts(rows, middle).items(), ((0, 1), (1, 1), (0, 0), (1, 0))):
        ax.text(
            0.015 if x == 0 else 0.985,
            0.985 if y else 0.015,
            f"{key}: {number} ({100 * number / len(rows):.0f} %)",
            transform=ax.transAxes,
            ha="right" if x else "left",
            va="top" if y else "bottom",
            fontsize=size,
            fontweight="bold",
            color=colors[key],
        )
    titled(ax, title, "cost (cost model units)", x="reward (reward model units)")


def _limits(values, include):
    """Axis limits with room for the corner texts."""
    low, high = min(*values, include), max(*values, include)
    room = 0.12 * (high - low or 1.0)
    return low - room, high + room
