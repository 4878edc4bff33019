"""DeepSpeed's configuration, precision and learning-rate schedule, derived from the settings of a stage."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..config.sections import Engine, Optimizer


def precision(cfg: "Engine") -> torch.dtype:
    """The dtype of the weights in forward and backward."""
    name = cfg.precision
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def settings(cfg: "Engine", optim: "Optimizer | None") -> dict[str, Any]:
    """DeepSpeed's configuration for one model.

    Args:
        cfg: The engine's settings; `cfg.config` is merged over what follows from the others.
        optim: The optimiser's settings; None for a frozen model.

    Returns:
        Nested dicts with DeepSpeed's own keys.
    """
    dtype = precision(cfg)
    config: dict[str, Any] = {
        # only for DeepSpeed's own counts: our micro-batches are lists of any length
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": _clipping(cfg, optim) if optim else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {
            "stage": cfg.zero_stage if optim else 3 if shards_frozen(cfg) else 0,
            "overlap_comm": False,
        },
    }
    zero = config["zero_optimization"]
    if zero["stage"] and optim and cfg.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if cfg.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
    for key, value in (cfg.config or {}).items():
        config[key] = (
            {**config[key], **value}
            if isinstance(value, dict) and isinstance(config.get(key), dict)
            else value
        )
    return config


def shards_frozen(cfg: "Engine") -> bool:
    """Whether the frozen models are spread over the devices; otherwise each device holds all weights."""
    return cfg.zero_stage == 3 if cfg.frozen == "auto" else cfg.frozen == "sharded"


def _clipping(cfg: "Engine", optim: "Optimizer") -> float:
    """The largest gradient norm; 0 switches clipping off.

    ZeRO-0 in fp32 measures the norm only while it clips, so that there the limit is never 0.
    """
    return optim.max_grad_norm or (1e30 if cfg.zero_stage == 0 else 0.0)


def learning_rate_factor(optim: "Optimizer", total_steps: int) -> Callable[[int], float]:
    """The learning-rate schedule.

    Args:
        optim: Says which schedule, and the share of warm-up steps.
        total_steps: Optimiser steps of the whole run.

    Returns:
        A function from the step (from 0) to the factor on the peak learning rate. The first step already
        moves: its factor is 1 / warm-up steps.
    """
    warmup = math.ceil(optim.warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if optim.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0 - progress if optim.schedule == "linear" else 1.0

    return factor
