"""What a stage refuses before anything slow: settings that contradict each other, models and data that cannot
be read, optimisers and trackers that are not installed. No torch.
"""

import importlib.util
from pathlib import Path

from saferlhf_fast.config import contradictions
from saferlhf_fast.config.inputs import check_data, check_home, check_model, lies_in, listed
from saferlhf_fast.config.paths import is_local
from saferlhf_fast.config.schema import show
from saferlhf_fast.config.sections import Logging, Optimizer
from saferlhf_fast.config.stage_table import STAGE_SPECS
from saferlhf_fast.errors import UserError

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check(stage, cfg, produced=(), prefix=""):
    """Refuses what cannot work before torch is imported: settings that contradict each other, missing inputs.

    produced: output folders of earlier stages of the same run, which need not exist yet; prefix: written
    before keys.
    """
    if stage not in STAGE_SPECS:  # the demo has neither models nor data of its own
        check_home(cfg.output, "output")
        return
    check_settings(stage, cfg, prefix)
    for key, logging in cfg.groups(Logging).items():
        check_trackers(logging.trackers, f"{prefix}{key}.trackers")
    for key, value in (("output", cfg.output), ("resume", cfg.resume)):
        check_home(value, prefix + key)
    for key, value, kind in listed(cfg):
        at = prefix + key
        if not value.strip():
            raise UserError(f"{at}: expected a {kind} path or a Hub name, got {show(value)}")
        check_home(value, at)
        try:
            if not is_local(value) or any(lies_in(value, folder) for folder in produced):
                continue
            path = Path(value).expanduser()
            check_model(at, path, cfg.allow_pickle) if kind == "model" else check_data(at, path)
        except OSError as e:
            # a name that is too long, a folder that may not be entered
            raise UserError(f"{at}: {value} cannot be read: {e.strerror or e}") from e


def check_settings(stage, cfg, prefix=""):
    """Refuses settings that contradict each other; prefix: written before keys."""
    problem = contradictions.first(stage, cfg)
    if problem:
        raise UserError(f"{prefix}{problem}")
    for key, optim in cfg.groups(Optimizer).items():
        check_optimizer(optim, cfg.engine.zero_stage, prefix + key)


def check_optimizer(optim, zero_stage, key="optim"):
    """Refuses an Optimizer config that cannot be had here; without torch, so that it can be asked before a
    model is loaded.
    """
    problem = contradictions.first_of(
        contradictions.OPTIMIZER, contradictions.ChosenOptimizer(optim, zero_stage), at=key
    )
    if problem:
        raise UserError(problem)


def check_trackers(trackers, key="log.trackers"):
    """Raises UserError when a tracker is named whose package is missing; imports none of them."""
    for tracker in trackers:
        package = TRACKER_PACKAGES[tracker]
        spec = importlib.util.find_spec(package)
        # Without an origin it is a folder of that name: wandb leaves one in the working directory.
        if spec is None or spec.origin is None:
            raise UserError(
                f"{key}: {tracker} is named, but the package {package} is not installed; "
                f"pip install {package}, or leave it out"
            )
