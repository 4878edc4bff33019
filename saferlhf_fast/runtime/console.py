"""What a user sees while something runs: progress bars, one line per step, tables of samples and results.

On a terminal, rich draws it. Anywhere else (a file, a pipe) it is plain lines without control codes, and the
bar becomes a line every few seconds. Only rank 0 prints. Text from models or data is printed with its control
characters escaped, and never read as markup.
"""

import contextlib
import os
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from ..config.sections import PAIR
from . import terminal

PLAIN_INTERVAL = 5.0  # seconds between a bar's lines where there is no terminal
PLAIN_WIDTH = 120  # columns
LONGEST_TEXT = 240  # characters of a prompt or response in a sample table
MAIN_VALUES = (
    ("reward", ("reward",)),
    ("cost", ("cost",)),
    ("λ", ("lambda", "multiplier")),
    ("KL", ("kl_divergence", "kl")),
    ("loss", ("actor_loss", "loss")),
    ("length", ("mean_generated_length", "length")),
)
"""What a step's line shows: a label, and the metric's names, each with or without train/ before it."""

_current: "Track | None" = None  # the bar in progress; a bar and the lines above it must share one Console


def say(message: object) -> None:
    """Prints a line."""
    _print(printable(str(message), keep="\n"))


def warn(message: object) -> None:
    """Prints a warning, in yellow on a terminal."""
    _print("warning: " + printable(str(message), keep="\n"), style="yellow")


@contextlib.contextmanager
def track(total: int, label: str, enabled: bool = True) -> "Iterator[Track]":
    """Shows a progress bar over steps.

        with track(120, "ppo") as bar:
            …
            bar.advance(tokens=4096, line="loss 1.2")

    A bar within another one is not shown.

    Args:
        total: Number of steps.
        label: Name in front of the bar.
        enabled: False shows nothing, nor the step lines and sample tables within the context.
    """
    global _current
    outer, bar = _current, Track(total, label, enabled and _rank() == 0 and _current is None)
    _current = outer or bar
    try:
        with bar.progress or contextlib.nullcontext():
            yield bar
            bar.end()
    finally:
        _current = outer


class Track:
    """The bar of `track`: counts steps and tokens."""

    def __init__(self, total: int, label: str, enabled: bool) -> None:
        self.total, self.label, self.enabled = total, label, enabled
        self.console = _console()
        self.done, self.line, self.start = 0, "", 0
        self.begun = self.printed = time.monotonic()
        self.recent = deque([(self.begun, 0)], maxlen=50)  # (time, tokens of the step that ended then)
        self.tokens = 0
        self.has_step_lines = False
        self.progress: Progress | None = None
        self.task = TaskID(0)
        if enabled and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TextColumn("{task.fields[line]}", table_column=Column(ratio=1, no_wrap=True)),
                console=self.console,
            )
            self.task = self.progress.add_task(escape(label), total=total, speed="", line="")

    def begin_at(self, start: int) -> None:
        """Counts from `start` on: that many steps were done before the run was resumed."""
        self.done = self.start = start
        self.begun = self.printed = time.monotonic()
        if self.progress is not None:
            self.progress.update(self.task, completed=start)

    def advance(self, tokens: int = 0, line: str | None = None) -> None:
        """Counts one step.

        Args:
            tokens: Tokens of the step.
            line: Text beside the bar; the previous one when not given.
        """
        self.done += 1
        self.tokens += int(tokens)
        self.recent.append((time.monotonic(), int(tokens)))
        self.line = self.line if line is None else printable(line)
        if self.progress is not None:
            self.progress.update(
                self.task, completed=self.done, speed=escape(self.speed()), line=escape(self.line)
            )
        elif self.enabled and not self.has_step_lines and self._is_due():
            _print(
                f"{self.label} {self.done:>{len(str(self.total))}}/{self.total}  {self.speed()}  "
                f"{self.line}".rstrip()
            )

    def speed(self) -> str:
        """Tokens per second over the last steps, and the time left at the mean pace so far."""
        if self.done == self.start:
            return ""
        (first, _), (last, _) = self.recent[0], self.recent[-1]
        tokens = sum(t for _, t in list(self.recent)[1:])
        rate = f"{tokens / max(last - first, 1e-9):,.0f} tokens/s, " if tokens else ""
        left = (time.monotonic() - self.begun) / (self.done - self.start) * max(0, self.total - self.done)
        return f"{rate}{clock(left)} left"

    def end(self) -> None:
        """Prints how long it took, where no bar shows it."""
        seconds = time.monotonic() - self.begun
        if self.enabled and self.progress is None:
            rate = f", {self.tokens / max(seconds, 1e-9):,.0f} tokens/s" if self.tokens else ""
            _print(f"{self.label}: {self.done - self.start} steps in {clock(seconds)}{rate}")

    def _is_due(self) -> bool:
        """Whether a plain line is due: at the first step, at the last, or PLAIN_INTERVAL seconds later."""
        now = time.monotonic()
        if now - self.printed < PLAIN_INTERVAL and self.done not in (self.start + 1, self.total):
            return False
        self.printed = now
        return True


