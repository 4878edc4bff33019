"""What became of the rows: how many of each source are used, and how many are not and why."""

from collections import Counter
from dataclasses import dataclass, field

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
    kept: int = 0
    """Examples made of them."""
    dropped: Counter = field(default_factory=Counter)
    """Reason -> records not used."""
    flagged: Counter = field(default_factory=Counter)
    """Remark -> records used all the same."""
    first: dict = field(default_factory=dict)
    """Reason or remark -> the first place where it occurs."""

    def drop(self, reason, where):
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def flag(self, remark, where):
        self.flagged[remark] += 1
        self.first.setdefault(remark, where)

    def place(self, reason):
        """Where a reason first occurs, without the source's own path."""
        return self.first[reason].removeprefix(self.path).lstrip(" /")


@dataclass
class Report:
    """The counts of all sources of one data setting."""

    sources: list = field(default_factory=list)

    @property
    def kept(self):
        return sum(source.kept for source in self.sources)

    @property
    def dropped(self):
        return sum((source.dropped for source in self.sources), Counter())

    @property
    def flagged(self):
        return sum((source.flagged for source in self.sources), Counter())

    def lines(self):
        """One line per source and one per reason, for the terminal."""
        lines = []
        for source in self.sources:
            taken = "" if source.rows == source.available else f" of {source.available}"
            lines.append(
                f"{source.path} ({source.format}): {source.rows}{taken} rows, {source.kept} examples"
            )
            for word, counts in (("dropped", source.dropped), ("flagged", source.flagged)):
                lines += [
                    f"  {n} {word}: {reason} (first: {source.place(reason)})"
                    for reason, n in counts.most_common()
                ]
        return lines

    def as_dict(self):
        """The same for metrics and the run folder: plain types only."""
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
                    "dropped": dict(s.dropped),
                    "flagged": dict(s.flagged),
                }
                for s in self.sources
            ],
        }

    def require(self, what):
        """Ends with one line when no example is left."""
        if self.kept:
            return
        reasons = [
            f"{n} dropped: {reason} (first: {source.place(reason)})"
            for source in self.sources
            for reason, n in source.dropped.most_common()
        ]
        read = sum(source.rows for source in self.sources)
        raise UserError(
            f"{', '.join(source.path for source in self.sources)}: no usable {what} in {read} rows; "
            + "; ".join(reasons)
        )
