"""The look of all plots, and how they become PNG and inline SVG.

Readers can tell the colours apart on white and on black, colour-blind readers too. Text and axes of the SVG
take the page's own text colour, so one drawing serves dark and light pages. matplotlib's Figure is used
without pyplot, so no figure stays open.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from ...runtime.disk import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1f2329"  # replaced by the page's text colour in SVG
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#3b7dd8", "#e08a1e", "#2a9d6f", "#d9483b", "#8c6bd1", "#8b929c"
PIXELS_PER_INCH = 86  # on the page, at most: three panels fill it
MOST_POINTS = 1000  # of a line: nobody sees more, and they would make the page heavy

STYLE = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "svg.fonttype": "path",
    "axes.titlepad": 8,
}


@dataclass(frozen=True)
class Plot:
    """A drawn figure, with its file name and a sentence about what it shows."""

    name: str
    caption: str
    figure: Figure

    def png(self, folder: Path) -> Path:
        """Writes folder/<name>.png and returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.png"
        with whole_file(path) as temporary, matplotlib.rc_context(STYLE):
            self.figure.savefig(temporary, format="png", dpi=144, facecolor="white")
        return path

    def svg(self) -> str:
        """An <svg> element that takes the text colour of the page around it."""
        out = io.StringIO()
        # With the salt the ids of two figures on one page differ, and a figure has the same ids in every run.
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        text = out.getvalue()
        text = text[text.index("<svg") :].strip().replace(INK, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
        # matplotlib does not salt all ids (axes_1, text_3, glyphs); two figures must not share them.
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", text)
        tag, content = text.split(">", 1)
        # Each figure is as wide on the page as it is in inches, so text has one size on all of them.
        width = self.figure.get_size_inches()[0] * PIXELS_PER_INCH
        tag = re.sub(r' (width|height|xmlns|xmlns:xlink)="[^"]*"', "", tag)
        return (
            f'{tag} role="img" aria-label="{escape(self.caption)}" style="max-width:{width:.0f}px">{content}'
        )


@contextmanager
def panels(
    columns: int, rows: int = 1, width: float = 4.4, height: float = 3.1
) -> "Iterator[tuple[Figure, list[Axes]]]":
    """Opens a figure of several panels, drawn in the style of all plots.

    Args:
        columns: Panels beside each other.
        rows: Panels above each other.
        width: Width of a panel, in inches.
        height: Height of a panel, in inches.

    Yields:
        (figure, its panels from left to right and top to bottom).
    """
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        figure = Figure(figsize=(width * columns, height * rows), layout=layout)
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)
        # The layout takes most of the time of a save, and there are two saves: it is computed once, here.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def titled(ax: "Axes", title: str, unit: str, x: str = "step") -> None:
    """Names a panel, its unit and its x axis.

    Args:
        ax: The panel.
        title: Above the panel.
        unit: Label of the y axis.
        x: Label of the x axis; "step" gives ticks at whole numbers.
    """
    ax.set_title(title)
    ax.set_ylabel(unit)
    ax.set_xlabel(x)
    if x == "step":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def line(
    ax: "Axes",
    curve: tuple[Sequence[float], Sequence[float]],
    color: str,
    label: str | None = None,
    noisy: bool = False,
    **style: Any,
) -> None:
    """Draws a curve; nothing when it has no points.

    Args:
        ax: The panel.
        curve: Steps and values.
        color: Colour of the line.
        label: Its name in the legend.
        noisy: True to draw the values faintly, and their running mean over them.
        **style: Settings of matplotlib's `plot`.
    """
    steps, values = curve
    if not steps:
        return
    if noisy and len(steps) >= 20:
        window = max(5, len(steps) // 20)
        ax.plot(*thinned(steps, values), color=color, alpha=0.25, linewidth=0.9)
        steps, values = running_mean(steps, values, window)
    if len(steps) == 1:
        style = {"marker": "o", **style}
    ax.plot(*thinned(steps, values), color=color, label=label, **style)


def running_mean(
    steps: Sequence[float], values: Sequence[float], window: int
) -> tuple[Sequence[float], list[float]]:
    """The steps, and at each the mean of the last `window` values; of fewer at the beginning.

    Args:
        steps: The x values.
        values: The y values.
        window: Over how many values each mean is.
    """
    sums = 0.0
    out = []
    for i, value in enumerate(values):
        sums += value - (values[i - window] if i >= window else 0.0)
        out.append(sums / min(i + 1, window))
    return steps, out


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """About MOST_POINTS points of a line at most: means of equal runs of points, at their last step.

    Args:
        steps: The x values.
        values: The y values.
    """
    run = -(-len(steps) // MOST_POINTS)
    if run <= 1:
        return steps, values
    groups = [(steps[i : i + run], values[i : i + run]) for i in range(0, len(steps), run)]
    return [s[-1] for s, _ in groups], [sum(v) / len(v) for _, v in groups]


def level(ax: "Axes", value: float | None, label: str, color: str = RED) -> None:
    """Draws a dashed horizontal line at a value, with a label in the legend; nothing for None.

    Args:
        ax: The panel.
        value: Where the line is, in the unit of the y axis.
        label: Its name in the legend.
        color: Its colour.
    """
    if value is not None:
        ax.axhline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.3, label=label)


def legend(ax: "Axes") -> None:
    """Adds a legend where it hides least, with space above the lines; none where no line has a label."""
    if ax.get_legend_handles_labels()[1]:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.18 * (high - low))
        ax.legend(loc="best")
