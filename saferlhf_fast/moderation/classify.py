"""`moderation classify`: judges answers of files or of standard input, one JSON line for each, in order.

Rows are read, judged and written in chunks, so memory does not grow with the input. An output file that is
there already is continued: its whole lines are counted, a line that was cut off is removed, and the rows that
follow are judged. The chunk that was interrupted is judged as a whole again, since the last bits of a score
depend on its batch: so a continued file has the bytes of an uninterrupted one. A row that cannot be judged
gets a line with `error` in its place.
"""

import contextlib
import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from ..runtime import console, disk
from .moderator import Moderator, Verdict, checked_pairs

if TYPE_CHECKING:
    from ..config.moderation_stages import ModerationClassifyConfig

CHUNK = 256
"""Rows that are judged together."""
LINE_START = b'{"where": '
"""How each line of an output begins."""


class Item(NamedTuple):
    """A row of the input: what is judged, or why it cannot be."""

    where: str
    prompt: str
    response: str
    identity: Any
    error: str | None = None


class Written(NamedTuple):
    """What an output file has already: its number of lines, and the `where` of the last one."""

    rows: int = 0
    where: str | None = None


def classify(cfg: "ModerationClassifyConfig") -> dict[str, int]:
    """Judges the rows of the input.

    Args:
        cfg: Its settings.

    Returns:
        {rows, skipped, errors}: judged now, judged before, and those with an error.

    Raises:
        UserError: The model is no moderator, an input cannot be read or has no row, or the output is of
            another input or moderator.
    """
    inputs = [cfg.input] if isinstance(cfg.input, str) else list(cfg.input)
    _refuse_inputs(inputs, cfg.output)
    moderator = Moderator.from_pretrained(
        cfg.model,
        batch_tokens=cfg.batch_tokens,
        trust_remote_code=cfg.trust_remote_code,
        allow_pickle=cfg.allow_pickle,
    )
    moderator.model.spec.source_index(cfg.source)  # refuses an unknown one before anything is read
    counts = {"rows": 0, "skipped": 0, "errors": 0}
    with _output(cfg, moderator.calibration.version) as (file, written):
        counts["skipped"] = written.rows
        rows = itertools.chain.from_iterable(map(read_items, inputs))
        for chunk, start in _chunks(rows, written, cfg.output):
            lines = zip(chunk, judged(moderator, chunk, cfg))
            for item, line in itertools.islice(lines, start, None):
                counts["rows"] += 1
                counts["errors"] += item.error is not None
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    if not counts["rows"] + counts["skipped"]:
        raise UserError(f"input: {', '.join(inputs)}: expected at least one row, got none")
    if cfg.output != "-":
        console.say(
            f"{counts['rows']} rows judged, {counts['skipped']} were judged before, {counts['errors']} with "
            f"an error; see {cfg.output}"
        )
    elif counts["errors"]:
        print(f"warning: {counts['errors']} rows could not be judged", file=sys.stderr)
    return counts


def _chunks(rows: Iterator[Item], written: Written, output: str) -> Iterator[tuple[list[Item], int]]:
    """Yields the chunks that have rows to write, and the index of the first such row in each.

    Raises:
        UserError: The last line of the output is not of the row in its place.
    """
    start = 0
    if written.rows:
        whole = (written.rows - 1) // CHUNK * CHUNK
        start = written.rows - whole
        next(itertools.islice(rows, whole, whole), None)
    while chunk := list(itertools.islice(rows, CHUNK)):
        if start:
            _require_row(chunk, start, written, output)
        if len(chunk) > start:
            yield chunk, start
        start = 0
    if start:
        _require_row([], start, written, output)


def _require_row(chunk: list[Item], start: int, written: Written, output: str) -> None:
    """Raises UserError where the output's last line is not of row `start` (from 1) of the chunk."""
    got = chunk[start - 1].where if len(chunk) >= start else "no row"
    if got != written.where:
        raise UserError(
            f"output: {output}: line {written.rows} is of {written.where}, and the input has {got} there; "
            "expected the same input, a new file, or overwrite=true"
        )


def judged(
    moderator: Moderator, items: list[Item], cfg: "ModerationClassifyConfig"
) -> Iterator[dict[str, Any]]:
    """Yields what the output says of each row."""
    good = [item for item in items if item.error is None]
    prompts, responses = [item.prompt for item in good], [item.response for item in good]
    verdicts = iter(moderator(prompts, responses, preset=cfg.preset, source=cfg.source) if good else [])
    for item in items:
        head = {"where": item.where, **({} if item.identity is None else {"id": item.identity})}
        if item.error is not None:
            yield {**head, "error": item.error}
            continue
        line = {**head, **next(verdicts).as_dict(), "preset": cfg.preset}
        if cfg.source is not None:
            line["source"] = cfg.source
        if cfg.text:
            line |= {"prompt": item.prompt, "response": item.response}
        if cfg.stream:
            parts = moderator.prefixes(
                item.prompt, item.response, cfg.every, preset=cfg.preset, source=cfg.source
            )
            line["prefixes"] = [_prefix(part) for part in parts]
        yield line


