"""What a stage refuses before anything slow: settings that contradict each other, models and data that cannot be read,
optimisers and trackers that are not installed. No torch.
"""

import dataclasses
import importlib.util
from pathlib import Path

from saferlhf_fast.config import deepspeed_keys
from saferlhf_fast.config.inputs import check_data, check_home, check_model, lies_in, listed
from saferlhf_fast.config.paths import is_local
from saferlhf_fast.config.schema import show
from saferlhf_fast.config.sections import Multiplier
from saferlhf_fast.config.stage_table import STAGE_SPECS
from saferlhf_fast.errors import UserError

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}

ELSEWHERE = {"zero_optimization.stage": "engine.zero_stage", "bf16.enabled": "engine.precision",
             "fp16.enabled": "engine.precision", "gradient_clipping": "optim.max_grad_norm", "optimizer": "optim.kind",
             "scheduler": "optim.schedule", "train_batch_size": "the stage's batch size",
             "train_micro_batch_size_per_gpu": "the stage's batch size",
             "gradient_accumulation_steps": "the stage's batch size"}
"""DeepSpeed's settings that are not for engine.config, and what of ours sets them: our code goes by ours."""


def check(stage, cfg, produced=(), prefix=""):
    """Refuses what cannot work before torch is imported: settings that contradict each other, missing inputs.

    produced: output folders of earlier stages of the same run, which need not exist yet; prefix: written before keys.
    """
    check_settings(stage, cfg, prefix)
    if hasattr(cfg, "log"):
        check_trackers(cfg.log.trackers, f"{prefix}log.trackers")
    for key in ("output", "resume"):
        check_home(getattr(cfg, key, None), prefix + key)
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
        except OSError as e:                             # a name that is too long, a folder that may not be entered
            raise UserError(f"{at}: {value} cannot be read: {e.strerror or e}") from e


def check_settings(stage, cfg, prefix=""):
    """Refuses settings that contradict each other; prefix: written before keys."""
    problem = _contradiction(stage, cfg)
    if problem:
        raise UserError(f"{prefix}{problem}")
    for key in ("optim", "critic_optim"):
        if hasattr(cfg, key):
            check_optimizer(getattr(cfg, key), cfg.engine.zero_stage, prefix + key)


def _contradiction(stage, cfg):
    """Returns a sentence about settings that do not go together; None when all is well."""
    problem = _engine_contradiction(cfg.engine) if hasattr(cfg, "engine") else None
    if problem:
        return problem
    train = getattr(cfg, "train", None)
    if train and (train.best_metric or train.eval_interval) and train.eval_data is None and train.eval_fraction == 0:
        name = "best_metric" if train.best_metric else "eval_interval"
        return f"train.{name}: needs something to evaluate on: train.eval_fraction or train.eval_data"
    if train and train.best_metric and train.best_metric not in STAGE_SPECS[stage].best_by:
        return f"train.best_metric: expected one of {', '.join(STAGE_SPECS[stage].best_by)}, got {train.best_metric}"
    sampling = getattr(cfg, "sampling", None)
    for name in ("max_new_tokens", "max_prompt_length"):
        length = getattr(sampling, name, None)
        if length is not None and length >= cfg.max_length:
            return f"sampling.{name}: must be below max_length ({cfg.max_length}), got {length}"
    return _ppo_contradiction(stage, cfg) if stage in ("ppo", "ppo-lag") else None


def _engine_contradiction(engine):
    if engine.offload_optimizer and engine.zero_stage == 0:
        return "engine.offload_optimizer: needs engine.zero_stage 1, 2 or 3, got 0"
    if engine.offload_parameters and engine.zero_stage != 3:
        return f"engine.offload_parameters: needs engine.zero_stage 3, got {engine.zero_stage}"
    for key, ours in ELSEWHERE.items():              # a model sharded behind our back would be saved in pieces
        value = engine.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return f"engine.config.{key}: expected none, since {ours} says it; got {show(value)}"
    wrong = deepspeed_keys.unknown(engine.config) if engine.config else None
    if wrong:
        key, guess = wrong
        return (f"engine.config.{key}: expected a key that DeepSpeed knows, got {key.rsplit('.', 1)[-1]}"
                + (f"; did you mean {guess}?" if guess else ""))
    return None


