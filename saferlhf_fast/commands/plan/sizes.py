"""What a model is, without its weights: its configuration, its modules on the meta device, parameters,
key-value cache.

Nothing is loaded: a folder needs its config.json alone. A model that an earlier stage of the same recipe will
make has the configuration of the one that stage starts from.
"""

import contextlib
import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from ...config.paths import is_local
from ...errors import UserError
from ...models.folders import checked, quiet, readable
from .zero_memory import PERSISTENT


class Blueprint(NamedTuple):
    """What tells one module from another. Hashable, so that the same one is built once."""

    config: str  # config.json as text
    kind: str  # policy, score
    dtype: torch.dtype
    remote: str = ""  # folder whose code the model needs; "" when transformers has it
    checkpointing: bool = False
    lora: tuple = ()  # (rank, target modules); () trains all weights
    packing: bool = True
    dropout: bool = True  # False: switched off, as in policy optimisation


class Count(NamedTuple):
    """Parameters of a module."""

    all: int
    trained: int
    largest: int  # of the largest single weight
    small: int  # of weights so small that ZeRO-3 never shards them
    buffers: int  # bytes of what is no parameter


# ---------------------------------------------------------------- configurations


def config_of(path, key, earlier, remote_code):
    """-> (text of config.json, folder for remote code or ""). UserError with `key` when there is none.

    earlier: {output folder: config of its stage} of the stages before this one.
    """
    output = made_by(path, earlier)
    if output is not None and not (Path(path).expanduser() / "config.json").is_file():
        return config_of(
            earlier[output].model, key, {o: cfg for o, cfg in earlier.items() if o != output}, remote_code
        )
    try:
        checked(path)
    except UserError as error:
        hint = (
            ""
            if is_local(path)
            else f"; without a network give a folder that holds its config.json: {key}=DIR"
        )
        raise UserError(f"{key}: {error}{hint}") from error
    from transformers import AutoConfig

    with readable(path, "model"), quiet():
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=remote_code)
    values = {**config.to_dict(), "architectures": None}  # a score model and its backbone are one here
    text = json.dumps({**values, "model_type": config.model_type}, sort_keys=True, default=str)
    return text, str(path) if hasattr(config, "auto_map") and remote_code else ""


def made_by(path, earlier):
    """The output folder of an earlier stage that a path lies in, or None."""
    return next((output for output in earlier if _inside(path, output)), None)


def _inside(path, folder):
    path, folder = Path(path).expanduser().absolute(), Path(folder).expanduser().absolute()
    return path == folder or folder in path.parents


def _config(blueprint):
    from transformers import AutoConfig

    if blueprint.remote:
        return AutoConfig.from_pretrained(blueprint.remote, trust_remote_code=True)
    values = json.loads(blueprint.config)
    return AutoConfig.for_model(values.pop("model_type"), **values)


# ---------------------------------------------------------------- modules


@functools.lru_cache(maxsize=32)
def build(blueprint):
    """-> the module as a stage would hand it to DeepSpeed, on the meta device: a Policy or a ScoreModel."""
    from transformers import AutoModel, AutoModelForCausalLM

    from ...models import backbone
    from ...models.causal_lm import train_every_row, without_dropout
    from ...models.policy import Policy
    from ...models.score_model import ScoreModel

    maker = AutoModelForCausalLM if blueprint.kind == "policy" else AutoModel
    options = {"trust_remote_code": True} if blueprint.remote else {}
    config = _config(blueprint)
    with (
        torch.device("meta"),
        quiet(),
        _unprobed(),
        readable(getattr(config, "model_type", "model"), "model"),
    ):
        model = maker.from_config(config, dtype=blueprint.dtype, **options)
        if blueprint.kind == "score" and model.config.get_text_config() is not model.config:
            model = getattr(model, "language_model", model)
        train_every_row(model)
        if not blueprint.dropout:
            without_dropout(model)
        if blueprint.checkpointing:
            backbone.recompute_activations(model)
        if blueprint.kind == "policy":
            module = Policy(_adapted(model, blueprint), blueprint.packing)
        else:
            module = _adapted(ScoreModel(model, packing=blueprint.packing), blueprint)
    return module.to(blueprint.dtype).train()


def _adapted(model, blueprint):
    from ...config.stages import Lora
    from ...models.lora import add_lora

    if not blueprint.lora:
        return model
    rank, targets = blueprint.lora
    return add_lora(
        model, Lora(rank=rank, target_modules=list(targets) if isinstance(targets, tuple) else targets)
    )


@contextlib.contextmanager
def _unprobed():
    """Context in which wrapping a model compares no numbers: on the meta device there are none.

    An architecture that cannot run packed is then planned as if it could.
    """
    from ...models import backbone, policy

    real, holds, probes = backbone._packed_equals_alone, policy._gives_the_logits, dict(backbone.PROBES)
    backbone._packed_equals_alone, policy._gives_the_logits = (lambda *_: True), (lambda *_: True)
    try:
        yield
    finally:
        backbone._packed_equals_alone, policy._gives_the_logits = real, holds
        backbone.PROBES.clear()
        backbone.PROBES.update(probes)


@functools.lru_cache(maxsize=64)
def count(blueprint):
    """-> Count of a blueprint's module."""
    module = build(blueprint)
    parameters = list(module.parameters())
    trained = [p.numel() for p in parameters if p.requires_grad]
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    sizes = [p.numel() for p in parameters]
    return Count(sum(sizes), sum(trained), max(sizes), sum(n for n in sizes if n <= PERSISTENT), buffers)


# ---------------------------------------------------------------- key-value cache


@functools.lru_cache(maxsize=64)
def cache_bytes(blueprint, tokens):
    """Bytes that generation keeps of one sequence of `tokens`, found by a forward pass that fills a cache."""
    from .trace import Tracker, standing_in_for

    lm = build(blueprint._replace(checkpointing=False, lora=())).lm
    with torch.no_grad(), standing_in_for("cpu"), without_data(blueprint), Tracker("cpu"):
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        cache = lm(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    return sum(t.numel() * t.element_size() for t in _tensors(cache))


@contextlib.contextmanager
def without_data(blueprint):
    """Context in which a model runs on shapes alone; UserError where its code wants to look at numbers."""
    try:
        yield
    except UserError:
        raise
    # Whatever a model's own code raises when there is nothing to look at.
    except Exception as error:
        name = json.loads(blueprint.config)["model_type"]
        raise UserError(
            f"a {name} cannot be planned: its code does not run on shapes alone "
            f"({' '.join(str(error).split())[:160]})"
        ) from error


def _tensors(value, seen=None):
    """Tensors inside a cache object, whatever its class: they lie in its attributes, lists and dicts."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for part in value.values() for t in _tensors(part, seen)]
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in _tensors(part, seen)]
    return (
        _tensors(vars(value), seen)
        if hasattr(value, "__dict__") and "cache" in type(value).__module__
        else []
    )
