"""Reads one data file into rows, each with its place in the file.

Every error is a UserError that names file and line. A record of several lines is named by its first one.

JSON and CSV are read here and not by `datasets`, which silently casts what does not fit: an integer where
text is expected becomes text, a missing column becomes null, broken UTF-8 becomes other characters. Text may
also be UTF-16 or UTF-32, as spreadsheets write it. Parquet has types and is read with pyarrow. Nothing is
cached or written. Lines and rows are counted from 1.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from saferlhf_fast.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")
"""What a data file's name may end in."""

_LONGEST_CELL = 1 << 30  # characters; the csv module's own limit of 131072 is shorter than some dialogues

_DELIMITERS = ",;\t|"
"""What may separate the columns of a CSV file; the header line decides."""

_WRAPPERS = ("data", "rows", "records", "examples")
"""Keys under which a .json file may keep its list of records."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record as its file has it."""

    fields: dict[str, Any]
    """Column -> value."""
    where: str
    """The place, for messages: "pairs.jsonl line 3"."""
    untyped: bool = False
    """All values are text (CSV), so "0" may mean the number 0."""


def is_data_file(path: str | Path) -> bool:
    """Tells whether a name ends as the name of a data file does."""
    return str(path).lower().endswith(SUFFIXES)


def read_file(path: Path) -> list[Row]:
    """Returns all rows of one data file, in order.

    Raises:
        UserError: The file cannot be read, is damaged, or has no records.
    """
    name = path.name.lower().removesuffix(".gz")
    if not is_data_file(path):
        raise UserError(f"{path}: expected a data file ending in {', '.join(SUFFIXES)}")
    if name.endswith(".parquet"):
        rows = _parquet(path)
    else:
        content = _as_utf8(path, _bytes(path))
        if not content.strip():
            raise UserError(f"{path}: the file is empty, expected records")
        readers: dict[str, Callable[[Path, bytes], list[Row]]] = {
            ".jsonl": _json_lines,
            ".json": _json,
            ".csv": _csv,
        }
        rows = readers[Path(name).suffix](path, content)
    if not rows:
        raise UserError(f"{path}: the file has no records")
    return rows


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        # The first bytes decide and not the name: files are misnamed both ways.
        if content[:2] == b"\x1f\x8b":
            return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip data is truncated or damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if path.name.lower().endswith(".gz") and content.strip():
        raise UserError(f"{path}: expected gzip data, got something else")
    return content


def whole_text(path: Path, errors: str = "strict") -> str:
    """Returns the text of a file in UTF-8, UTF-16 or UTF-32, unpacked where it is gzip data.

    Args:
        path: The file.
        errors: What bytes that are not UTF-8 become, as in `bytes.decode`; strict: UserError.

    Raises:
        UserError: The file cannot be read, or is empty.
    """
    content = _as_utf8(path, _bytes(path))
    if not content.strip():
        raise UserError(f"{path}: the file is empty, expected records")
    return _text(path, content) if errors == "strict" else content.decode("utf-8-sig", errors)


def _as_utf8(path: Path, content: bytes) -> bytes:
    """Returns text in UTF-8 that may be in UTF-16 or UTF-32, with or without a byte order mark."""
    encoding = json.detect_encoding(content)
    if encoding.startswith("utf-8"):
        return content
    try:
        return content.decode(encoding).encode()
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, "replace").count("\n") + 1
        raise UserError(
            f"{path} line {line}: expected {encoding.upper()} text, got the byte 0x{content[error.start]:02x}"
        ) from error


def _text(path: Path, content: bytes, line: int | None = None) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = line or content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise UserError(f"{path} line {line}: expected UTF-8 text, got the byte 0x{byte:02x}") from error


class Repeating(dict[str, Any]):
    """A JSON object that has one of its names twice; refused where something reads it."""

    repeated: str


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of a JSON object's pairs; a Repeating where a name is there twice."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    repeating = Repeating(value)
    repeating.repeated = next(iter(_repeated(name for name, _ in pairs)))
    return repeating