def _prefix(part: Verdict) -> dict[str, Any]:
    return {
        "tokens": part.tokens,
        "unsafe": part.unsafe,
        "expected_severity": part.expected_severity,
        "flagged": part.flagged,
    }


def read_items(name: str) -> Iterator[Item]:
    """Yields the rows of a file, or of standard input for "-"; JSON lines are streamed.

    Raises:
        UserError: The file cannot be read.
    """
    shown = "standard input" if name == "-" else name
    lower = name.lower().removesuffix(".gz")
    if name != "-" and not lower.endswith(".jsonl"):
        from ..data.files import read_file

        for row in read_file(Path(name).expanduser()):
            yield _item(row.where, row.fields)
        return
    try:
        with _opened(name) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _of_line(f"{shown} line {number}", line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"input: {shown}: cannot be read: {error}") from error


def _opened(name: str) -> Any:
    if name == "-":
        return sys.stdin.buffer
    path = Path(name).expanduser()
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else open(path, "rb")


def _of_line(where: str, line: bytes) -> Item:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = f"0x{line[error.start]:02x}"
        return Item(where, "", "", None, f"expected UTF-8 text, got the byte {byte}")
    except ValueError as error:
        return Item(where, "", "", None, f"expected a JSON object, got something else ({error})")
    if not isinstance(fields, dict):
        return Item(where, "", "", None, f"expected a JSON object, got {type(fields).__name__}")
    return _item(where, fields)


def _item(where: str, fields: dict[str, Any]) -> Item:
    """The row of a file: prompt and response, or a text alone."""
    identity = fields.get("id")
    if "response" in fields or "prompt" in fields:
        pair = (fields.get("prompt", ""), fields.get("response", ""))
    elif "text" in fields:
        pair = ("", fields["text"])
    else:
        got = ", ".join(map(str, fields)) or "no fields"
        return Item(where, "", "", identity, f"expected the fields prompt and response, or text; got {got}")
    for name, value in zip(("prompt", "response"), pair):
        if not isinstance(value, str):
            return Item(where, "", "", identity, f"{name}: expected text, got {type(value).__name__}")
    try:
        checked_pairs([pair[0]], [pair[1]])
    except UserError as error:
        return Item(where, "", "", identity, str(error))
    return Item(where, *pair, identity)


def _refuse_inputs(inputs: list[str], output: str) -> None:
    """Raises UserError for inputs that are not there, or that are the output."""
    if not inputs:
        raise UserError("input: expected at least one file, or -, got none")
    for name in inputs:
        if name == "-":
            continue
        path = Path(name).expanduser()
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"input: {name} {what}; expected a file of rows")
        if path.stat().st_size == 0:
            raise UserError(f"input: {name} is empty; expected rows")
        if output != "-" and Path(output).expanduser().resolve() == path.resolve():
            raise UserError(f"output: {output} is an input too; expected another file")


@contextlib.contextmanager
def _output(cfg: "ModerationClassifyConfig", version: str) -> Iterator[tuple[IO[str], Written]]:
    """Context of the output: (file, what it has already)."""
    if cfg.output == "-":
        yield sys.stdout, Written()
        return
    path = Path(cfg.output).expanduser()
    written = Written() if cfg.overwrite else _continued(path, cfg, version)
    with disk.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a" if written.rows else "w", encoding="utf-8") as file:
            yield file, written


def _continued(path: Path, cfg: "ModerationClassifyConfig", version: str) -> Written:
    """What an output file has; a last line that was cut off is removed.

    Raises:
        UserError: It is no file of verdicts, or of other thresholds or settings.
    """
    if not path.exists():
        return Written()
    if not path.is_file():
        raise UserError(f"output: {path} is a folder; expected a file")
    rows = good = 0
    last = b""
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                if line[: len(LINE_START)] != LINE_START[: len(line)]:
                    raise UserError(_no_verdicts(path))
                break
            if rows == 0 or b'"threshold_version"' in line:
                _require_settings(path, line, cfg, version)
            rows, good, last = rows + 1, good + len(line), line
    try:
        where = json.loads(last)["where"] if rows else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(_no_verdicts(path)) from error
    with open(path, "r+b") as file:
        file.truncate(good)
    return Written(rows, where)


def _no_verdicts(path: Path) -> str:
    return f"output: {path} has other lines than verdicts; expected a new file, or overwrite=true"


def _require_settings(path: Path, line: bytes, cfg: "ModerationClassifyConfig", version: str) -> None:
    """Raises UserError for a line that other thresholds or settings gave."""
    try:
        found = json.loads(line)
        if "error" in found:
            return
        cases = {
            "thresholds": (found["threshold_version"], version),
            "preset": (found.get("preset"), cfg.preset),
            "source": (found.get("source"), cfg.source),
            "stream": ("prefixes" in found, cfg.stream),
            "text": ("response" in found, cfg.text),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(_no_verdicts(path)) from error
    for name, (got, expected) in cases.items():
        if got != expected:
            raise UserError(
                f"output: {path} was judged with the {name} {got}, and this run has {expected}; expected a "
                "new file, or overwrite=true"
            )
