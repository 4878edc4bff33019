"""`saferlhf-fast data convert`: rows of any form as rows of another form."""

import json
from pathlib import Path

from saferlhf_fast.commands.data.options import ConvertOptions, require_choice
from saferlhf_fast.commands.data.side_file import SideFile, print_counts
from saferlhf_fast.data.labelled import LabelledRow
from saferlhf_fast.data.labelled_writers import WRITERS, CannotHold, FormWriter
from saferlhf_fast.data.row_stream import RowReader
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import console, disk


def convert(options: ConvertOptions) -> None:
    """Converts, and prints what was written and what was lost.

    Args:
        options: The options.

    Raises:
        UserError: An option or a source cannot be used, or no row fits.
    """
    require_choice("to", options.to, list(WRITERS))
    require_choice("by", options.by, ("better", "safer"))
    output = checked_output(options.output, options.sources, options.overwrite)
    if output.suffix != ".jsonl":
        raise UserError(f"output: expected a name that ends in .jsonl, got {output.name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    side = SideFile(output.with_suffix(".bad.jsonl"))
    reader = RowReader(options.sources, options.form, side.add, options.strict)
    writer = FormWriter(options.to or "", options.by)
    written = 0
    with disk.whole_file(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row, found in reader:
            try:
                lines = _lines(writer, found)
            except CannotHold as error:
                reader.skip(row, f"{options.to} cannot hold it: {error}")
                continue
            file.writelines(lines)
            written += len(lines)
        side.close()
        if not written:
            print_counts(reader.counts, side)
            raise UserError(f"to: no row can be written as {options.to}; {output} was not written")
    print_counts(reader.counts, side)
    _print_losses(writer)
    console.say(f"{written} rows of the form {options.to}: {output}")


def _lines(writer: FormWriter, found: list[LabelledRow]) -> list[str]:
    return [json.dumps(fields, ensure_ascii=False) + "\n" for item in found for fields in writer.rows(item)]


def _print_losses(writer: FormWriter) -> None:
    if writer.lost:
        console.result_table(
            f"labels that {writer.form} does not hold", ("label", "lost"), writer.lost.most_common()
        )
    if writer.forth:
        kinds = ("labels", "exact", "widened", "without counterpart")
        console.result_table(
            "categories in another label set (widened: they come back as more than themselves)",
            ("way", *kinds),
            [
                (way, *(counts[kind] for kind in kinds))
                for way, counts in (("there", writer.forth), ("back", writer.back))
            ],
        )


def checked_output(output: str | None, sources: list[str], overwrite: bool) -> Path:
    """Returns the path of an output that may be written.

    Args:
        output: The option.
        sources: The sources, which are never written to.
        overwrite: Replace what is there.

    Raises:
        UserError: It is missing, is a source, or exists.
    """
    if not output:
        raise UserError("output: missing, e.g. output=out.jsonl")
    path = Path(output).expanduser()
    taken = path.exists() and (path.is_file() or any(path.iterdir()))
    if any(path.resolve() == Path(source).expanduser().resolve() for source in sources):
        raise UserError(f"output: {path} is a source")
    if taken and not overwrite:
        raise UserError(f"output: {path} exists; overwrite=true replaces it")
    return path
