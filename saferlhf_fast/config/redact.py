"""What is written never says a password: credentials in addresses, values of keys that are named for secrets,
and whatever the environment holds under such a name. No torch.

Used for configs (config.yaml, trackers, checkpoints) and for tracebacks that a run keeps.
"""

import os
import re

HIDDEN = "***"
_CREDENTIALS = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@'\"]+@")
_SECRET_KEY = re.compile(
    r"(^|[_.-])((api|access|auth|secret)_?key|token|secret|passwd|password|credentials?)$", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(rf"{_SECRET_KEY.pattern}|_KEY$", re.IGNORECASE)
_SHORT = 8  # an environment value of fewer characters is not looked for: it could be any word


def text(value):
    """A text without credentials in addresses and without secrets of the environment."""
    value = _CREDENTIALS.sub(rf"\g<scheme>{HIDDEN}@", value)
    for secret in sorted(_of_environment(), key=len, reverse=True):
        value = value.replace(secret, HIDDEN)
    return value


def values(tree, key=""):
    """Nested dicts and lists without secrets: texts as `text` gives them, texts under a secret's key hidden
    whole.
    """
    if isinstance(tree, dict):
        return {name: values(inner, str(name)) for name, inner in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [values(inner, key) for inner in tree]
    if not isinstance(tree, str):
        return tree
    return HIDDEN if tree and _SECRET_KEY.search(key) else text(tree)


def _of_environment():
    return {
        value for name, value in os.environ.items() if len(value) >= _SHORT and _SECRET_VARIABLE.search(name)
    }