def _repeated(names: Iterable[str]) -> Iterator[str]:
    """Yields the names that are there before."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)


def _parsed(text: str) -> Any:
    """Returns the value of a JSON text.

    Python refuses to convert integers of more than 4300 digits, as that takes long. They become Decimals,
    which no field takes, so that a column that nobody reads does not end the run.
    """
    try:
        return json.loads(text, object_pairs_hook=_named_once)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, object_pairs_hook=_named_once, parse_int=_integer)


def parsed_object(text: str) -> Any:
    """Returns the value of a JSON text.

    Args:
        text: The text.

    Raises:
        UserError: It is an object that has a column twice.
        ValueError: It is not JSON.
    """
    value = _parsed(text)
    if isinstance(value, Repeating):
        raise UserError(f"expected each column once, got '{shorten(value.repeated)}' twice")
    return value


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < 640 else Decimal(digits)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object (a record), got {describe(value)}")
    if isinstance(value, Repeating):
        raise UserError(f"{where}: expected each column once, got '{shorten(value.repeated)}' twice")
    return value


def _json_lines(path: Path, content: bytes) -> list[Row]:
    rows = (json_line(path, line, number) for number, line in enumerate(content.split(b"\n"), 1))
    return [row for row in rows if row is not None]


def json_line(path: Path, line: bytes, number: int) -> Row | None:
    """Returns the record in one line of a file; None for a blank line.

    Args:
        path: The file, for messages.
        line: The line, in UTF-8.
        number: Its number, from 1.

    Raises:
        UserError: The line is not UTF-8, not JSON, or no object.
    """
    text = _text(path, line, number).strip()
    if not text:
        return None
    where = f"{path} line {number}"
    try:
        value = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({shorten(error)}): {shorten(text)}") from error
    return Row(_object(value, where), where)


def _json(path: Path, content: bytes) -> list[Row]:
    text = _text(path, content)
    try:
        value = _parsed(text)
    except json.JSONDecodeError as error:
        # Many files called .json hold one object per line.
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            return _json_lines(path, content)
        raise UserError(
            f"{path} line {error.lineno}: not JSON ({error.msg}, column {error.colno})"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}: not JSON that can be read (nested too deeply)") from error
    items = records_in(path, value)
    return [Row(_object(item, f"{path} row {i}"), f"{path} row {i}") for i, item in enumerate(items, 1)]


def records_in(path: Path, value: Any) -> list[Any]:
    """Returns the list of records in the value of a .json file, which may be wrapped in an object.

    Args:
        path: The file, for messages.
        value: Its value.

    Raises:
        UserError: It is neither a list nor an object.
    """
    if isinstance(value, dict):
        inner = next((value[key] for key in _WRAPPERS if isinstance(value.get(key), list)), None)
        value = [value] if inner is None else inner
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of records, got {describe(value)}")
    return value


def _csv(path: Path, content: bytes) -> list[Row]:
    text = _text(path, content)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path} line {line}: expected CSV text, got a zero byte")
    old_limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        records = _csv_records(path, text)
        line, header = next(records, (1, []))
        names = [name.strip() or f"column {i}" for i, name in enumerate(header, 1)]
        for name in _repeated(names):
            raise UserError(f"{path} line {line}: expected each column once, got '{shorten(name)}' twice")
        rows = []
        for line, cells in records:
            where = f"{path} line {line}"
            if len(cells) != len(names):
                raise UserError(f"{where}: expected {len(names)} columns, got {len(cells)}")
            rows.append(Row(dict(zip(names, cells)), where, untyped=True))
    finally:
        csv.field_size_limit(old_limit)
    return rows


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (first line, cells) of each record, the header first; blank lines are none."""
    # Excel's own way to name the delimiter.
    named = re.match(r"\s*sep=(.)\s*[\r\n]", text)
    reader = csv.reader(
        io.StringIO(text, newline=""), strict=True, delimiter=named[1] if named else delimiter_of(text)
    )
    if named:
        next(reader)
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            is_open = str(error) == "unexpected end of data"
            line = _open_quote(text, begin, reader.dialect.delimiter) if is_open else reader.line_num
            what = "a quote is opened here and not closed" if is_open else error
            beginning = f"; the record begins in line {begin}" if line != begin else ""
            raise UserError(f"{path} line {line}: not CSV ({what}{beginning})") from error
        if cells:
            yield begin, cells


def delimiter_of(text: str) -> str:
    """Returns the delimiter that gives the header line the most columns; of equals, the comma."""
    head = text[: 1 << 16]

    def columns(delimiter: str) -> int:
        try:
            return len(next(filter(None, csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)), []))
        except csv.Error:
            return 0

    return max(_DELIMITERS, key=columns)


def _open_quote(text: str, begin: int, delimiter: str) -> int:
    """Returns the line, from `begin` on, with the quote that nothing closes."""
    opened, previous, is_quoted = begin, delimiter, False
    for line, content in enumerate(io.StringIO(text, newline=""), 1):
        for character in content if line >= begin else "":
            if character == '"' and (is_quoted or previous in (delimiter, "\n", "\r", '"')):
                is_quoted = not is_quoted
                # The second quote of a doubled one opens nothing.
                opened = line if is_quoted and previous != '"' else opened
            previous = character
    return opened


def _parquet(path: Path) -> list[Row]:
    # pyarrow has no types.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        names = pyarrow.parquet.read_schema(path).names
        for name in _repeated(names):
            raise UserError(f"{path}: expected each column once, got '{shorten(name)}' twice")
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({shorten(str(error), 80)})") from error
    return [Row(fields, f"{path} row {i}") for i, fields in enumerate(table.to_pylist(), 1)]


def describe(value: object) -> str:
    """Returns a value in a few words, for messages: 'null', 'the number 3', 'the text "…"'."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, Decimal)):
        return f"the number {shorten(value)}"
    if isinstance(value, str):
        return f'the text "{shorten(value)}"' if value else "an empty text"
    kinds: dict[type, str] = {list: "a list", dict: "an object"}
    return f"{kinds.get(type(value), type(value).__name__)} {shorten(value)}"


def shorten(value: object, limit: int = 48) -> str:
    """Returns a value as one line of at most `limit` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
