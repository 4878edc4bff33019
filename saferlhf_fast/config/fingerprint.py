"""Hashes that identify a run: of its settings, and of the contents of its inputs. No torch."""

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .paths import is_local

LATER: list[tuple[str, Any]] = [("constraints", None), ("pooling", None), ("lora.bits", None)]
"""Settings that are younger than some run folders, with their default: then they are left out of the hash."""

Input = tuple[str, str, str]
"""(key, value, kind) of a model or of data, as `inputs.listed` returns them."""


def hashes(sources: Iterable[Input]) -> dict[str, str]:
    """Returns {key: sha256 of the content} of every local input.

    Names on the Hub are not in it; they are part of the recipe's hash.

    Args:
        sources: What `inputs.listed` returns.
    """
    return {
        key: _content_hash(Path(value).expanduser())
        for key, value, _ in sources
        if is_local(value) and Path(value).expanduser().exists()
    }


def recipe_hash(stage: str, settings: dict[str, Any], sources: Iterable[Input]) -> str:
    """Returns the sha256 of a stage's settings, without what does not change its result.

    Left out are `overwrite`, `output`, `resume`, `checkpoint`, `log`, `progress`, `train.cache`, and the
    paths of local inputs: their contents have hashes of their own (see `hashes`), so a data folder that was
    moved is still the same input.

    Args:
        stage: The name of the stage.
        settings: What `load.to_dict` returns.
        sources: The models and data among them, as `inputs.listed` returns them.
    """
    values = copy.deepcopy(settings)
    for key in ("overwrite", "output", "resume", "checkpoint", "log", "progress"):
        values.pop(key, None)
    values.get("train", {}).pop("cache", None)
    for key, default in LATER:
        *groups, name = key.split(".")
        inner = values
        for group in groups:
            inner = inner.get(group, {})
        if name in inner and inner[name] == default:
            del inner[name]
    for key, value, _ in sources:
        if is_local(value):
            _replace(values, key.split("."), "local")
    text = json.dumps({"stage": stage, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _replace(values: Any, path: Sequence[str], new: str) -> None:
    """Sets the value at a path in nested dicts and lists."""
    for step in path[:-1]:
        values = values[int(step) if isinstance(values, list) else step]
    values[int(path[-1]) if isinstance(values, list) else path[-1]] = new


def _content_hash(path: Path) -> str:
    """Returns the sha256 of a file, or of a folder's relative names and contents without hidden files."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for inner in sorted(p for p in path.rglob("*") if p.is_file()):
        name = inner.relative_to(path)
        if not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{_content_hash(inner)}\n".encode())
    return digest.hexdigest()
