"""Which keys DeepSpeed's configuration has, read from its source text: settings are checked before torch is
imported.

    unknown({"gradient_cliping": 1})   ->   ("gradient_cliping", "gradient_clipping")

DeepSpeed passes over a top-level key that it does not know, and nothing lists those that it does: each is a
string somewhere in its source. A key that stands in quotes nowhere there can be read by nobody, which is
certain; one that does may still have no meaning at the top level. The keys of zero_optimization are the
fields of one class, and known exactly.
"""

import ast
import functools
import re
from importlib.util import find_spec
from pathlib import Path

from .schema import nearest


def unknown(config):
    """engine.config -> (dotted key that DeepSpeed does not have, the nearest one that it has or None); None
    when all is well.
    """
    folder = _folder()
    if folder is None:  # what needs it says so when it comes to that
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


def _folder():
    """Where DeepSpeed lies, without importing it; None where it is not installed."""
    spec = find_spec("deepspeed")
    return Path(spec.origin).parent if spec and spec.origin else None


@functools.cache
def _quoted(folder, key):
    """True when a key is a string in DeepSpeed's source."""
    words = [f'"{key}"', f"'{key}'"]
    return any(word in text for text in _texts(folder) for word in words)


@functools.cache
def _texts(folder, pattern="*.py"):
    return tuple(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.rglob(pattern)))


@functools.cache
def _words(folder):
    """Strings of the files that name keys: what a wrong one may have been meant to be."""
    texts = (*_texts(folder, "*config.py"), *_texts(folder, "*constants.py"))
    return tuple(
        sorted({word for text in texts for word in re.findall(r"[\"']([a-z][a-z0-9_]{2,})[\"']", text)})
    )


@functools.cache
def _zero_fields(folder):
    """Names and aliases of DeepSpeedZeroConfig's fields; empty when the class is not where it was."""
    path = folder / "runtime" / "zero" / "config.py"
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    names = []
    for cls in (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DeepSpeedZeroConfig"
    ):
        for field in (node for node in cls.body if isinstance(node, ast.AnnAssign)):
            names.append(field.target.id)
            names += [
                word.value.value
                for word in getattr(field.value, "keywords", ())
                if word.arg == "alias" and isinstance(word.value, ast.Constant)
            ]
    return tuple(names)
