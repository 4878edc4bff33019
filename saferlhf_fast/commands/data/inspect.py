"""`saferlhf-fast data inspect`: what is in some sources, as tables and as a page."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from saferlhf_fast.commands.data.options import InspectOptions, require_choice
from saferlhf_fast.commands.data.side_file import SideFile, print_counts
from saferlhf_fast.data.harm_taxonomy import SEVERITIES
from saferlhf_fast.data.inspection import Inspector
from saferlhf_fast.data.near_duplicates import groups_of
from saferlhf_fast.data.row_stream import RowCounts, RowReader
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import console, disk

TEMPLATE = Path(__file__).with_name("page.html")
NAMES = ("inspection.html", "inspection.json", "bad.jsonl")
"""Files that the command writes, and replaces when it runs again."""


def inspect(options: InspectOptions) -> dict[str, Any]:
    """Inspects, prints the tables, and writes the page and its numbers as JSON.

    Args:
        options: The options.

    Returns:
        The numbers.

    Raises:
        UserError: An option or a source cannot be used.
    """
    require_choice("lengths", options.lengths, ("sample", "all"))
    folder = Path(options.output).expanduser()
    if folder.exists() and (not folder.is_dir() or {item.name for item in folder.iterdir()} - {*NAMES}):
        if not options.overwrite:
            raise UserError(f"output: {folder} has other files; overwrite=true writes beside them")
    measure = token_lengths(options.model) if options.model else None
    folder.mkdir(parents=True, exist_ok=True)
    side = SideFile(folder / NAMES[2])
    inspector = Inspector(measure, options.lengths == "all", options.seed)
    reader = RowReader(options.sources, options.form, side.add, options.strict)
    begin = time.perf_counter()
    for _, found in reader:
        inspector.add(found)
    side.close()
    unit = f"tokens of {options.model}" if options.model else "characters"
    result = inspector.result(unit) | {"sources": options.sources, "files": [_file(c) for c in reader.counts]}
    result["seconds"] = time.perf_counter() - begin
    if options.against:
        other = Inspector(lambda texts: [0] * len(texts))
        for _, found in RowReader([options.against]):
            other.add(found)
        result["overlap"] = {"with": options.against, **inspector.overlap(other)}
    if options.near is not None:
        result["near_duplicates"] = _near_duplicates(options, options.near)
    print_counts(reader.counts, side)
    print_result(result)
    disk.write_json(folder / NAMES[1], result)
    text = json.dumps(result, ensure_ascii=True).replace("<", "\\u003c")  # a name may hold </script>
    page = TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text)
    disk.write_text(folder / NAMES[0], page)
    console.say(f"page: {folder / NAMES[0]}")
    return result


def _file(counts: RowCounts) -> dict[str, Any]:
    return {
        "file": counts.file,
        "form": counts.form,
        "in": counts.kept + counts.skipped,
        "kept": counts.kept,
        "skipped": counts.skipped,
        "reasons": dict(counts.reasons.most_common()),
    }


def _near_duplicates(options: InspectOptions, similarity: float) -> dict[str, float]:
    begin = time.perf_counter()

    def prompts() -> Iterator[str]:
        for _, found in RowReader(options.sources, options.form):
            yield from (item.prompt for item in found)

    keys, groups = groups_of(prompts(), similarity)
    return {
        "similarity": similarity,
        "distinct_prompts": len(keys),
        "groups": len({*groups.tolist()}),
        "seconds": time.perf_counter() - begin,
    }


def token_lengths(model: str) -> Callable[[list[str]], list[int]]:
    """Returns a function that gives the number of tokens of texts.

    Args:
        model: A model's folder or Hub name.

    Raises:
        UserError: It has no tokenizer that can be read.
    """
    file = Path(model).expanduser() / "tokenizer.json"
    try:
        if file.is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(file))
            return lambda texts: [
                len(item.ids) for item in tokenizer.encode_batch(texts, add_special_tokens=False)
            ]
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # the libraries have errors of their own
        raise UserError(f"model: {model} has no tokenizer that can be read ({error})") from error
    return lambda texts: [len(ids) for ids in loaded(texts, add_special_tokens=False)["input_ids"]]


def print_result(result: dict[str, Any]) -> None:
    """Prints the tables.

    Args:
        result: What `Inspector.result` returned, with the parts that `inspect` adds.
    """
    for label in ("answers", "prompts"):
        _print_labels(label, result[label])
    both, duplicates = result["better_is_safer"], result["duplicates"]
    rows: list[tuple[str, object]] = [
        ("rows", result["rows"]),
        ("distinct prompts", duplicates["distinct_prompts"]),
        ("repeated rows", duplicates["rows"]),
        ("repeated answers (with their prompt)", duplicates["answers"]),
        ("empty answers", result["empty_answers"]),
        ("rows with both labels, better and safer", both["rows"]),
        ("of these, the better answer is the safer one", both["agree"]),
        ("same prompt and answer labelled both ways", result["contradictions"]["labelled_both_ways"]),
        *((name, n) for name, n in result["contradictions"].items() if not name.startswith("labelled")),
    ]
    if "overlap" in result:
        overlap = result["overlap"]
        rows.append((f"rows whose prompt is in {overlap['with']}", overlap["rows_with_a_shared_prompt"]))
        rows.append((f"answers that are in {overlap['with']}", overlap["shared_answers"]))
    if "near_duplicates" in result:
        near = result["near_duplicates"]
        name = f"groups of near-duplicate prompts (similarity {near['similarity']}, {near['seconds']:.1f} s)"
        rows.append((name, near["groups"]))
    console.result_table("rows, duplicates and contradictions", ("what", "count"), rows)
    lengths = result["lengths"]
    which = f"a random sample of {lengths['rows']} rows" if lengths["sampled"] else "all rows"
    columns = ("n", "mean", "min", "p5", "median", "p95", "p99", "max")
    console.result_table(
        f"lengths in {lengths['unit']}, of {which}",
        ("text", *columns),
        [
            (
                name,
                *(
                    number if isinstance(number, int) else f"{number:.0f}"
                    for number in lengths[name].values()
                ),
            )
            for name in ("prompt", "answer")
            if lengths[name]
        ],
    )


def _print_labels(label: str, table: dict[str, Any]) -> None:
    if not table["total"]:
        return
    severities = ("0", "1", "2", "3", "unknown")
    heads = [f"{key} {SEVERITIES[int(key)]}" if key.isdigit() else key for key in severities]
    console.result_table(
        f"labels of {label}",
        ("label", "yes", "no", "unknown"),
        [
            (name, *(table[name].get(key, 0) for key in ("yes", "no", "unknown")))
            for name in ("unsafe", "refusal")
        ],
    )
    console.result_table(
        f"severity of {label}", heads, [[table["severity"].get(key, 0) for key in severities]]
    )
    for label_set, categories in table["categories"].items():
        console.result_table(
            f"categories of {label_set} × severity, {label}",
            ("category", "total", *heads, "label unknown"),
            [
                (name, *(counts.get(key, 0) for key in ("total", *severities, "label_unknown")))
                for name, counts in categories.items()
            ],
        )
