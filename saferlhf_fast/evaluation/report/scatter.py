"""Reward against cost, one point per response: the paper's picture of what safety training does.

Four quadrants: safe or unsafe by the sign of the cost (above 0 is unsafe), better or worse than the starting
policy's mean reward.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .plots import GREEN, INK, ORANGE, PURPLE, RED, Plot, panels, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
"""A row of an evaluation; here with a reward and a cost."""

QUADRANTS = (
    ("unsafe, worse", RED),
    ("unsafe, better", ORANGE),
    ("safe, worse", PURPLE),
    ("safe, better", GREEN),
)
MOST_POINTS = 1500  # drawn on one panel; counts are of all points


def counts(rows: Iterable[Row], mean_reward: float) -> dict[str, int]:
    """Number of rows in each quadrant.

    A cost of exactly 0 is safe, and a reward of exactly `mean_reward` is better.

    Args:
        rows: Rows of an evaluation, with reward and cost.
        mean_reward: Mean reward of the starting policy.
    """
    out = dict.fromkeys((name for name, _ in QUADRANTS), 0)
    for row in rows:
        out[quadrant(row, mean_reward)] += 1
    return out


def quadrant(row: Row, mean_reward: float) -> str:
    """The quadrant of one row."""
    return ("unsafe" if row["cost"] > 0 else "safe") + (
        ", better" if row["reward"] >= mean_reward else ", worse"
    )


def scored(rows: Iterable[Row]) -> list[Row]:
    """The rows whose two scores are finite."""

    def finite(value: object) -> bool:
        return isinstance(value, (int, float)) and abs(value) < float("inf")

    return [row for row in rows if finite(row.get("reward")) and finite(row.get("cost"))]


def scatter(
    evaluations: Iterable[tuple[str, Iterable[Row]]], threshold: float | None = None, name: str = "scatter"
) -> Plot | None:
    """Draws reward against cost, a panel for each evaluation.

    Args:
        evaluations: (title, rows) of each; the first is the starting policy.
        threshold: d, in cost model units; None draws no line.
        name: File name of the plot.

    Returns:
        The plot; None when an evaluation has no row with both scores.
    """
    sides = [(title, scored(rows)) for title, rows in evaluations]
    if not sides or any(not rows for _, rows in sides):
        return None
    start = sides[0][1]
    mean_reward = sum(row["reward"] for row in start) / len(start)
    everything = [row for _, rows in sides for row in rows]
    x_limits = _limits([row["reward"] for row in everything], mean_reward)
    y_limits = _limits([row["cost"] for row in everything], 0.0)
    with panels(len(sides), width=4.4 if len(sides) > 2 else 5.2, height=4.3) as (figure, axes):
        for ax, (title, rows) in zip(axes, sides):
            ax.set_xlim(*x_limits)
            ax.set_ylim(*y_limits)
            _panel(ax, title, rows, mean_reward, threshold, 8.5 if len(sides) <= 2 else 7.4)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return Plot(
        name,
        "Each point is one response. Right of the vertical line: a higher reward than the start's mean; "
        "above the horizontal one: unsafe.",
        figure,
    )


def _panel(
    ax: "Axes",
    title: str,
    rows: Sequence[Row],
    mean_reward: float,
    threshold: float | None,
    font_size: float,
) -> None:
    """Draws the points of one evaluation, the lines between the quadrants, and the count in each corner."""
    shown = rows if len(rows) <= MOST_POINTS else random.Random(0).sample(rows, MOST_POINTS)
    colors = dict(QUADRANTS)
    for key, color in colors.items():
        points = [row for row in shown if quadrant(row, mean_reward) == key]
        rewards, costs = [row["reward"] for row in points], [row["cost"] for row in points]
        ax.scatter(rewards, costs, s=13, alpha=0.6, color=color, linewidths=0)
    ax.axvline(mean_reward, color=INK, linewidth=0.9)
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
    for (key, number), (x, y) in zip(counts(rows, mean_reward).items(), ((0, 1), (1, 1), (0, 0), (1, 0))):
        ax.text(
            0.015 if x == 0 else 0.985,
            0.985 if y else 0.015,
            f"{key}: {number} ({100 * number / len(rows):.0f} %)",
            transform=ax.transAxes,
            ha="right" if x else "left",
            va="top" if y else "bottom",
            fontsize=font_size,
            fontweight="bold",
            color=colors[key],
        )
    titled(ax, title, "cost (cost model units)", x="reward (reward model units)")


def _limits(values: Iterable[float], include: float) -> tuple[float, float]:
    """Axis limits of some values and one more, with room for the texts in the corners."""
    low, high = min(*values, include), max(*values, include)
    room = 0.12 * (high - low or 1.0)
    return low - room, high + room
