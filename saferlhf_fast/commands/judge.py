"""The command `evaluate judge-calibration`; a judge of models is part of the stage evaluate."""

from collections.abc import Sequence
from pathlib import Path

from saferlhf_fast.config import load
from saferlhf_fast.config.inputs import check_data, check_home, listed
from saferlhf_fast.config.overrides import split_words
from saferlhf_fast.config.paths import is_local
from saferlhf_fast.errors import require


def main(command: str, words: Sequence[str]) -> None:
    """Runs the command.

    Args:
        command: Its name.
        words: What follows it on the command line.

    Raises:
        UserError: A setting or an input cannot be used.
    """
    recipe, overrides = split_words(command, words)
    cfg = load.load(command, recipe, overrides)
    check_home(cfg.output, "output")
    for key, value, _ in listed(cfg):
        check_home(value, key)
        if is_local(value):
            check_data(key, Path(value).expanduser())
    require(command, "judge", "httpx", "tenacity")
    from saferlhf_fast.evaluation.judge.calibration import calibrate

    calibrate(cfg)
