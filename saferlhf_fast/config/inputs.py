"""The models and data that a config names, and whether they can be read at all.

Names on the Hub (see paths.py) are left to the loaders. No torch.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints, overload

from pydantic.fields import FieldInfo

from ..errors import UserError
from .paths import TOKENIZER_FILES, pickle_problem
from .schema import Annotation, in_order, show
from .setting_types import ScorerSpec, Source

DATA_FILES = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")
"""The same as SUFFIXES of data/files.py, which this room may not import."""
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt")


def listed(cfg: Any) -> list[tuple[str, str, str]]:
    """Returns (key, value, kind) of every model and data source that a config names, models first.

    The types of the settings tell what they name: ModelPath, Scorer and ScorerSpec name models, Data and
    Source name data, on every level.

    Args:
        cfg: The config of a stage.

    Returns:
        key is dotted, value is a path or a Hub name, kind is "model" or "data".
    """
    return sorted(_inputs(type(cfg), cfg, ""), key=lambda item: item[2] != "model")


def _inputs(annotation: Annotation, value: object, key: str) -> Iterator[tuple[str, str, str]]:
    """Yields (key, value, kind) of what a setting names."""
    if isinstance(value, (ScorerSpec, Source)):
        yield f"{key}.path", value.path, "model" if isinstance(value, ScorerSpec) else "data"
    elif dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value), include_extras=True)
        for f in in_order(type(value)):
            yield from _inputs(hints[f.name], getattr(value, f.name), f"{key}.{f.name}".lstrip("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _inputs(annotation, item, f"{key}.{i}")
    elif isinstance(value, str) and (kind := _kind(annotation)):
        yield key, value, kind


def _kind(annotation: Annotation) -> str | None:
    """Returns what a text of a type names: "model", "data" or None."""
    if annotation in (ScorerSpec, Source):
        return "model" if annotation is ScorerSpec else "data"
    if isinstance(annotation, FieldInfo):
        extra = annotation.json_schema_extra
        return str(extra["input"]) if isinstance(extra, dict) and "input" in extra else None
    return next((kind for inner in get_args(annotation) if (kind := _kind(inner))), None)


@overload
def check_home(value: str, key: str) -> str: ...
@overload
def check_home(value: None, key: str) -> None: ...
def check_home(value: str | None, key: str) -> str | None:
    """Returns a path with its ~ written out.

    Args:
        value: The path; None stays None.
        key: The setting, for messages.

    Raises:
        UserError: The path has a null character, or begins with the home folder of a user who does not exist
            here (~nobody-here/data).
    """
    if value is not None and "\0" in value:
        raise UserError(f"{key}: expected a path, got one with a null character in it: {show(value)}")
    try:
        # The second one: what is in the settings is also written as UTF-8.
        os.fsencode(value or ""), (value or "").encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{key}: expected a path in {sys.getfilesystemencoding()}, the encoding of this locale, got "
            f"{ascii(value)}; set LC_ALL=C.UTF-8"
        ) from e
    try:
        return None if value is None else str(Path(value).expanduser())
    except RuntimeError as e:
        raise UserError(
            f"{key}: {value}: expected a home folder before the first /, got that of no user here"
        ) from e


def check_model(key: str, path: Path, allow_pickle: bool) -> None:
    """Checks that a folder has the files of a model.

    Args:
        key: The setting, for messages.
        path: The model folder.
        allow_pickle: Whether its weights may be pickles.

    Raises:
        UserError: The folder, its config, its weights or its tokenizer are missing, or the weights are
            pickles.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{key}: {path} {what}; expected a model folder (config.json, weights, tokenizer)")
    if not (path / "config.json").is_file():
        raise UserError(f"{key}: {path} has no config.json; expected a Hugging Face model folder")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{key}: {path / 'config.json'} is not JSON: {e}") from e
    if not isinstance(config, dict):
        raise UserError(f"{key}: {path / 'config.json'}: expected a JSON object, got {show(config)}")
    if not any(p.suffix in WEIGHT_ENDINGS for p in path.iterdir()):
        raise UserError(f"{key}: {path} has no weights; expected a file that ends in .safetensors or .bin")
    problem = pickle_problem(path, allow_pickle)
    if problem:
        raise UserError(f"{key}: {path} {problem}")
    if not _has_tokenizer(path):
        raise UserError(f"{key}: {path} has no tokenizer; expected one of {', '.join(TOKENIZER_FILES[:4])} …")


def _has_tokenizer(path: Path) -> bool:
    """Tells whether a model folder has a tokenizer.

    Byte tokenizers (ByT5, CANINE) and those with code of their own have only a config, no vocabulary file.
    """
    if any((path / name).is_file() for name in TOKENIZER_FILES) or any(path.glob("*.tiktoken")):
        return True
    config = path / "tokenizer_config.json"
    if not config.is_file():
        return False
    text = config.read_text(encoding="utf-8", errors="replace")
    return any(name in text for name in ("ByT5", "Canine", "Perceiver", "auto_map"))


def check_data(key: str, path: Path) -> None:
    """Checks that a path is a data file with content or a folder that is not empty.

    Args:
        key: The setting, for messages.
        path: A file or a folder.

    Raises:
        UserError: It is neither.
    """
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; expected a data file or folder")
    if path.is_file() and not path.name.lower().endswith(DATA_FILES):
        raise UserError(f"{key}: {path}: expected a data file ending in {', '.join(DATA_FILES)}")
    if path.is_dir() and not any(p.is_file() for p in path.rglob("*")):
        raise UserError(f"{key}: {path} is an empty folder; expected data files")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{key}: {path} is empty; expected records")


def is_inside(value: str | Path, folder: str | Path) -> bool:
    """Tells whether a path is a folder or is inside of it; neither has to exist."""
    path, parent = (Path(os.path.abspath(Path(item).expanduser())) for item in (value, folder))
    return path == parent or parent in path.parents
