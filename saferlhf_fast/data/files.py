"""Reads one data file into rows, each with its place in the file.

Every error is a UserError that names file and line.

JSON and CSV are read here and not by `datasets`, which silently casts what does not fit: an integer where
text is expected becomes text, a missing column becomes null, broken UTF-8 becomes other characters. Parquet
has types and is read with pyarrow. Nothing is cached or written. Lines and rows are counted from 1.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saferlhf_fast.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")
"""What a data file's name may end in."""

_LONGEST_CELL = 1 << 30  # characters; the csv module's own limit of 131072 is shorter than some dialogues

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
        content = _bytes(path)
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


def _text(path: Path, content: bytes, line: int | None = None) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = line or content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise UserError(f"{path} line {line}: expected UTF-8 text, got the byte 0x{byte:02x}") from error


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object (a record), got {describe(value)}")
    return value


def _json_lines(path: Path, content: bytes) -> list[Row]:
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        text = _text(path, line, number).strip()
        if not text:
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({shorten(error)}): {shorten(text)}") from error
        rows.append(Row(_object(value, where), where))
    return rows


def _json(path: Path, content: bytes) -> list[Row]:
    text = _text(path, content)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        # Many files called .json hold one object per line.
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            return _json_lines(path, content)
        raise UserError(
            f"{path} line {error.lineno}: not JSON ({error.msg}, column {error.colno})"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}: not JSON that can be read (nested too deeply)") from error
    if isinstance(value, dict):
        inner = next((value[key] for key in _WRAPPERS if isinstance(value.get(key), list)), None)
        value = [value] if inner is None else inner
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of records, got {describe(value)}")
    return [Row(_object(item, f"{path} row {i}"), f"{path} row {i}") for i, item in enumerate(value, 1)]


def _csv(path: Path, content: bytes) -> list[Row]:
    text = _text(path, content)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path} line {line}: expected CSV text, got a zero byte")
    rows: list[Row] = []
    old_limit = csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for fields in reader:
            where = f"{path} line {reader.line_num}"
            columns = len(reader.fieldnames or ())
            if None in fields:
                raise UserError(f"{where}: expected {columns} columns, got {columns + len(fields[None])}")
            missing = sum(value is None for value in fields.values())
            if missing:
                raise UserError(f"{where}: expected {columns} columns, got {len(fields) - missing}")
            rows.append(Row(fields, where, untyped=True))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(old_limit)
    return rows


def _parquet(path: Path) -> list[Row]:
    # pyarrow has no types.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
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
    if isinstance(value, (int, float)):
        return f"the number {shorten(value)}"
    if isinstance(value, str):
        return f'the text "{shorten(value)}"' if value else "an empty text"
    kinds: dict[type, str] = {list: "a list", dict: "an object"}
    return f"{kinds.get(type(value), type(value).__name__)} {shorten(value)}"


def shorten(value: object, limit: int = 48) -> str:
    """Returns a value as one line of at most `limit` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
