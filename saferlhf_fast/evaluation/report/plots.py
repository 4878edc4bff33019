"""The look of all plots, and how they become PNG and inline SVG.

Colours are told apart on white and on black and by colour-blind readers. Text and axes of the SVG take the
page's own text colour, so one drawing serves dark and light. matplotlib's Figure is used without pyplot:
nothing stays open.
"""

import io
import re
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#1f2329"  # replaced by the page's text colour in SVG
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#3b7dd8", "#e08a1e", "#2a9d6f", "#d9483b", "#8c6bd1", "#8b929c"
PIXELS_PER_INCH = 86  # on the page, at most: three panels fill it
MOST_POINTS = 1000  # of a line: more cannot be seen and would make the page heavy

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
    """A drawn figure: its file name, and what it shows in a sentence."""

    name: str
    caption: str
    figure: Figure

    def png(self, folder):
        """Writes folder/<name>.png and returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.png"
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(path, format="png", dpi=144, facecolor="white")
        return path

    def svg(self):
        """-> an <svg> element that takes the text colour of the page around it."""
        out = io.StringIO()
        # The salt makes ids of several figures on one page differ, and those of one figure the same at each
        # run.
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        text = out.getvalue()
        text = text[text.index("<svg") :].strip().replace(INK, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
        # Ids that matplotlib does not salt (axes_1, text_3, glyphs) would stand on the page several times.
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", text)
        tag, rest = text.split(">", 1)
        # Text is of one size on all figures: each is as wide on the page as it is in inches.
        width = self.figure.get_size_inches()[0] * PIXELS_PER_INCH
        tag = re.sub(r' (width|height|xmlns|xmlns:xlink)="[^"]*"', "", tag)
        return f'{tag} role="img" aria-label="{escape(self.caption)}" style="max-width:{width:.0f}px">{rest}'


@contextmanager
def panels(columns, rows=1, width=4.4, height=3.1):
    """-> (figure, axes [rows·columns], left to right and top to bottom), drawn in our style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)
        # The layout is found once, not at each of two savings, where it takes most of the time.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def titled(ax, title, unit, x="step"):
    """Names a panel, its unit and its x axis."""
    ax.set_title(title)
    ax.set_ylabel(unit)
    ax.set_xlabel(x)
    if x == "step":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def line(ax, curve, color, label=None, noisy=False, **style):
    """Draws (steps, values); a noisy one faintly, with its running mean over it.

    Draws nothing when it is empty.
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


def running_mean(steps, values, window):
    """Mean of the last `window` values at each step; of those there are, at the beginning."""
    sums, out = 0.0, []
    for i, value in enumerate(values):
        sums += value - (values[i - window] if i >= window else 0.0)
        out.append(sums / min(i + 1, window))
    return steps, out


def thinned(steps, values):
    """At most about MOST_POINTS of a line's points: means of equal runs."""
    run = -(-len(steps) // MOST_POINTS)
    if run <= 1:
        return steps, values
    groups = [(steps[i : i + run], values[i : i + run]) for i in range(0, len(steps), run)]
    return [s[-1] for s, _ in groups], [sum(v) / len(v) for _, v in groups]


def level(ax, value, label, color=RED):
    """A dashed line at a value, its label in the legend."""
    if value is not None:
        ax.axhline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.3, label=label)


def legend(ax):
    """A legend where the fewest lines are, with air above the lines for it; none for a single nameless line."""
    if ax.get_legend_handles_labels()[1]:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.18 * (high - low))
        ax.legend(loc="best")