def _ppo_contradiction(stage, cfg):
    if stage == "ppo-lag" and cfg.cost is None:
        return "cost: missing; ppo-lag needs a cost model (without one, use the stage ppo)"
    if stage == "ppo-lag" and cfg.ppo.shaping is not None:
        return "ppo.shaping: only in the stage ppo; ppo-lag has the multiplier instead"
    problem = _constraint_without_effect(cfg) if stage == "ppo" else None
    if problem:
        return problem
    if cfg.ppo.shaping is not None and cfg.cost is None:
        return "ppo.shaping: needs a cost model: cost=…"
    if cfg.cost_critic is not None and cfg.cost is None:
        return "cost_critic: needs a cost model: cost=…"
    multiplier = cfg.multiplier
    if stage == "ppo-lag" and multiplier.rule == "exponential" and multiplier.init == 0:
        return "multiplier.init: expected above 0 for the exponential rule, which cannot leave 0; got 0"
    if stage == "ppo-lag" and multiplier.init > multiplier.max:
        return f"multiplier.init: expected at most multiplier.max ({multiplier.max:g}), got {multiplier.init:g}"
    ppo = cfg.ppo
    if ppo.shared_critic and stage == "ppo":
        return "ppo.shared_critic: only in the stage ppo-lag; without a constraint there is one critic anyway"
    if ppo.shared_critic and cfg.cost_critic is not None:
        return "cost_critic: expected none with ppo.shared_critic, which starts from reward_critic or the reward model"
    if ppo.importance_cap is not None and ppo.old_logp == "engine":
        return "ppo.importance_cap: only with ppo.old_logp=trainer; from the engine's log-probs the ratio itself corrects"
    if ppo.minibatches > ppo.batch_size:
        return f"ppo.minibatches: expected at most ppo.batch_size ({ppo.batch_size}), got {ppo.minibatches}"
    return _overlap_contradiction(cfg) or _trunk_contradiction(cfg) or _evaluation_contradiction(cfg.evaluation)


def _constraint_without_effect(cfg):
    """Somebody who types ppo for ppo-lag would otherwise train without the constraint that he gave."""
    given = {f"multiplier.{name}": value for name, value in _of_the_multiplier(cfg).items()}
    if cfg.evaluation.margin:
        given["evaluation.margin"] = cfg.evaluation.margin
    for key, value in given.items():
        return f"{key}: only in the stage ppo-lag; ppo has no constraint. Expected none, got {show(value)}"
    return None


def _of_the_multiplier(cfg):
    """{name: value} of the multiplier's settings that are not the defaults."""
    given = dataclasses.asdict(cfg.multiplier) if hasattr(cfg, "multiplier") else {}
    return {name: value for name, value in given.items() if value != getattr(Multiplier(), name)}


def _overlap_contradiction(cfg):
    if not cfg.ppo.overlap:
        return None
    if cfg.ppo.importance_cap is None and cfg.ppo.old_logp == "trainer":
        return "ppo.overlap: needs ppo.importance_cap (2.0 is common) or ppo.old_logp=engine, since its batches are a step stale"
    if cfg.engine.frozen == "sharded":
        return "ppo.overlap: expected engine.frozen auto or replicated, got sharded: two threads would start collectives"
    if cfg.engine.zero_stage == 3 or cfg.lora.rank:
        got = "3" if cfg.engine.zero_stage == 3 else "one trunk (lora.rank)"
        return f"ppo.overlap: expected engine.zero_stage 0, 1 or 2 and separate models, got {got}"
    if cfg.sampling.engine == "vllm":
        return "ppo.overlap: expected another sampling.engine than vllm, which would lie on the device twice; vllm-server does it"
    if cfg.sampling.engine == "vllm-server" and cfg.evaluation.interval:
        return "evaluation.interval: expected none with ppo.overlap and sampling.engine=vllm-server, which is busy sampling then"
    return None


def _trunk_contradiction(cfg):
    if not cfg.lora.rank:
        return None
    if cfg.engine.zero_stage == 3:
        return "engine.zero_stage: expected 0, 1 or 2 with lora.rank, got 3; the frozen base lies on every device whole"
    if cfg.engine.frozen == "sharded":
        return "engine.frozen: expected auto or replicated with lora.rank, whose roles share one base; got sharded"
    for name in ("reward_critic", "cost_critic"):
        if getattr(cfg, name) is not None:
            return f"{name}: expected none with lora.rank, whose critics are adapters on {cfg.model}"
    return None


def _evaluation_contradiction(evaluation):
    if (evaluation.select or evaluation.interval) and evaluation.data is None and evaluation.fraction == 0:
        name = "select" if evaluation.select else "interval"
        return f"evaluation.{name}: needs something to evaluate on: evaluation.fraction or evaluation.data"
    return None


def check_optimizer(optim, zero_stage, key="optim"):
    """Refuses an Optimizer config that cannot be had here; without torch, so that it can be asked before a model is loaded."""
    if optim.kind == "adafactor" and zero_stage > 0:
        raise UserError(f"{key}.kind: adafactor needs engine.zero_stage 0, got {zero_stage}: ZeRO 1 to 3 hand the optimiser flat "
                        "pieces of weights, which have no rows and columns to factor; adamw-8bit works there")
    if optim.kind == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key}.kind: adamw-8bit needs bitsandbytes, which is not installed: pip install 'saferlhf-fast[8bit]'")


def check_trackers(trackers, key="log.trackers"):
    """Raises UserError when a tracker is named whose package is missing; imports none of them."""
    for tracker in trackers:
        package = TRACKER_PACKAGES[tracker]
        spec = importlib.util.find_spec(package)
        # Without an origin it is a folder of that name: wandb leaves one in the working directory.
        if spec is None or spec.origin is None:
            raise UserError(f"{key}: {tracker} is named, but the package {package} is not installed; "
                            f"pip install {package}, or leave it out")
