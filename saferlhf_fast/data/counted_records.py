"""Records of a recipe's data; every record that is not used is counted with its reason."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from saferlhf_fast.config.setting_types import Data
from saferlhf_fast.data.columns import ExtraColumns, extra_columns
from saferlhf_fast.data.files import Row
from saferlhf_fast.data.formats import FORMATS, Format, format_of, with_labels
from saferlhf_fast.data.messages import with_message_lists
from saferlhf_fast.data.records import Conversation, Dropped, Preference, Prompt, Record
from saferlhf_fast.data.report import Report, SourceReport
from saferlhf_fast.data.sources import load_sources
from saferlhf_fast.errors import UserError

EMPTY = "a response with no token"
DISAGREEING = "safety, severity and categories of a response contradict each other"
SHORTENED = "the prompt lost its beginning"

Item = TypeVar("Item")
Result = TypeVar("Result")


def records_of(
    data: Data, seed: int, report: Report, labels: bool = False
) -> Iterator[tuple[SourceReport, list[Any]]]:
    """Yields (counts, records) of each source; what the formats drop is counted already.

    Args:
        data: A recipe's `data`.
        seed: Seed of the rows that sources with a count or a proportion draw.
        report: Gets the counts of each source.
        labels: Give the records harm labels.
    """
    for item in load_sources(data, seed):
        rows = [with_message_lists(row) for row in item.rows]
        name, form = format_of(rows, item.source.format, item.source.path)
        extra = extra_columns(rows, form, labels)
        counts = SourceReport(item.source.path, name, item.available, len(rows), extra.unread)
        report.sources.append(counts)
        yield counts, parsed_records(rows, form, extra, counts, labels)


def parsed_records(
    rows: Iterable[Row], form: Format, extra: ExtraColumns, counts: SourceReport, labels: bool = False
) -> list[Any]:
    """Returns the records in some rows of one source; what the format drops is counted.

    Args:
        rows: The rows, with messages as lists.
        form: The format of the source.
        extra: What other columns of the source mean.
        counts: Gets the counts.
        labels: Give the records harm labels.
    """
    records: list[Record] = []
    for row in rows:
        for parsed in form.parse(row):
            record = extra.apply(row, parsed)
            if labels and not isinstance(record, (Dropped, Prompt)):
                record = with_labels(form, row, record)
            if isinstance(record, Dropped):
                counts.drop(record.reason, record.where)
            else:
                records.append(record)
    return records


def require_record(counts: SourceReport, record: type[Record], wanted: str) -> None:
    """Raises UserError when a source's format does not give records of a kind; `wanted` is its name."""
    if FORMATS[counts.format].record is not record:
        raise UserError(f"{counts.path}: expected {wanted}, got the format {counts.format}")


def each_accepted(
    counts: SourceReport, items: Iterable[Item], function: Callable[[Item], Result]
) -> list[tuple[Item, Result]]:
    """Returns [(item, function(item))] and counts the items that the chat template refuses.

    An item is a record, or a tuple that begins with one.
    """
    results = []
    for item in items:
        try:
            results.append((item, function(item)))
        except UserError as error:
            record: Any = item[0] if isinstance(item, tuple) else item
            counts.drop(str(error), record.where)
    return results


def flag_disagreeing(counts: SourceReport, record: Conversation | Preference) -> None:
    """Counts a record with a harm label that contradicts itself."""
    if any(label.contradicts_itself for label in record.labels):
        counts.flag(DISAGREEING, record.where)
