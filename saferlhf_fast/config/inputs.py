"""The models and data that a config names, and whether they can be read at all. Names on the Hub (see paths.py) are left to
the loaders. No torch.
"""

import json
import os
from pathlib import Path

from ..errors import UserError
from .load import to_dict
from .paths import TOKENIZER_FILES, pickle_problem
from .schema import show

MODEL_KEYS = ("model", "reward", "cost", "reference", "reward_critic", "cost_critic")
CONSTRAINT_KEYS = ("cost", "critic")
DATA_KEYS = ("data", "prompts", "ptx", "train.eval_data", "evaluation.data")
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")
"""data/files.py's SUFFIXES: whose package imports torch."""
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt")


def listed(cfg):
    """Yields (key, value, kind) for every model and data source that a config names; kind is "model" or "data"."""
    values = to_dict(cfg, hide=False)
    yield from _models(values, MODEL_KEYS)
    for i, constraint in enumerate(values.get("constraints") or []):
        yield from _models(constraint, CONSTRAINT_KEYS, f"constraints.{i}.")
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


def _models(values, keys, prefix=""):
    """Yields (key, path, "model") of those keys that name a model, by its path or as a scorer that has one."""
    for key in keys:
        value = values.get(key)
        if value is not None:
            yield (f"{prefix}{key}.path", value["path"], "model") if isinstance(value, dict) else (prefix + key, value, "model")


def check_home(value, key):
    """Returns a path with its ~ written out; refuses one in the home folder of somebody who has none: ~nobody-here/data."""
    try:
        return None if value is None else str(Path(value).expanduser())
    except RuntimeError as e:
        raise UserError(f"{key}: {value}: expected a home folder before the first /, got that of no user here") from e


def check_model(key, path, allow_pickle):
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


def check_data(key, path):
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; expected a data file or folder")
    if path.is_file() and not path.name.lower().endswith(DATA_FILES):
        raise UserError(f"{key}: {path}: expected a data file ending in {', '.join(DATA_FILES)}")
    if path.is_dir() and not any(p.is_file() for p in path.rglob("*")):
        raise UserError(f"{key}: {path} is an empty folder; expected data files")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{key}: {path} is empty; expected records")


def lies_in(value, folder):
    path, folder = Path(os.path.abspath(Path(value).expanduser())), Path(os.path.abspath(Path(folder).expanduser()))
    return path == folder or folder in path.parents
