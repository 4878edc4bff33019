"""`saferlhf-fast data split`: parts by prompt, with near-duplicate prompts in one part."""

import csv
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from saferlhf_fast.commands.data.convert import checked_output
from saferlhf_fast.commands.data.options import SplitOptions
from saferlhf_fast.commands.data.side_file import SideFile, print_counts
from saferlhf_fast.data.files import Row
from saferlhf_fast.data.row_stream import RowReader
from saferlhf_fast.data.split import PromptSides
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import console, disk

_AT_ONCE = 10_000


def split(options: SplitOptions) -> None:
    """Splits, and prints the rows and prompts of each part.

    Args:
        options: The options.

    Raises:
        UserError: An option or a source cannot be used.
    """
    shares = {name: getattr(options, name) for name in ("validation", "test") if getattr(options, name) > 0}
    if not shares or sum(shares.values()) >= 1:
        raise UserError(
            f"test and validation: expected shares with a sum above 0 and below 1, got {options.test} and "
            f"{options.validation}"
        )
    output = checked_output(options.output, options.sources, options.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    side = SideFile(output / "bad.jsonl")
    first = RowReader(options.sources, options.form, side.add, options.strict)
    begin = time.perf_counter()
    kinds: Counter[bool] = Counter()
    sides = PromptSides(_prompts(first, kinds), shares, options.seed, options.near)
    seconds = time.perf_counter() - begin
    side.close()
    print_counts(first.counts, side)
    if len(kinds) > 1:
        raise UserError("sources: expected CSV files only or none, got both; convert the CSV files first")
    counts = _write(options, output, sides, kinds[True] > 0)
    rows = [(part, counts[part], counts[part] / max(1, counts.total())) for part in sides.parts]
    console.result_table("parts", ("part", "rows", "share"), rows)
    console.say(
        f"{sides.prompts} prompts in {sides.groups} groups of near-duplicates (similarity {options.near}), "
        f"found in {seconds:.1f} s: {output}"
    )
    for part in sides.parts:
        if not counts[part]:
            console.warn(f"{part} has no row: its share is smaller than any group of prompts")


def _prompts(reader: RowReader, kinds: Counter[bool]) -> Iterator[str]:
    for row, found in reader:
        kinds[row.untyped] += 1
        yield found[0].prompt


def _write(options: SplitOptions, output: Path, sides: PromptSides, as_csv: bool) -> Counter[str]:
    counts: Counter[str] = Counter()
    suffix = "csv" if as_csv else "jsonl"
    with ExitStack() as stack:
        temporaries = {
            part: stack.enter_context(disk.whole_file(output / f"{part}.{suffix}")) for part in sides.parts
        }
        with ExitStack() as opened:
            files: dict[str, IO[str]] = {
                part: opened.enter_context(path.open("w", encoding="utf-8", newline=""))
                for part, path in temporaries.items()
            }
            batch: list[tuple[Row, str]] = []
            headers: dict[str, Any] = {}
            for row, found in RowReader(options.sources, options.form):
                batch.append((row, found[0].prompt))
                if len(batch) >= _AT_ONCE:
                    _write_batch(batch, sides, files, headers, counts)
            _write_batch(batch, sides, files, headers, counts)
    return counts


def _write_batch(
    batch: list[tuple[Row, str]],
    sides: PromptSides,
    files: dict[str, IO[str]],
    headers: dict[str, Any],
    counts: Counter[str],
) -> None:
    for (row, _), part in zip(batch, sides.of([prompt for _, prompt in batch])):
        counts[part] += 1
        if not row.untyped:
            files[part].write(json.dumps(row.fields, ensure_ascii=False, default=str) + "\n")
            continue
        if part not in headers:
            headers[part] = csv.DictWriter(files[part], list(row.fields))
            headers[part].writeheader()
        headers[part].writerow(row.fields)
    batch.clear()
