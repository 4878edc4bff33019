"""What a model is, without its weights: its configuration, its modules, its parameters, its key-value cache.

Nothing is loaded: a folder needs only its config.json, and modules are built on the meta device. A model that
an earlier stage of the same recipe will produce has the configuration of the model that stage starts from.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...config.paths import is_local
from ...errors import UserError
from ...models.folders import checked, quiet, readable
from .zero_memory import PERSISTENT

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Blueprint(NamedTuple):
    """What tells one module from another. Hashable, so that the same module is built once.

    Attributes:
        config: The model's config.json as text.
        kind: "policy" or "score".
        dtype: Number format of the weights.
        remote: Folder whose code the model needs; "" when transformers has it.
        checkpointing: Whether activations are recomputed in the backward pass.
        lora: (rank, target modules) of adapters; () when all weights are trained.
        packing: Whether sequences run without padding.
        dropout: False where dropout is switched off, as in policy optimisation.
        bits: 4 where the base's linear layers are quantised. They are built as plain ones; `count` knows.
    """

    config: str
    kind: str
    dtype: torch.dtype
    remote: str = ""
    checkpointing: bool = False
    lora: tuple[()] | tuple[int, str | tuple[str, ...]] = ()
    packing: bool = True
    dropout: bool = True
    bits: int | None = None


class Count(NamedTuple):
    """Parameters of a module."""

    all: int
    trained: int
    largest: int  # of the largest single weight
    small: int  # of weights so small that ZeRO-3 never shards them
    buffers: int  # bytes of tensors that are not parameters
    quantized: int = 0  # weights of 4 bits among `all`
    unpacked: int = 0  # the largest of them that a layer dequantises at once


# ---------------------------------------------------------------- configurations


def config_of(path: str, key: str, earlier: Mapping[str, Any], remote_code: bool) -> tuple[str, str]:
    """Reads a model's configuration.

    Args:
        path: The model's folder or Hub name.
        key: The setting that gives `path`, for the error message.
        earlier: {output folder: config of its stage} of the stages before this one.
        remote_code: Whether code in the model's folder may run.

    Returns:
        The text of config.json, and the folder whose code the model needs, or "".

    Raises:
        UserError: There is no configuration that can be read; the message starts with `key`.
    """
    output = earlier_output(path, earlier)
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
    values = {**config.to_dict(), "architectures": None}  # a score model and its backbone count as one here
    text = json.dumps({**values, "model_type": config.model_type}, sort_keys=True, default=str)
    return text, str(path) if hasattr(config, "auto_map") and remote_code else ""


def earlier_output(path: str, earlier: Mapping[str, Any]) -> str | None:
    """Returns the output folder of an earlier stage that contains a path, or None.

    Args:
        path: A model's folder.
        earlier: {output folder: config of its stage}.
    """
    return next((output for output in earlier if _inside(path, output)), None)


def _inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or is inside it."""
    place, outer = Path(path).expanduser().absolute(), Path(folder).expanduser().absolute()
    return place == outer or outer in place.parents


def _config(blueprint: Blueprint) -> "PretrainedConfig":
    from transformers import AutoConfig

    if blueprint.remote:
        return AutoConfig.from_pretrained(blueprint.remote, trust_remote_code=True)
    values = json.loads(blueprint.config)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def of_encoder(blueprint: Blueprint) -> bool:
    """Whether a blueprint is that of an encoder."""
    from ...models.encoders import is_encoder

    return is_encoder(_config(blueprint))


# ---------------------------------------------------------------- modules


