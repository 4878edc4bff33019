"""Checks before anything slow: refuses what a stage cannot work with.

These are settings that contradict each other, models and data that cannot be read, and optimisers and
trackers that are not installed. No torch.
"""

import importlib.util
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from saferlhf_fast.config import contradictions
from saferlhf_fast.config.inputs import check_data, check_home, check_model, is_inside, listed
from saferlhf_fast.config.paths import is_local
from saferlhf_fast.config.schema import show
from saferlhf_fast.config.sections import Logging, Optimizer, Training
from saferlhf_fast.config.stage_table import STAGE_SPECS
from saferlhf_fast.config.stages import StageConfig
from saferlhf_fast.errors import UserError

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check(stage: str, cfg: Any, produced: Collection[str | Path] = (), prefix: str = "") -> None:
    """Refuses settings that contradict each other and missing inputs, before torch is imported.

    Args:
        stage: The name of the stage, or demo.
        cfg: Its config.
        produced: Output folders of earlier stages of the same run, which need not exist yet.
        prefix: Written before keys in messages.

    Raises:
        UserError: The first problem.
    """
    if stage not in STAGE_SPECS:  # the demo has neither models nor data of its own
        check_home(cfg.output, "output")
        return
    check_settings(stage, cfg, prefix)
    for key, logging in cfg.groups(Logging).items():
        check_trackers(logging.trackers, f"{prefix}{key}.trackers")
    for key, training in cfg.groups(Training).items():
        check_home(training.cache, f"{prefix}{key}.cache")
    for key, value in (("output", cfg.output), ("resume", cfg.resume)):
        check_home(value, prefix + key)
    for key, value, kind in listed(cfg):
        at = prefix + key
        if not value.strip():
            raise UserError(f"{at}: expected a {kind} path or a Hub name, got {show(value)}")
        check_home(value, at)
        try:
            if not is_local(value) or any(is_inside(value, folder) for folder in produced):
                continue
            path = Path(value).expanduser()
            check_model(at, path, cfg.allow_pickle) if kind == "model" else check_data(at, path)
        except OSError as e:
            # A name that is too long, a folder without permission.
            raise UserError(f"{at}: {value} cannot be read: {e.strerror or e}") from e


def check_settings(stage: str, cfg: StageConfig, prefix: str = "") -> None:
    """Refuses settings that contradict each other.

    Args:
        stage: The name of the stage.
        cfg: Its config.
        prefix: Written before keys in messages.

    Raises:
        UserError: The first contradiction.
    """
    problem = contradictions.first(stage, cfg)
    if problem:
        raise UserError(f"{prefix}{problem}")
    for key, optim in cfg.groups(Optimizer).items():
        check_optimizer(optim, cfg.engine.zero_stage, prefix + key)


def check_optimizer(optim: Optimizer, zero_stage: int, key: str = "optim") -> None:
    """Refuses an optimiser that is not available here; runs before torch or a model is loaded.

    Args:
        optim: The settings of the optimiser.
        zero_stage: The ZeRO stage that it is for.
        key: Where the settings are in the config, for messages.

    Raises:
        UserError: Its package is not installed, or it does not work with that ZeRO stage.
    """
    problem = contradictions.first_of(
        contradictions.OPTIMIZER, contradictions.ChosenOptimizer(optim, zero_stage), at=key
    )
    if problem:
        raise UserError(problem)


def check_trackers(trackers: Iterable[str], key: str = "log.trackers") -> None:
    """Checks that the packages of trackers are installed, without importing them.

    Args:
        trackers: Keys of TRACKER_PACKAGES.
        key: The setting, for messages.

    Raises:
        UserError: A package is missing.
    """
    for tracker in trackers:
        package = TRACKER_PACKAGES[tracker]
        spec = importlib.util.find_spec(package)
        # Without an origin it is a folder with that name: wandb leaves one in the working directory.
        if spec is None or spec.origin is None:
            raise UserError(
                f"{key}: {tracker} is named, but the package {package} is not installed; "
                f"pip install {package}, or leave it out"
            )
