"""Functions that make HTML and escape their texts, and one page that loads nothing from elsewhere."""

from collections.abc import Callable, Collection, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ...runtime.console import printable

if TYPE_CHECKING:
    from .plots import Plot

CSS = """
:root { color-scheme: light dark; --ink: #1f2329; --soft: #5b636e; --page: #ffffff; --card: #f5f6f8;
  --rule: #dfe3e8; --good: #1c7d55; --bad: #c0392b }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a0a8b3; --page: #15181d;
  --card: #1f242b; --rule: #343b45; --good: #4cc38f; --bad: #ff7b6b } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 28px 24px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.7em; margin: 0 0 2px } h2 { font-size: 1.2em; margin: 34px 0 6px } p { margin: 6px 0 }
.soft, figcaption { color: var(--soft); font-size: .92em }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 }
.card { background: var(--card); border-radius: 10px; padding: 10px 16px; min-width: 130px }
.card b { display: block; font-size: 1.3em; font-variant-numeric: tabular-nums }
.good { color: var(--good) } .bad { color: var(--bad) }
figure { margin: 14px 0 0 } svg { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: 10px 0; font-size: .94em }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top;
  font-variant-numeric: tabular-nums }
th { font-weight: 600; color: var(--soft); vertical-align: bottom }
.name, .text td, .text th { text-align: left }
.text td { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 150px }
.text td.number { white-space: nowrap; text-align: right; min-width: 0 } .text th.number { text-align: right }
details { margin: 12px 0 } summary { cursor: pointer; color: var(--soft) }
pre { background: var(--card); padding: 14px; border-radius: 10px; overflow-x: auto; font-size: .86em;
  line-height: 1.4 }
"""


class Raw(str):
    """HTML that is already escaped."""


def text(value: object) -> str:
    """Any value as escaped text, Raw as it is; a dash for None."""
    if isinstance(value, Raw):
        return str(value)
    return "–" if value is None else escape(printable(str(value), keep="\n\t"))


def page(title: object, subtitle: object, parts: Iterable[str]) -> str:
    """The whole document: a title, a line under it, and HTML parts; empty parts are left out.

    Args:
        title: Text, which is escaped.
        subtitle: Text, which is escaped.
        parts: HTML, which is taken as it is.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{CSS}</style></head><body>\n"
        f'<h1>{text(title)}</h1><p class="soft">{text(subtitle)}</p>\n'
        + "\n".join(p for p in parts if p)
        + "\n</body></html>\n"
    )


def section(title: object, *parts: str) -> Raw:
    """A heading with HTML parts under it; empty when all parts are."""
    shown = [part for part in parts if part]
    return Raw(f"<h2>{text(title)}</h2>\n" + "\n".join(shown)) if shown else Raw("")


def cards(items: Iterable[tuple[object, object, str]]) -> Raw:
    """A row of figures.

    Args:
        items: (label, value, kind), where the kind is "good", "bad" or "".
    """
    return Raw(
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span class="soft">{text(label)}</span><b '
            f'class="{kind}">{text(value)}</b></div>'
            for label, value, kind in items
        )
        + "</div>"
    )


def figure(plot: "Plot") -> Raw:
    """A plot as inline SVG, and its caption."""
    return Raw(
        f'<figure><div class="scroll">{plot.svg()}</div>'
        f"<figcaption>{text(plot.caption)}</figcaption></figure>"
    )


def table(columns: Sequence[object], rows: Sequence[Sequence[object]], names: int = 1) -> Raw:
    """A table of numbers: the first `names` columns are aligned left, the others right.

    Args:
        columns: Titles of the columns.
        rows: A cell for each column.
        names: How many columns at the beginning hold names.
    """
    return _table("", columns, rows, lambda i: ' class="name"' if i < names else "")


def text_table(
    columns: Sequence[object], rows: Sequence[Sequence[object]], numeric: Collection[int] = ()
) -> Raw:
    """A table of texts, which may be long; `numeric` are the indices of number columns.

    Args:
        columns: Titles of the columns.
        rows: A cell for each column.
        numeric: Indices of the columns that are aligned right.
    """
    return _table("text", columns, rows, lambda i: ' class="number"' if i in numeric else "")


def _table(
    kind: str,
    columns: Sequence[object],
    rows: Sequence[Sequence[object]],
    attribute: Callable[[int], str],
) -> Raw:
    """A table, empty without rows; `attribute` gives a column's class attribute by its index."""
    if not rows:
        return Raw("")
    head = "".join(f"<th{attribute(i)}>{text(c)}</th>" for i, c in enumerate(columns))
    body = "\n".join(
        "<tr>" + "".join(f"<td{attribute(i)}>{text(c)}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return Raw(
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(title: object, *parts: str) -> Raw:
    """HTML parts behind a line that opens them; empty when all parts are."""
    shown = [part for part in parts if part]
    return Raw(f"<details><summary>{text(title)}</summary>{''.join(shown)}</details>") if shown else Raw("")


def preformatted(value: object) -> Raw:
    """Text in a fixed-width font; empty without text."""
    return Raw(f"<pre>{text(value)}</pre>") if value else Raw("")


def paragraph(value: object) -> Raw:
    """A paragraph."""
    return Raw(f"<p>{text(value)}</p>")