@functools.lru_cache(maxsize=32)
def build(blueprint: Blueprint) -> Any:
    """Builds the module that a stage would hand to DeepSpeed, on the meta device.

    Returns:
        A Policy or a ScoreModel, without data, in training mode.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    from ...models import backbone
    from ...models.causal_lm import train_every_row, without_dropout
    from ...models.policy import Policy
    from ...models.score_model import ScoreModel

    auto_class = AutoModelForCausalLM if blueprint.kind == "policy" else AutoModel
    options = {"trust_remote_code": True} if blueprint.remote else {}
    config = _config(blueprint)
    with (
        torch.device("meta"),
        quiet(),
        _without_probes(),
        readable(getattr(config, "model_type", "model"), "model"),
    ):
        model = auto_class.from_config(config, dtype=blueprint.dtype, **options)
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


def _adapted(model: "PreTrainedModel | torch.nn.Module", blueprint: Blueprint) -> Any:
    """Returns the model with the adapters of its blueprint, if it has some."""
    from ...config.stages import Lora
    from ...models.lora import add_lora

    if not blueprint.lora:
        return model
    rank, targets = blueprint.lora
    return add_lora(
        model, Lora(rank=rank, target_modules=list(targets) if isinstance(targets, tuple) else targets)
    )


@contextlib.contextmanager
def _without_probes() -> Iterator[None]:
    """Context in which wrapping a model compares no numbers of its own, since the meta device has none.

    Whether it runs packed is decided on the CPU, by a tiny copy; one that has none is planned as packed, and
    rows of one length at a time are planned as one pass. What was decided without a model is not kept.
    """
    from ...models import policy, row_form

    holds, forms = policy._gives_the_logits, dict(row_form.FORMS)
    policy._gives_the_logits = lambda *_: True
    try:
        yield
    finally:
        policy._gives_the_logits = holds
        row_form.FORMS.clear()
        row_form.FORMS.update(forms)


@functools.lru_cache(maxsize=64)
def count(blueprint: Blueprint) -> Count:
    """Counts the parameters of a blueprint's module."""
    module = build(blueprint)
    parameters = list(module.parameters())
    trained = [p.numel() for p in parameters if p.requires_grad]
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    sizes = [p.numel() for p in parameters]
    packed = _quantized(module) if blueprint.bits else []
    return Count(
        sum(sizes),
        sum(trained),
        max(sizes),
        sum(n for n in sizes if n <= PERSISTENT),
        buffers,
        sum(packed),
        max(packed, default=0),
    )


def _quantized(module: torch.nn.Module) -> list[int]:
    """Returns the sizes of the weights that lora.bits quantises: all linear layers but head and adapters."""
    from transformers.pytorch_utils import Conv1D

    lm = getattr(module, "lm", None)
    head = None if lm is None else lm.get_output_embeddings()
    return [
        layer.weight.numel()
        for name, layer in module.named_modules()
        if isinstance(layer, (torch.nn.Linear, Conv1D)) and layer is not head and "lora_" not in name
    ]


# ---------------------------------------------------------------- key-value cache


@functools.lru_cache(maxsize=64)
def cache_bytes(blueprint: Blueprint, tokens: int) -> int:
    """Returns the bytes of the key-value cache of one sequence, from a forward pass that fills a cache.

    Args:
        blueprint: The model.
        tokens: Length of the sequence.
    """
    from .trace import Tracker, attention_as_on

    lm = build(blueprint._replace(checkpointing=False, lora=())).lm
    with torch.no_grad(), attention_as_on("cpu"), without_data(blueprint), Tracker("cpu"):
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        cache = lm(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    return sum(t.numel() * t.element_size() for t in _tensors(cache))


@contextlib.contextmanager
def without_data(blueprint: Blueprint) -> Iterator[None]:
    """Context in which a model runs on shapes alone; UserError where its code reads numbers."""
    try:
        yield
    except UserError:
        raise
    # Whatever a model's own code raises when there are no numbers to read.
    except Exception as error:
        name = json.loads(blueprint.config)["model_type"]
        raise UserError(
            f"a {name} cannot be planned: its code does not run on shapes alone "
            f"({' '.join(str(error).split())[:160]})"
        ) from error


def _tensors(value: object, seen: set[int] | None = None) -> list[torch.Tensor]:
    """Returns the tensors inside a cache object of any class: in its attributes, lists and dicts."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in _tensors(inner, seen)]
    if isinstance(value, (list, tuple)):
        return [tensor for inner in value for tensor in _tensors(inner, seen)]
    return (
        _tensors(vars(value), seen)
        if hasattr(value, "__dict__") and "cache" in type(value).__module__
        else []
    )
