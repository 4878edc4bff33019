"""What tells one run from another: the hash of its settings and of what its inputs hold. No torch."""

import copy
import hashlib
import json
from pathlib import Path

from .paths import is_local

LATER = [("constraints", None)]
"""Settings that came when there were run folders already, and the value under which these keep their hash."""

# --- hashes
# -------------------------------------------------------------------------------------------------------


def hashes(sources):
    """Returns {key: sha256 of the content} of every local input; names on the Hub are part of the recipe's
    hash.

    sources: what `inputs.listed` gives.
    """
    return {
        key: _content_hash(Path(value).expanduser())
        for key, value, _ in sources
        if is_local(value) and Path(value).expanduser().exists()
    }


def recipe_hash(stage, settings, sources):
    """Returns the sha256 of a stage's settings, without what does not change its result.

    settings: as `load.to_dict` gives them · sources: the models and data among them, as `inputs.listed` gives
    them. Left out: `overwrite`, `output`, `resume`, `checkpoint`, `log` and `progress`; a local input counts
    by its content (see `hashes`), so a data folder that was moved is still the same input.
    """
    values = copy.deepcopy(settings)
    for key in ("overwrite", "output", "resume", "checkpoint", "log", "progress"):
        values.pop(key, None)
    values = {key: value for key, value in values.items() if (key, value) not in LATER}
    for key, value, _ in sources:
        if is_local(value):
            _replace(values, key.split("."), "local")
    text = json.dumps({"stage": stage, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _replace(values, path, new):
    for step in path[:-1]:
        values = values[int(step) if isinstance(values, list) else step]
    values[int(path[-1]) if isinstance(values, list) else path[-1]] = new


def _content_hash(path):
    """sha256 of a file, or of a folder's relative names and contents; hidden files (.git, caches) do not
    count.
    """
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for inner in sorted(p for p in path.rglob("*") if p.is_file()):
        name = inner.relative_to(path)
        if not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{_content_hash(inner)}\n".encode())
    return digest.hexdigest()
