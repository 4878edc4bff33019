"""Models and their files: causal LM, score model and policy, with packing, attention and adapters."""

import importlib
from typing import Any

_PUBLIC = {
    "load_causal_lm": "causal_lm",
    "load_score_model": "score_model",
    "load_tokenizer": "tokenizer",
    "save_causal_lm": "causal_lm",
    "save_score_model": "score_checkpoint",
}
"""What callers outside the package need, and the file that has it."""


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that one file of this room stays quick to import."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
