"""The commands `moderation evaluate`, `classify` and `serve`; `moderation train` is a stage of run.py."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from saferlhf_fast.config import load
from saferlhf_fast.config.inputs import check_data, check_home, check_model, listed
from saferlhf_fast.config.overrides import split_words
from saferlhf_fast.config.paths import is_local
from saferlhf_fast.errors import UserError, require
from saferlhf_fast.runtime.quiet_libraries import quiet_libraries

ENTRIES = {
    "moderation evaluate": "saferlhf_fast.moderation.evaluate:evaluate",
    "moderation classify": "saferlhf_fast.moderation.classify:classify",
    "moderation serve": "saferlhf_fast.moderation.serve.app:serve",
}


def main(command: str, words: Sequence[str]) -> None:
    """Runs one of the commands.

    Args:
        command: A key of ENTRIES.
        words: What follows it on the command line.

    Raises:
        UserError: A setting or an input cannot be used.
    """
    recipe, overrides = split_words(command, words)
    cfg = load.load(command, recipe, overrides)
    check(cfg)
    if command == "moderation serve":
        require(command, "serve", "fastapi", "uvicorn", "prometheus_client")
    quiet_libraries()
    module, name = ENTRIES[command].split(":")
    run: Callable[[Any], Any] = getattr(import_module(module), name)
    run(cfg)


def check(cfg: Any) -> None:
    """Refuses models, data and outputs that cannot be read or written, before torch is imported.

    Args:
        cfg: The settings of one of the commands.

    Raises:
        UserError: The first problem.
    """
    if hasattr(cfg, "output"):
        check_home(cfg.output, "output")
    for key, value, kind in listed(cfg):
        check_home(value, key)
        if not is_local(value):
            continue
        path = Path(value).expanduser()
        if kind == "data":
            check_data(key, path)
            continue
        check_model(key, path, cfg.allow_pickle)
        if not (path / "moderation.json").is_file():
            raise UserError(
                f"{key}: {path}: expected a moderator (a folder with moderation.json), got a model without "
                "one; `saferlhf-fast moderation train` makes one"
            )
