"""Streams the rows of large sources: what cannot be read is a BadRow with its place, and the rest goes on.

JSON lines (.jsonl, .jsonl.gz) and Parquet are read row by row; CSV and a .json list are held in memory, as
their form asks for. files.py is the reader of recipes, which stops at the first mistake.
"""

import csv
import gzip
import importlib.util
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from saferlhf_fast.config.paths import is_local
from saferlhf_fast.config.setting_types import Source
from saferlhf_fast.data import files
from saferlhf_fast.data.files import Row, shorten
from saferlhf_fast.data.formats import FORMATS, Format, format_of
from saferlhf_fast.data.labelled import (
    LABELLED_FORMS,
    Answer,
    LabelledRow,
    form_of_columns,
    is_cs_rlhf,
    read_labelled,
)
from saferlhf_fast.data.messages import with_message_lists
from saferlhf_fast.data.records import (
    UNKNOWN,
    UNSAFE,
    Conversation,
    Dropped,
    Preference,
    prompt_of,
    prompt_text,
)
from saferlhf_fast.data.sources import data_files, load_rows
from saferlhf_fast.errors import UserError

DETECTED_FROM = 1000
"""Rows whose columns decide the form of a file."""


_QUICK_LOADS: Callable[[bytes], Any] = (
    # several times as quick; it rounds integers above 64 bits and takes the last of two equal names
    importlib.import_module("orjson").loads
    if importlib.util.find_spec("orjson")
    else lambda line: json.loads(line.decode())
)
_NESTED = {dict, list, float}
_LARGE = 2.0**63


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is skipped."""

    file: str
    number: int
    """Its line in JSON lines and CSV, its number in JSON and Parquet; from 1."""
    reason: str
    """Equal for equal mistakes."""
    message: str
    """The mistake with the value."""
    text: str
    """The row as it is in the file."""


@dataclass
class RowCounts:
    """Rows of one file: read = kept + skipped."""

    file: str
    form: str = ""
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def skipped(self) -> int:
        """Rows that were skipped, for any reason."""
        return self.reasons.total()


class RowReader:
    """Reads the rows of some sources and counts what it skips."""

    def __init__(
        self,
        sources: list[str],
        form: str = "auto",
        on_bad: Callable[[BadRow], None] | None = None,
        strict: bool = False,
    ) -> None:
        """Prepares to read; nothing is opened yet.

        Args:
            sources: Files, folders or data sets of the Hub.
            form: A key of LABELLED_FORMS or FORMATS; auto: detected for each file.
            on_bad: Is called with each row that is skipped.
            strict: Raise UserError at the first such row.

        Raises:
            UserError: There is no form of that name.
        """
        if form not in ("auto", *LABELLED_FORMS, *FORMATS):
            names = dict.fromkeys([*LABELLED_FORMS, *FORMATS])
            raise UserError(f"form: expected auto, {', '.join(names)}, got {form!r}")
        self.sources, self.form, self.on_bad, self.strict = sources, form, on_bad, strict
        self.counts: list[RowCounts] = []

    def __iter__(self) -> Iterator[tuple[Row, list[LabelledRow]]]:
        """Yields each good row, and what it says (several where a row has several preferences)."""
        for source in self.sources:
            for name, rows in _files_of(source):
                yield from self._file(name, rows)

    def _file(self, name: str, rows: "Iterator[Row | BadRow]") -> Iterator[tuple[Row, list[LabelledRow]]]:
        counts = RowCounts(name)
        self.counts.append(counts)
        head = list(islice(rows, DETECTED_FROM))
        good = [row for row in head if isinstance(row, Row)]
        if not good and not head:
            raise UserError(f"{name}: the file has no records")
        counts.form, parse = _parser(good, self.form, name) if good else ("unknown", None)
        for row in chain(head, rows):
            if isinstance(row, BadRow):
                self._skip(counts, row)
                continue
            try:
                assert parse is not None, "a file with a good row has a parser"
                found = parse(row)
            except UserError as error:
                self._skip(counts, _bad(name, row, str(error)))
                continue
            counts.kept += 1
            yield row, found

    def skip(self, row: Row, reason: str) -> None:
        """Counts a row that was yielded last as skipped.

        Args:
            row: The row.
            reason: Why it cannot be used; equal for equal reasons.

        Raises:
            UserError: strict.
        """
        counts = self.counts[-1]
        counts.kept -= 1
        self._skip(counts, _bad(counts.file, row, f"{row.where}: {reason}"))

    def _skip(self, counts: RowCounts, bad: BadRow) -> None:
        if self.strict:
            raise UserError(bad.message)
        counts.reasons[bad.reason] += 1
        if self.on_bad:
            self.on_bad(bad)


def _bad(name: str, row: Row, message: str) -> BadRow:
    """Makes a BadRow of a row and its UserError: the reason is the text without place and value."""
    reason = message.removeprefix(row.where).lstrip(":, ")
    for end in (", got ", "; the row has", " (expected"):
        reason = reason.split(end)[0]
    number = int(row.where.rsplit(" ", 1)[-1])
    return BadRow(name, number, reason, message, json.dumps(row.fields, ensure_ascii=True, default=str))


def _parser(rows: list[Row], form: str, name: str) -> tuple[str, Callable[[Row], list[LabelledRow]]]:
    """Returns the form of a file, and the function that reads a row of it."""
    if form == "auto":
        form = form_of_columns({column for row in rows for column in row.fields}) or form
        if form == "cs-rlhf" and not any(is_cs_rlhf(row) for row in rows):
            form = "auto"  # a label of another kind, such as whether an answer is wanted
    if form in LABELLED_FORMS:
        return form, lambda row: _checked(row, [read_labelled(row, form)])
    known, unlabelled = format_of([with_message_lists(row) for row in rows], form, name)
    return known, lambda row: _checked(row, _unlabelled(row, unlabelled))


def _checked(row: Row, found: list[LabelledRow]) -> list[LabelledRow]:
    if not found:
        raise UserError(f"{row.where}: the row has no record")
    if not all(item.prompt and not item.prompt.isspace() for item in found):
        raise UserError(f"{row.where}: the prompt is empty")
    return found


def _unlabelled(row: Row, form: Format) -> list[LabelledRow]:
    found = []
    for record in form.parse(with_message_lists(row)):
        if isinstance(record, Dropped):
            raise UserError(f"{row.where}: {record.reason}")
        if isinstance(record, Preference):
            unsafe = [None if sign == UNKNOWN else sign == UNSAFE for sign in record.signs]
            answers = tuple(Answer(text, flag) for text, flag in zip(record.responses, unsafe))
            found.append(LabelledRow(prompt_text(record.messages), answers, record.better, record.safer))
        elif isinstance(record, Conversation) and not record.is_document:
            prompt = prompt_of(record.messages[:-1])
            if not prompt:
                raise UserError(f"{row.where}: a dialogue without a question")
            found.append(LabelledRow(prompt_text(prompt), (Answer(record.messages[-1]["content"]),)))
        elif isinstance(record, Conversation):
            raise UserError(f"{row.where}: a text without a prompt")
        else:
            found.append(LabelledRow(prompt_text(record.messages)))
    return found


def _files_of(source: str) -> "Iterator[tuple[str, Iterator[Row | BadRow]]]":
    """Yields (name, its rows) of each file of a source."""
    path = Path(source).expanduser()
    if not is_local(source) or any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield source, iter(load_rows(Source(path=source)))
        return
    if not path.exists():
        raise UserError(f"{source}: no such file or folder")
    for item in data_files(path) if path.is_dir() else [path]:
        if not files.is_data_file(item):
            raise UserError(f"{item}: expected a data file ending in {', '.join(files.SUFFIXES)}")
        yield str(item), _rows(item)


def _rows(path: Path) -> "Iterator[Row | BadRow]":
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    with path.open("rb") as file:
        first = file.read(4)
    is_gzip = first[:2] == b"\x1f\x8b"
    if kind == ".parquet":
        yield from _parquet(path)
    elif kind == ".csv":
        yield from _csv(path)
    elif kind == ".jsonl" and (is_gzip or json.detect_encoding(first).startswith("utf-8")):
        yield from _json_lines(path, is_gzip)
    else:
        yield from _json(path)


def _json_lines(path: Path, is_gzip: bool) -> "Iterator[Row | BadRow]":
    name, number = str(path), 0
    with gzip.open(path, "rb") if is_gzip else path.open("rb", buffering=1 << 20) as lines:
        try:
            for number, line in enumerate(lines, 1):
                try:
                    fields = _QUICK_LOADS(line)
                    if type(fields) is dict and line.count(b'":') != _names_in(fields):
                        fields = _exact(line)
                except (ValueError, RecursionError):
                    if line.isspace():
                        continue
                    fields = _exact(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                if type(fields) is dict:
                    yield Row(fields, f"{name} line {number}")
                else:
                    yield _not_an_object(name, number, line, fields)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield BadRow(
                name,
                number + 1,
                "the gzip data is truncated or damaged",
                f"{path} after line {number}: the gzip data is truncated or damaged ({error})",
                "",
            )


def _exact(line: bytes) -> object:
    """Returns the value of a line, parsed as files.py does; the error where it cannot be used."""
    try:
        return files.parsed_object(line.decode())
    except (ValueError, RecursionError) as error:
        return error


def _names_in(value: Any) -> int:
    """Counts the names of all objects in a value; −1 where it holds a number that may have been rounded.

    A line with as many names has none of them twice.
    """
    kind, inner = type(value), 0
    if kind is float:
        return 0 if -_LARGE < value < _LARGE else -1
    if kind is dict:
        inner, value = len(value), value.values()
    for item in value:
        if type(item) in _NESTED:
            names = _names_in(item)
            if names < 0:
                return -1
            inner += names
    return inner


def _not_an_object(name: str, number: int, line: bytes, value: object) -> BadRow:
    text = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    if isinstance(value, UnicodeDecodeError):
        reason = "not UTF-8"
    elif isinstance(value, UserError):
        reason = "a column that is there twice"
    elif isinstance(value, Exception):
        reason = "not JSON"
    else:
        reason = "not a JSON object"
    detail = f" ({shorten(value, 80)})" if isinstance(value, Exception) else ""
    return BadRow(name, number, reason, f"{name} line {number}: {reason}{detail}: {shorten(text)}", text)


def _json(path: Path) -> "Iterator[Row | BadRow]":
    text = files.whole_text(path)
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("{") or error.msg != "Extra data":
            raise UserError(
                f"{path} line {error.lineno}: not JSON ({error.msg}, column {error.colno})"
            ) from error
        yield from _text_lines(path, text)
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read ({shorten(error)})") from error
    for number, item in enumerate(files.records_in(path, value), 1):
        if isinstance(item, dict):
            yield Row(item, f"{path} row {number}")
        else:
            yield _not_an_object(str(path), number, json.dumps(item).encode(), item)


def _text_lines(path: Path, text: str) -> "Iterator[Row | BadRow]":
    """JSON lines in a file that is called .json, or in UTF-16."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            fields = error
        if isinstance(fields, dict):
            yield Row(fields, f"{path} line {number}")
        else:
            yield _not_an_object(str(path), number, line.encode("utf-8", "surrogatepass"), fields)


def _csv(path: Path) -> "Iterator[Row | BadRow]":
    text = files.whole_text(path, "surrogateescape").replace("\0", "\\0")
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=files.delimiter_of(text))
    names: list[str] = []
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(str(path), begin, "not CSV", f"{path} line {begin}: not CSV ({error})", "")
            continue
        if not names:
            names = [cell.strip() or f"column {i}" for i, cell in enumerate(cells, 1)]
        elif len(cells) == len(names):
            yield Row(dict(zip(names, cells)), f"{path} line {begin}", untyped=True)
        elif cells:
            reason = f"expected {len(names)} columns"
            message = f"{path} line {begin}: {reason}, got {len(cells)}"
            yield BadRow(str(path), begin, reason, message, json.dumps(cells))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, f"{path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({shorten(str(error), 80)})") from error
