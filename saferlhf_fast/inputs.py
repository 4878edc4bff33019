"""What a stage reads: its models and data, checked before anything slow, and hashed to tell whether they changed.

Names on the Hub (see paths.py) are left to the loaders. No torch.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from saferlhf_fast.errors import UserError
from saferlhf_fast.explain import show
from saferlhf_fast.groups import Multiplier
from saferlhf_fast import deepspeed_keys, optimizers
from saferlhf_fast.metrics import check_trackers
from saferlhf_fast.paths import TOKENIZER_FILES, is_local, pickle_problem
from saferlhf_fast.settings import to_dict

MODEL_KEYS = ("model", "reward", "cost", "reference", "reward_critic", "cost_critic")
DATA_KEYS = ("data", "prompts", "ptx", "train.eval_data", "evaluation.data")
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")
"""data/files.py's SUFFIXES: whose package imports torch."""
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt")
BEST_METRICS = {"sft": ("eval/loss",), "reward": ("eval/loss", "eval/accuracy"),
                "cost": ("eval/loss", "eval/accuracy", "eval/accuracy_sign"),
                "dpo": ("eval/loss", "eval/reward_accuracy", "eval/reward_margin")}
"""What train.best_metric can name, by stage."""
ELSEWHERE = {"zero_optimization.stage": "engine.zero_stage", "bf16.enabled": "engine.precision",
             "fp16.enabled": "engine.precision", "gradient_clipping": "optim.max_grad_norm", "optimizer": "optim.kind",
             "scheduler": "optim.schedule", "train_batch_size": "the stage's batch size",
             "train_micro_batch_size_per_gpu": "the stage's batch size",
             "gradient_accumulation_steps": "the stage's batch size"}
"""DeepSpeed's settings that are not for engine.config, and what of ours sets them: our code goes by ours."""


def listed(cfg):
    """Yields (key, value, kind) for every model and data source that a config names; kind is "model" or "data"."""
    values = to_dict(cfg, hide=False)
    for key in MODEL_KEYS:
        if values.get(key) is not None:
            yield key, values[key], "model"
    for key in DATA_KEYS:
        value = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        several = isinstance(value, list)
        for i, source in enumerate(value if several else [value]):
            if source is None:
                continue
            at = f"{key}.{i}" if several else key
            yield (f"{at}.path", source["path"], "data") if isinstance(source, dict) else (at, source, "data")


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
            if not is_local(value) or any(_inside(value, folder) for folder in produced):
                continue
            path = Path(value).expanduser()
            _check_model(at, path, cfg.allow_pickle) if kind == "model" else _check_data(at, path)
        except OSError as e:                             # a name that is too long, a folder that may not be entered
            raise UserError(f"{at}: {value} cannot be read: {e.strerror or e}") from e


def check_home(value, key):
    """Returns a path with its ~ written out; refuses one in the home folder of somebody who has none: ~nobody-here/data."""
    try:
        return None if value is None else str(Path(value).expanduser())
    except RuntimeError as e:
        raise UserError(f"{key}: {value}: expected a home folder before the first /, got that of no user here") from e


def check_settings(stage, cfg, prefix=""):
    """Refuses settings that contradict each other; prefix: written before keys."""
    problem = _contradiction(stage, cfg)
    if problem:
        raise UserError(f"{prefix}{problem}")
    for key in ("optim", "critic_optim"):
        if hasattr(cfg, key):
            optimizers.check(getattr(cfg, key), cfg.engine.zero_stage, prefix + key)


def _contradiction(stage, cfg):
    """Returns a sentence about settings that do not go together; None when all is well."""
    problem = _engine_contradiction(cfg.engine) if hasattr(cfg, "engine") else None
    if problem:
        return problem
    train = getattr(cfg, "train", None)
    if train and (train.best_metric or train.eval_interval) and train.eval_data is None and train.eval_fraction == 0:
        name = "best_metric" if train.best_metric else "eval_interval"
        return f"train.{name}: needs something to evaluate on: train.eval_fraction or train.eval_data"
    if train and train.best_metric and train.best_metric not in BEST_METRICS[stage]:
        return f"train.best_metric: expected one of {', '.join(BEST_METRICS[stage])}, got {train.best_metric}"
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


