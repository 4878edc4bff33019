"""The side file of skipped rows, and the table of rows read, kept and skipped."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from saferlhf_fast.data.row_stream import BadRow, RowCounts
from saferlhf_fast.runtime import console, disk


class SideFile:
    """Writes skipped rows as JSON lines; the file exists only when a row was skipped."""

    def __init__(self, path: Path) -> None:
        """Removes the file of an earlier run."""
        self.path = path
        self.rows = 0
        self._file: TextIO | None = None
        with disk.writing(path):
            path.unlink(missing_ok=True)

    def add(self, row: BadRow) -> None:
        """Writes one row: file, number, reason, message, text."""
        with disk.writing(self.path):
            if self._file is None:
                self._file = self.path.open("w", encoding="utf-8", errors="backslashreplace")
            self._file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        self.rows += 1

    def close(self) -> None:
        """Ends the file."""
        if self._file is not None:
            with disk.writing(self.path):
                self._file.close()


def print_counts(counts: Sequence[RowCounts], side: SideFile) -> None:
    """Prints rows in = kept + skipped for each file, and the skipped ones by reason.

    Args:
        counts: The counts of each file.
        side: Where the skipped rows are.
    """
    rows = [(item.file, item.form, item.kept + item.skipped, item.kept, item.skipped) for item in counts]
    console.result_table("rows: in = kept + skipped", ("file", "form", "in", "kept", "skipped"), rows)
    reasons = [(reason, item.file, n) for item in counts for reason, n in item.reasons.most_common()]
    if reasons:
        console.result_table("skipped, by reason", ("reason", "file", "rows"), reasons)
        console.say(f"skipped rows with their lines: {side.path}")
