"""Sources and mixtures: reads the rows that a recipe's `data` names.

A source is a file, a local folder or a Hub data set. A path that exists here is never looked up on the Hub,
nor is a name that looks like a path. Local files are read without cache and without network (files.py);
`datasets` reads from the Hub, with its usual cache. Which rows are drawn depends only on the seed and on the
source's place in the mixture.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saferlhf_fast.config.paths import is_local
from saferlhf_fast.config.setting_types import Data, Source
from saferlhf_fast.data.files import Row, is_data_file, read_file, shorten
from saferlhf_fast.errors import UserError

_METADATA = ("dataset_info.json", "dataset_infos.json")
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Loaded:
    """The rows that one source contributes."""

    source: Source
    rows: list[Row]
    """Rows taken, in the source's order."""
    available: int
    """Rows that the source has."""


def load_sources(data: Data, seed: int = 0) -> list[Loaded]:
    """Returns the rows of each source, with counts and proportions applied.

    `count` is applied first. If any source gives a proportion, the proportion of the others is 1, and the
    mixture is the largest one with these proportions that repeats no row.

    Args:
        data: A recipe's `data`.
        seed: Seed of the draws.

    Raises:
        UserError: A source cannot be read.
    """
    sources = as_sources(data)
    loaded = []
    for source in sources:
        rows = [renamed(row, source) for row in load_rows(source)]
        loaded.append(Loaded(source, rows, len(rows)))
    taken = drawn(sources, [len(item.rows) for item in loaded], seed)
    return [
        item if places is None else replace(item, rows=[item.rows[i] for i in places])
        for item, places in zip(loaded, taken)
    ]


def drawn(sources: Sequence[Source], sizes: Sequence[int], seed: int) -> list[list[int] | None]:
    """Returns for each source the places of the rows that `count` and `proportion` take; None for all.

    Args:
        sources: The sources.
        sizes: The rows of each.
        seed: Seed of the draws.
    """
    taken = [
        _draw(range(size), source.count or size, f"count/{seed}/{place}")
        for place, (source, size) in enumerate(zip(sources, sizes))
    ]
    if any(source.proportion is not None for source in sources):
        weights = [1.0 if source.proportion is None else source.proportion for source in sources]
        scale = min(len(places) / weight for places, weight in zip(taken, weights))
        taken = [
            _draw(places, max(1, round(scale * weight)), f"proportion/{seed}/{place}")
            for place, (places, weight) in enumerate(zip(taken, weights))
        ]
    return [None if isinstance(places, range) else list(places) for places in taken]


def as_sources(data: Data) -> list[Source]:
    """Returns `data` as a list of Source.

    Raises:
        UserError: The list is empty.
    """
    items = list(data) if isinstance(data, (list, tuple)) else [data]
    if not items:
        raise UserError("data: expected at least one source, got an empty list")
    return [Source(path=str(item)) if isinstance(item, (str, Path)) else item for item in items]


