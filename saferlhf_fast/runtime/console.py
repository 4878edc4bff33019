"""What a user sees while something runs: progress bars, one line per step, tables of samples and results.

On a terminal it is drawn with rich. Anywhere else (a file, a pipe) it is plain lines without control codes,
and the bar becomes a line every few seconds. Only rank 0 prints. Text that models or data wrote is shown with
its control characters escaped, and never read as markup.
"""

import contextlib
import os
import sys
import time
import unicodedata
from collections import deque
from functools import lru_cache

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from ..config.sections import PAIR

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
"""What a step's line shows: label, and the metric names it is looked up under, with or without train/."""

_current = None  # the Track in progress; a bar and the lines above it must share one Console


def say(message):
    """Prints a line."""
    _print(printable(str(message), keep="\n"))


def warn(message):
    """Prints a line that should not be overlooked."""
    _print("warning: " + printable(str(message), keep="\n"), style="yellow")


@contextlib.contextmanager
def track(total, label, enabled=True):
    """A bar over `total` steps: `with track(120, "ppo") as bar: … bar.advance(tokens=4096, line="loss 1.2")`.

    enabled=False shows nothing, step lines and sample tables inside it included.
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

    def __init__(self, total, label, enabled):
        self.total, self.label, self.enabled = total, label, enabled
        self.console = _console()
        self.done, self.line, self.start = 0, "", 0
        self.begun = self.printed = time.monotonic()
        self.recent = deque([(self.begun, 0)], maxlen=50)  # (time, tokens of the step that ended then)
        self.tokens = 0
        self.has_step_lines = False
        self.progress = self.task = None
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

    def begin_at(self, start):
        """So many steps were done in an earlier run."""
        self.done = self.start = start
        self.begun = self.printed = time.monotonic()
        if self.progress is not None:
            self.progress.update(self.task, completed=start)

    def advance(self, tokens=0, line=None):
        """One step is done. tokens: how many it took · line: what to show beside the bar."""
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

    def speed(self):
        """Tokens per second over the last steps, and time left at the mean pace so far."""
        if self.done == self.start:
            return ""
        (first, _), (last, _) = self.recent[0], self.recent[-1]
        tokens = sum(t for _, t in list(self.recent)[1:])
        rate = f"{tokens / max(last - first, 1e-9):,.0f} tokens/s, " if tokens else ""
        left = (time.monotonic() - self.begun) / (self.done - self.start) * max(0, self.total - self.done)
        return f"{rate}{clock(left)} left"

    def end(self):
        """Says how long it took, where no bar shows it."""
        seconds = time.monotonic() - self.begun
        if self.enabled and self.progress is None:
            rate = f", {self.tokens / max(seconds, 1e-9):,.0f} tokens/s" if self.tokens else ""
            _print(f"{self.label}: {self.done - self.start} steps in {clock(seconds)}{rate}")

    def _is_due(self):
        now = time.monotonic()
        if now - self.printed < PLAIN_INTERVAL and self.done not in (self.start + 1, self.total):
            return False
        self.printed = now
        return True


def step_line(step, total, values):
    """Prints one line: step, then reward, cost, λ, KL (nats), loss and length (tokens), those that values
    has.

    Where there is no terminal it also has what the bar would show: tokens/s and time left.
    """
    if _current is not None:
        if not _current.enabled:
            return
        _current.has_step_lines = True
    shown = []
    for label, names in MAIN_VALUES:
        found = [
            values[key] for name in names for key in (name, f"train/{name}") if values.get(key) is not None
        ]
        if found:
            value = float(found[0])
            shown.append(f"{label} {f'{value:.1f}' if label == 'length' else number(value):>7}")
    speed = _current.speed() if _current is not None and _current.progress is None else ""
    _print("  ".join([f"step {step:>{len(str(total))}}/{total}", *shown, *([speed] if speed else [])]))


def sample_table(rows):
    """Prints sample rows: dicts with prompt, response and, where measured, reward and cost."""
    rows = list(rows)
    if not rows or (_current is not None and not _current.enabled):
        return
    # cost/<name> of several
    names = dict.fromkeys(name for row in rows for name in row if name.partition("/")[0] in PAIR)
    scores = [name for name in names if any(row.get(name) is not None for row in rows)]
    if not _console().is_terminal:
        for i, row in enumerate(rows, 1):
            said = "  ".join(f"{name} {number(row.get(name))}" for name in scores)
            _print(f"sample {i}  {said}".rstrip())
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


def result_table(title, columns, rows):
    """Prints a table: the first column left-aligned, the others right. Floats get 4 digits, None a dash."""
    columns = [printable(str(c)) for c in columns]
    rows = [[_cell(value) for value in row] for row in rows]
    if not _console().is_terminal:
        widths = [max(cell_len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
        _print(printable(str(title)))
        for line in [columns, *rows]:
            padded = [(" " * (w - cell_len(c))) for c, w in zip(line, widths)]
            cells = [c + p if i == 0 else p + c for i, (c, p) in enumerate(zip(line, padded))]
            _print("  " + "  ".join(cells).rstrip())
        return
    table = Table(
        *(Column(escape(c), justify="right" if i else "left") for i, c in enumerate(columns)),
        title=escape(printable(str(title))),
        title_justify="left",
    )
    for row in rows:
        table.add_row(*map(escape, row))
    _print(table)


def number(value):
    """A number for people, in at most 8 characters; a dash for None."""
    if value is None:
        return "–"
    value = float(value)
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.1e}"


def clock(seconds):
    """Seconds as 0:07, 12:30 or 3:02:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def printable(text, keep=""):
    """Text that a terminal cannot be steered by: control, direction and invalid characters stand as escapes."""
    return "".join(
        c
        if c in keep or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else {"\n": "⏎", "\t": " "}.get(c) or c.encode("unicode_escape").decode()
        for c in text
    )


def shorten(text, longest=LONGEST_TEXT):
    """Beginning and end of a long text on one line, printable."""
    if len(text) > longest:
        text = text[: longest * 2 // 3] + " … " + text[-(longest - longest * 2 // 3 - 3) :]
    return printable(text)


def _cell(value):
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))


def _print(what, style=None):
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


def _rank():
    return int(os.environ.get("RANK", "0"))


def _console():
    """The Console of the current stdout; a running bar keeps its own, since rich replaces sys.stdout under
    it.
    """
    return _current.console if _current is not None else _console_of(sys.stdout)


@lru_cache(maxsize=1)
def _console_of(stream):
    # A terminal that cannot show λ gets a question mark instead of an exception.
    if hasattr(stream, "reconfigure") and not (stream.encoding or "").lower().startswith("utf"):
        stream.reconfigure(errors="replace")
    if getattr(stream, "isatty", lambda: False)():
        return Console(file=stream)
    return Console(file=stream, width=PLAIN_WIDTH, force_terminal=False, color_system=None, no_color=True)
