"""Counts the rows of each source that are used, and those that are not, with the reasons."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from saferlhf_fast.data.files import shorten
from saferlhf_fast.errors import UserError


@dataclass
class SourceReport:
    """The counts of one source. Examples may outnumber rows: some formats hold several records in a row."""

    path: str
    format: str
    available: int
    """Rows that the source has."""
    rows: int
    """Rows taken, after count and proportion."""
    unread: tuple[str, ...] = ()
    """Columns that are not read."""
    kept: int = 0
    """Examples made of them."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> records not used."""
    flagged: Counter[str] = field(default_factory=Counter)
    """Remark -> records used in spite of it."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason or remark -> the first place where it occurs."""

    def drop(self, reason: str, where: str) -> None:
        """Counts a record that is not used."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def flag(self, remark: str, where: str) -> None:
        """Counts a record that is used and has a remark."""
        self.flagged[remark] += 1
        self.first.setdefault(remark, where)

    def place(self, reason: str) -> str:
        """Returns where a reason or a remark first occurs, without the source's own path."""
        return self.first[reason].removeprefix(self.path).lstrip(" /")


@dataclass
class Report:
    """The counts of all sources of one data setting."""

    sources: list[SourceReport] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Examples made of all sources."""
        return sum(source.kept for source in self.sources)

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> records not used, of all sources."""
        return sum((source.dropped for source in self.sources), Counter())

    @property
    def flagged(self) -> Counter[str]:
        """Remark -> records used in spite of it, of all sources."""
        return sum((source.flagged for source in self.sources), Counter())

    def lines(self) -> list[str]:
        """Returns one line per source and one per reason, for the terminal."""
        lines = []
        for source in self.sources:
            taken = "" if source.rows == source.available else f" of {source.available}"
            lines.append(
                f"{source.path} ({source.format}): {source.rows}{taken} rows, {source.kept} examples"
            )
            if source.unread:
                lines.append(f"  columns that are not used: {shorten(', '.join(source.unread), 400)}")
            for word, counts in (("dropped", source.dropped), ("flagged", source.flagged)):
                lines += [
                    f"  {n} {word}: {reason} (first: {source.place(reason)})"
                    for reason, n in counts.most_common()
                ]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts as plain types, for metrics and the run folder."""
        return {
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "flagged": dict(self.flagged),
            "sources": [
                {
                    "path": s.path,
                    "format": s.format,
                    "available": s.available,
                    "rows": s.rows,
                    "kept": s.kept,
                    "unread": list(s.unread),
                    "dropped": dict(s.dropped),
                    "flagged": dict(s.flagged),
                }
                for s in self.sources
            ],
        }

    def require(self, what: str) -> None:
        """Checks that an example is left; `what` is its name in the message.

        Raises:
            UserError: None is left; the message has the reasons.
        """
        if self.kept:
            return
        reasons = [
            f"{n} dropped: {reason} (first: {source.place(reason)})"
            for source in self.sources
            for reason, n in source.dropped.most_common()
        ]
        rows = sum(source.rows for source in self.sources)
        raise UserError(
            f"{', '.join(source.path for source in self.sources)}: no usable {what} in {rows} rows; "
            + "; ".join(reasons)
        )
