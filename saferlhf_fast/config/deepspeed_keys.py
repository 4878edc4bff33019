"""Finds keys that DeepSpeed's configuration does not have, without importing DeepSpeed or torch.

    unknown({"gradient_cliping": 1})   ->   ("gradient_cliping", "gradient_clipping")

DeepSpeed ignores a top-level key that it does not know, and it has no list of those that it knows: each is a
string somewhere in its source text. So a key that is nowhere in quotes there is certainly unknown; a key that
is may still have no meaning at the top level. The keys of zero_optimization are the fields of one class, so
they are known exactly.
"""

import ast
import functools
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .schema import nearest


def unknown(config: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Finds a key that DeepSpeed does not have.

    Args:
        config: The setting engine.config.

    Returns:
        (dotted key, the nearest key that DeepSpeed has or None) of the first such key; None when there is
        none or DeepSpeed is not installed.
    """
    folder = _folder()
    if folder is None:  # code that needs DeepSpeed reports that
        return None
    for key in map(str, config):
        if not _quoted(folder, key):
            return key, nearest(key, _words(folder))
    zero, fields = config.get("zero_optimization"), _zero_fields(folder)
    for key in map(str, zero if isinstance(zero, dict) and fields else ()):
        if key not in fields:
            guess = nearest(key, fields)
            return f"zero_optimization.{key}", guess and f"zero_optimization.{guess}"
    return None


def _folder() -> Path | None:
    """Returns DeepSpeed's folder, without importing it; None where it is not installed."""
    spec = find_spec("deepspeed")
    return Path(spec.origin).parent if spec and spec.origin else None


@functools.cache
def _quoted(folder: Path, key: str) -> bool:
    """Tells whether a key is in quotes in DeepSpeed's source."""
    strings = [f'"{key}"', f"'{key}'"]
    return any(string in text for text in _texts(folder) for string in strings)


@functools.cache
def _texts(folder: Path, pattern: str = "*.py") -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.rglob(pattern)))


@functools.cache
def _words(folder: Path) -> tuple[str, ...]:
    """Returns the strings in the files that name keys: candidates for what a wrong key means."""
    texts = (*_texts(folder, "*config.py"), *_texts(folder, "*constants.py"))
    return tuple(
        sorted({word for text in texts for word in re.findall(r"[\"']([a-z][a-z0-9_]{2,})[\"']", text)})
    )


@functools.cache
def _zero_fields(folder: Path) -> tuple[str, ...]:
    """Returns names and aliases of DeepSpeedZeroConfig's fields; none when the class is somewhere else."""
    path = folder / "runtime" / "zero" / "config.py"
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    names: list[str] = []
    for cls in (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DeepSpeedZeroConfig"
    ):
        for field in (node for node in cls.body if isinstance(node, ast.AnnAssign)):
            assert isinstance(field.target, ast.Name), "a field of a class is a plain name"
            names.append(field.target.id)
            names += [
                keyword.value.value
                for keyword in getattr(field.value, "keywords", ())
                if keyword.arg == "alias"
                and isinstance(keyword.value, ast.Constant)
                and isinstance(keyword.value.value, str)
            ]
    return tuple(names)