def _check_model(key, path, allow_pickle):
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{key}: {path} {what}; expected a model folder (config.json, weights, tokenizer)")
    if not (path / "config.json").is_file():
        raise UserError(f"{key}: {path} has no config.json; expected a Hugging Face model folder")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{key}: {path / 'config.json'} is not JSON: {e}") from e
    if not isinstance(config, dict):
        raise UserError(f"{key}: {path / 'config.json'}: expected a JSON object, got {show(config)}")
    if not any(p.suffix in WEIGHT_ENDINGS for p in path.iterdir()):
        raise UserError(f"{key}: {path} has no weights; expected a file that ends in .safetensors or .bin")
    problem = pickle_problem(path, allow_pickle)
    if problem:
        raise UserError(f"{key}: {path} {problem}")
    if not _has_tokenizer(path):
        raise UserError(f"{key}: {path} has no tokenizer; expected one of {', '.join(TOKENIZER_FILES[:4])} …")


def _has_tokenizer(path):
    """Byte tokenizers (ByT5, CANINE) and those with code of their own have no vocabulary file, only their config."""
    if any((path / name).is_file() for name in TOKENIZER_FILES) or any(path.glob("*.tiktoken")):
        return True
    config = path / "tokenizer_config.json"
    if not config.is_file():
        return False
    text = config.read_text(encoding="utf-8", errors="replace")
    return any(name in text for name in ("ByT5", "Canine", "Perceiver", "auto_map"))


def _check_data(key, path):
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; expected a data file or folder")
    if path.is_file() and not path.name.lower().endswith(DATA_FILES):
        raise UserError(f"{key}: {path}: expected a data file ending in {', '.join(DATA_FILES)}")
    if path.is_dir() and not any(p.is_file() for p in path.rglob("*")):
        raise UserError(f"{key}: {path} is an empty folder; expected data files")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{key}: {path} is empty; expected records")


def _inside(value, folder):
    path, folder = Path(os.path.abspath(Path(value).expanduser())), Path(os.path.abspath(Path(folder).expanduser()))
    return path == folder or folder in path.parents


# --- hashes -------------------------------------------------------------------------------------------------------

def hashes(cfg):
    """Returns {key: sha256 of the content} of every local input; names on the Hub are part of the recipe's hash."""
    return {key: _content_hash(Path(value).expanduser()) for key, value, _ in listed(cfg)
            if is_local(value) and Path(value).expanduser().exists()}


def recipe_hash(stage, cfg):
    """Returns the sha256 of a stage's settings, without what does not change its result.

    Left out: `overwrite`, `output`, `resume`, `checkpoint`, `log` and `progress`; a local input counts by its content (see
    `hashes`), so a data folder that was moved is still the same input.
    """
    values = to_dict(cfg)
    for key in ("overwrite", "output", "resume", "checkpoint", "log", "progress"):
        values.pop(key, None)
    for key, value, _ in listed(cfg):
        if is_local(value):
            _replace(values, key.split("."), "local")
    text = json.dumps({"stage": stage, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _replace(values, path, new):
    for step in path[:-1]:
        values = values[int(step) if isinstance(values, list) else step]
    values[int(path[-1]) if isinstance(values, list) else path[-1]] = new


def _content_hash(path):
    """sha256 of a file, or of a folder's relative names and contents; hidden files (.git, caches) do not count."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for inner in sorted(p for p in path.rglob("*") if p.is_file()):
        name = inner.relative_to(path)
        if not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{_content_hash(inner)}\n".encode())
    return digest.hexdigest()
