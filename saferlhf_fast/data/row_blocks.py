"""Rows of large sources by their place: only those JSON lines are parsed that are asked for.

A .jsonl file of any size costs 8 bytes of memory for each row. Other files (.csv, .json, Parquet, gzip data)
and data sets of the Hub are held in memory. The form of a source is detected from its first rows, not from
all of them as in counted_records.py.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from saferlhf_fast.config.setting_types import Data, Source
from saferlhf_fast.data.columns import ExtraColumns, extra_columns
from saferlhf_fast.data.files import Row, json_line, read_file
from saferlhf_fast.data.formats import Format, format_of
from saferlhf_fast.data.messages import with_message_lists
from saferlhf_fast.data.sources import (
    as_sources,
    chosen_files,
    drawn,
    is_saved_to_disk,
    load_rows,
    renamed,
)
from saferlhf_fast.errors import UserError

DETECTED_FROM = 1000
"""Rows at the beginning of a source that decide its format and the meaning of its other columns."""

_CHUNK = 1 << 23  # bytes that are looked at together
_OPENING = ord("{")


class RowsByPlace(Protocol):
    """Rows that can be read by their places."""

    digest: str
    """Hash of the content."""

    def __len__(self) -> int:
        """How many rows there are."""

    def read(self, places: Sequence[int]) -> list[Row]:
        """Returns the rows at some ascending places, from 0."""


class ListedRows:
    """Rows in memory."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        content = hashlib.blake2b(digest_size=16)
        for row in rows:
            content.update(json.dumps(row.fields, default=str).encode())
        self.digest = content.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, places: Sequence[int]) -> list[Row]:
        """Returns the rows at some places."""
        return [self.rows[i] for i in places]


class LineFile:
    """The rows of a .jsonl file in UTF-8."""

    def __init__(self, path: Path) -> None:
        """Finds the lines, without parsing them.

        Args:
            path: The file.

        Raises:
            UserError: It cannot be read, or has no records.
        """
        self.path = path
        content = hashlib.blake2b(digest_size=16)
        try:
            places, numbers = zip(*_line_starts(path, content.update))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        self._starts, self._numbers = np.concatenate(places), np.concatenate(numbers)
        self.digest = content.hexdigest()
        if not len(self):
            raise UserError(f"{path}: the file has no records")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, places: Sequence[int]) -> list[Row]:
        """Parses the lines at some ascending places.

        Raises:
            UserError: A line has a mistake; the message has its number.
        """
        rows = []
        with self.path.open("rb") as file:
            for begin, end in _runs(places):
                start = int(self._starts[begin])
                file.seek(start)
                content = file.read(int(self._starts[end]) - start)
                for i in range(begin, end):
                    line = content[int(self._starts[i]) - start : int(self._starts[i + 1]) - start]
                    row = json_line(self.path, line, int(self._numbers[i]))
                    assert row is not None, f"{self.path}: line {self._numbers[i]} was not blank before"
                    rows.append(row)
        return rows


def _line_starts(
    path: Path, update: Callable[[bytes], None]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
    """Yields (where lines begin, their numbers) of a file, without blank lines; the last one is its end."""
    offset, lines, pending = 0, 0, True  # pending: a line begins at the next chunk's first byte
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            update(chunk)
            content = np.frombuffer(chunk, np.uint8)
            breaks = np.flatnonzero(content == ord("\n"))
            starts = breaks + 1
            if pending:
                starts = np.concatenate(([0], starts))
            pending = len(starts) > 0 and int(starts[-1]) == len(chunk)
            starts = starts[:-1] if pending else starts
            numbers = lines + 1 + np.arange(len(starts))
            lines += len(starts)
            odd = starts[content[starts] != _OPENING]  # few: they may be blank
            blank = [int(start) for start in odd if _is_blank(path, offset + int(start))]
            kept = ~np.isin(starts, blank)
            yield (starts[kept] + offset).astype(np.int64), numbers[kept].astype(np.uint32)
            offset += len(chunk)
    yield np.array([offset], np.int64), np.array([lines + 1], np.uint32)


def _is_blank(path: Path, start: int) -> bool:
    """Tells whether the line that begins at a byte has nothing but white space."""
    with path.open("rb") as file:
        file.seek(start)
        return not file.readline().decode("utf-8-sig", "replace").strip()


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of runs of ascending places."""
    if not len(places):
        return
    array = np.asarray(places)
    cuts = np.flatnonzero(np.diff(array) != 1) + 1
    for run in np.split(array, cuts):
        yield int(run[0]), int(run[-1]) + 1


@dataclass(frozen=True)
class BlockSource:
    """A source whose rows are read in blocks."""

    source: Source
    parts: tuple[RowsByPlace, ...]
    format: str
    form: Format
    extra: ExtraColumns
    available: int
    """Rows that the source has."""
    places: Sequence[int]
    """The rows that count and proportion take."""

    def rows(self, begin: int, end: int) -> list[Row]:
        """Returns taken rows, with columns renamed and messages as lists.

        Args:
            begin: The first one.
            end: The one after the last.

        Raises:
            UserError: A row has a mistake.
        """
        return _read(self.source, self.parts, self.places[begin:end])


def block_sources(data: Data, seed: int = 0) -> list[BlockSource]:
    """Prepares the sources of a recipe's `data` for reading in blocks.

    Args:
        data: A recipe's `data`.
        seed: Seed of the rows that sources with a count or a proportion draw.

    Raises:
        UserError: A source cannot be read, or has no known format.
    """
    sources = as_sources(data)
    parts = [tuple(_parts(source)) for source in sources]
    sizes = [sum(map(len, item)) for item in parts]
    prepared = []
    for source, item, size, taken in zip(sources, parts, sizes, drawn(sources, sizes, seed)):
        places: Sequence[int] = range(size) if taken is None else taken
        head = _read(source, item, places[:DETECTED_FROM])
        name, form = format_of(head, source.format, source.path)
        prepared.append(BlockSource(source, item, name, form, extra_columns(head, form), size, places))
    return prepared


def _parts(source: Source) -> Iterator[RowsByPlace]:
    path = Path(source.path).expanduser()
    if not path.exists() or (path.is_dir() and is_saved_to_disk(path)):
        yield ListedRows(load_rows(source))
        return
    for item in chosen_files(path, source) if path.is_dir() else [path]:
        yield LineFile(item) if _has_lines(item) else ListedRows(read_file(item))


def _has_lines(path: Path) -> bool:
    """Tells whether a file is JSON lines in UTF-8 that are not packed."""
    if not path.name.lower().endswith(".jsonl"):
        return False
    with path.open("rb") as file:
        first = file.read(4)
    return first[:2] != b"\x1f\x8b" and json.detect_encoding(first).startswith("utf-8")


def _read(source: Source, parts: Sequence[RowsByPlace], places: Sequence[int]) -> list[Row]:
    rows: list[Row] = []
    first = 0
    for part in parts:
        inside = [place - first for place in places if first <= place < first + len(part)]
        rows += part.read(inside)
        first += len(part)
    return [with_message_lists(renamed(row, source)) for row in rows]