def step_line(step: int, total: int, values: Mapping[str, Any]) -> None:
    """Prints one line: step, then reward, cost, λ, KL (nats), loss and length (tokens), as far as known.

    Where there is no terminal it also has what the bar would show: tokens/s and the time left.

    Args:
        step: Steps done, from 1.
        total: Number of steps.
        values: Numbers or 0-d tensors by metric name, with or without train/; None is left out.
    """
    if _current is not None:
        if not _current.enabled:
            return
        _current.has_step_lines = True
    shown = []
    for label, names in MAIN_VALUES:
        known = [
            values[key] for name in names for key in (name, f"train/{name}") if values.get(key) is not None
        ]
        if known:
            value = float(known[0])
            shown.append(f"{label} {f'{value:.1f}' if label == 'length' else number(value):>7}")
    speed = _current.speed() if _current is not None and _current.progress is None else ""
    _print("  ".join([f"step {step:>{len(str(total))}}/{total}", *shown, *([speed] if speed else [])]))


def sample_table(rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints samples as a table.

    Args:
        rows: Of each sample `prompt`, `response` and, where measured, `reward`, `cost` or `cost/<name>`.
    """
    rows = list(rows)
    if not rows or (_current is not None and not _current.enabled):
        return
    # "cost/<name>" where there are several costs
    names = dict.fromkeys(name for row in rows for name in row if name.partition("/")[0] in PAIR)
    scores = [name for name in names if any(row.get(name) is not None for row in rows)]
    if not _console().is_terminal:
        for i, row in enumerate(rows, 1):
            shown = "  ".join(f"{name} {number(row.get(name))}" for name in scores)
            _print(f"sample {i}  {shown}".rstrip())
            _print(f"  prompt:   {shorten(row['prompt'])}")
            _print(f"  response: {shorten(row['response'])}")
        return
    table = Table(
        Column("prompt", ratio=2),
        Column("response", ratio=3),
        *(Column(name, justify="right", no_wrap=True) for name in scores),
        expand=True,
        show_lines=True,
    )
    for row in rows:
        table.add_row(
            escape(shorten(row["prompt"])),
            escape(shorten(row["response"])),
            *(number(row.get(name)) for name in scores),
        )
    _print(table)


def result_table(title: object, columns: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    """Prints a table: the first column left-aligned, the others right-aligned.

    Args:
        title: Line above the table.
        columns: Names of the columns.
        rows: A value for each column; floats are shown with 4 digits behind the point, None as a dash.
    """
    heads = [printable(str(c)) for c in columns]
    cells_of_rows = [[_cell(value) for value in row] for row in rows]
    if not _console().is_terminal:
        widths = [max(cell_len(line[i]) for line in [heads, *cells_of_rows]) for i in range(len(heads))]
        _print(printable(str(title)))
        for line in [heads, *cells_of_rows]:
            padded = [(" " * (w - cell_len(c))) for c, w in zip(line, widths)]
            cells = [c + p if i == 0 else p + c for i, (c, p) in enumerate(zip(line, padded))]
            _print("  " + "  ".join(cells).rstrip())
        return
    table = Table(
        *(Column(escape(c), justify="right" if i else "left") for i, c in enumerate(heads)),
        title=escape(printable(str(title))),
        title_justify="left",
    )
    for cells in cells_of_rows:
        table.add_row(*map(escape, cells))
    _print(table)


def number(value: Any) -> str:
    """A number as people read it, in at most 8 characters; a dash for None."""
    if value is None:
        return "–"
    value = float(value)
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.1e}"


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 3:02:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def printable(text: str, keep: str = "") -> str:
    """Text that cannot control a terminal: control, direction and invalid characters become escapes.

    Args:
        text: Any text.
        keep: Characters that stay as they are.
    """
    return "".join(
        c
        if c in keep or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else {"\n": "⏎", "\t": " "}.get(c) or c.encode("unicode_escape").decode()
        for c in text
    )


def shorten(text: str, longest: int = LONGEST_TEXT) -> str:
    """Beginning and end of a long text on one line, printable.

    Args:
        text: Any text.
        longest: Most characters of the text that are left unshortened.
    """
    if len(text) > longest:
        text = text[: longest * 2 // 3] + " … " + text[-(longest - longest * 2 // 3 - 3) :]
    return printable(text)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))


def _print(what: str | Table, style: str | None = None) -> None:
    """Prints a text as it is, or a table, on rank 0."""
    if _rank() != 0:
        return
    console = _current.console if _current is not None else _console()
    # soft_wrap: rich would break plain lines at 80 columns where there is no terminal.
    console.print(
        what,
        style=style,
        markup=not isinstance(what, str),
        highlight=False,
        emoji=False,
        soft_wrap=isinstance(what, str),
    )


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _console() -> Console:
    """The Console of the current stdout.

    While a bar runs it is the bar's own, since rich replaces sys.stdout meanwhile.
    """
    return _current.console if _current is not None else _console_of(sys.stdout)


@lru_cache(maxsize=1)
def _console_of(stream: TextIO) -> Console:
    terminal.make_readable(stream)
    if getattr(stream, "isatty", lambda: False)():
        return Console(file=stream)
    return Console(file=stream, width=PLAIN_WIDTH, force_terminal=False, color_system=None, no_color=True)
