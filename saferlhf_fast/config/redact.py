"""Removes passwords from what is written.

These are credentials in addresses, values of keys whose names are those of secrets (token, api_key …), and
the values of environment variables with such names. Used for configs (config.yaml, trackers, checkpoints) and
for the tracebacks that a run keeps. Standard library only.
"""

import os
import re
from typing import Any

HIDDEN = "***"
_CREDENTIALS = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@'\"]+@")
_SECRET_KEY = re.compile(
    r"(^|[_.-])((api|access|auth|secret)_?key|token|secret|passwd|password|credentials?)$", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(rf"{_SECRET_KEY.pattern}|_KEY$", re.IGNORECASE)
_SHORTEST = 8  # shorter values of environment variables stay: they could be any word


def text(value: str) -> str:
    """Returns a text without credentials in addresses and without secrets of the environment."""
    value = _CREDENTIALS.sub(rf"\g<scheme>{HIDDEN}@", value)
    for secret in sorted(_environment_secrets(), key=len, reverse=True):
        value = value.replace(secret, HIDDEN)
    return value


def values(tree: Any, key: str = "") -> Any:
    """Returns nested dicts and lists without secrets.

    A text under the key of a secret is replaced by HIDDEN, every other text by what `text` returns.

    Args:
        tree: Nested dicts and lists; values that are no text stay as they are.
        key: The key under which `tree` is stored.
    """
    if isinstance(tree, dict):
        return {name: values(inner, str(name)) for name, inner in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [values(inner, key) for inner in tree]
    if not isinstance(tree, str):
        return tree
    return HIDDEN if tree and _SECRET_KEY.search(key) else text(tree)


def _environment_secrets() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _SECRET_VARIABLE.search(name)
    }