def load_rows(source: Source) -> list[Row]:
    """Returns all rows of one source; its count, proportion and columns are not applied.

    Raises:
        UserError: The source cannot be read.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _folder(path, source)
    if path.exists():
        return read_file(path)
    if is_local(source.path):
        raise UserError(f"{source.path}: no such file or folder")
    return _hub(source)


def _draw(places: Sequence[int], count: int, key: str) -> Sequence[int]:
    if count >= len(places):
        return places
    return [places[i] for i in sorted(random.Random(key).sample(range(len(places)), count))]


def renamed(row: Row, source: Source) -> Row:
    """Returns a row with its columns renamed as the source says.

    Args:
        row: The row.
        source: Its source.

    Raises:
        UserError: The row does not have such a column, or has two of one name then.
    """
    columns = source.columns
    if not columns:
        return row
    for name in columns:
        if name not in row.fields:
            raise UserError(
                f"{row.where}: columns renames '{name}', but the row has {shorten(list(row.fields), 120)}"
            )
    fields: dict[str, Any] = {}
    for name, value in row.fields.items():
        new = columns.get(name, name)
        if new in fields:
            old = next(key for key in columns if columns[key] == new)
            raise UserError(
                f"{row.where}: columns renames '{old}' to '{new}', but the row has two columns of that name "
                f"then; rename the other one too"
            )
        fields[new] = value
    return replace(row, fields=fields)


def _folder(path: Path, source: Source) -> list[Row]:
    if is_saved_to_disk(path):
        return _saved_to_disk(path, source)
    return [row for item in chosen_files(path, source) for row in read_file(item)]


def is_saved_to_disk(path: Path) -> bool:
    """Tells whether a folder was written by `datasets`' save_to_disk."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def chosen_files(path: Path, source: Source) -> list[Path]:
    """Returns the data files of a folder that a source's `name` and `split` choose, in their order.

    Args:
        path: The folder.
        source: The source.

    Raises:
        UserError: There is no such file.
    """
    files = data_files(path)
    if source.name is not None:
        wanted = source.name.lower()
        files = [item for item in files if wanted in str(item.relative_to(path).parent).lower().split("/")]
        if not files:
            raise UserError(f"{path}: no data file in a folder called '{source.name}' (name)")
    if not files:
        raise UserError(f"{path}: the folder has no data file (.json, .jsonl, .csv, .parquet, .gz of these)")
    splits = {item: _split_of(item.relative_to(path)) for item in files}
    if any(splits.values()):
        # Files that name no split are training data, unless other files are called train.
        unnamed_too = source.split == "train" and "train" not in splits.values()
        wanted_splits = (source.split, None) if unnamed_too else (source.split,)
        files = [item for item in files if splits[item] in wanted_splits]
        if not files:
            raise UserError(
                f"{path}: no file of the split '{source.split}'; there is "
                f"{', '.join(sorted({str(split) for split in splits.values() if split}))}"
            )
    return files


def data_files(folder: Path) -> list[Path]:
    """Returns the data files under a folder, sorted; hidden ones and descriptions of data sets are none."""
    return sorted(
        item
        for item in folder.rglob("*")
        if item.is_file()
        and is_data_file(item)
        and item.name not in _METADATA
        and not any(part.startswith(".") for part in item.relative_to(folder).parts)
    )


def _split_of(relative: Path) -> str | None:
    """Returns the split in a file's or folder's name, e.g. train.jsonl, data/train-00000-of-00001.parquet."""
    stem = relative.name.split(".")[0].lower()
    words = [*stem.replace("_", "-").split("-"), *(part.lower() for part in relative.parts[:-1])]
    return next((split for split in SPLIT_NAMES if split in words), None)


def _saved_to_disk(path: Path, source: Source) -> list[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable saved data set ({shorten(error, 80)})") from error
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            raise UserError(f"{path}: no split '{source.split}'; there is {', '.join(data)}")
        data = data[source.split]
    return _rows_of(data, str(path))


def _hub(source: Source) -> list[Row]:
    import datasets

    _find_on_hub(source.path)
    had_progress_bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(source.path, name=source.name, split=source.split)
    except Exception as error:  # any error of the network or the Hub becomes one line
        raise UserError(
            f"{source.path}: no such file or folder here, and not loadable from the Hub "
            f"({type(error).__name__}: {shorten(error, 120)})"
        ) from error
    finally:
        if had_progress_bars:
            datasets.enable_progress_bars()
    return _rows_of(data, source.path)


def _find_on_hub(name: str) -> None:
    """Raises UserError when a name is not on the Hub: one request, as `datasets` retries for half a minute.

    A data set in the cache of `datasets` needs no Hub.
    """
    import datasets
    from huggingface_hub import HfApi, constants

    if (
        constants.HF_HUB_OFFLINE
        or (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___").lower()).is_dir()
    ):
        return
    try:
        HfApi().dataset_info(name, timeout=20)
    except Exception as error:  # each library has errors of its own
        raise UserError(
            f"{name}: no such file or folder here, and the Hub says: {shorten(error, 160)}"
        ) from error


def _rows_of(data: Iterable[dict[str, Any]], label: str) -> list[Row]:
    rows = [Row(fields, f"{label} row {i}") for i, fields in enumerate(data, 1)]
    if not rows:
        raise UserError(f"{label}: the data set has no records")
    return rows
