"""Files of score models: which layout a folder has, its head, and writing the one that everybody reads.

Read: `score.weight` beside a backbone (AutoModelForSequenceClassification(num_labels=1), and ours) and
safe-rlhf's `score_head.weight`, `score_head.bias`, `normalizer.mean`, `normalizer.var`. Written: the former,
with what it cannot say (kind, bias, normaliser) under `saferlhf_fast` in config.json. No torch at import.
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .folders import quiet, readable, replacing, write_card
from .lora import has_lora, plain, plain_state
from .tokenizer import with_distinct_pad

OURS = "saferlhf_fast"
_HEAD_NAMES = (
    "score.weight",
    "score.bias",
    "score_head.weight",
    "score_head.bias",
    "normalizer.mean",
    "normalizer.var",
)
# safe-rlhf's normaliser does what the kind of score says.
_REF_FUNCTION = {"reward": "affine", "cost": "scale", "critic": "identity"}
_REF_FIELDS = (
    "score_dim",
    "score_bias",
    "score_type",
    "bias",
    "do_normalize",
    "normalizer_type",
    "momentum",
    "mean",
    "var",
)


@dataclass(frozen=True)
class Head:
    """A score head as it lies in files."""

    weight: Any  # [1, H]
    bias: float | None = None
    normalizer: dict | None = None  # {"function", "mean", "var"}
    kind: str | None = None  # reward, cost, critic


def read_head(folder, path, may_lack=False):
    """-> Head, or None for a plain language model when may_lack. path: what the user called the folder."""
    folder = Path(folder)
    config = _config(folder, path)
    architectures = config.get("architectures") or []
    is_ref = "score_dim" in config or any(name.endswith("ForScore") for name in architectures)
    claims = is_ref or OURS in config or any("ForSequenceClassification" in name for name in architectures)
    with readable(path, "score model"):
        tensors = read_tensors(folder, _HEAD_NAMES)
    weight = tensors.get("score.weight", tensors.get("score_head.weight"))
    if weight is None and claims:
        raise UserError(
            f"{path}: expected the head of a score model (score.weight or score_head.weight), got weights "
            f"without one, though its architecture is {', '.join(architectures) or 'a score model'}"
        )
    if weight is None and may_lack:
        return None
    if weight is None:
        raise UserError(
            f"{path}: expected a score model (score.weight or score_head.weight), got a plain "
            f"{', '.join(architectures) or 'model'} without a head; train one on it with the stages "
            "reward and cost"
        )
    if weight.dim() != 2 or weight.shape[0] != 1:
        raise UserError(f"{path}: expected a head with one score, got a weight of shape {list(weight.shape)}")
    bias = tensors.get("score.bias", tensors.get("score_head.bias"))
    bias = None if bias is None else float(bias.float().reshape(-1)[0])
    if is_ref and OURS not in config:
        kind = config.get("score_type")
        return Head(weight, bias, _ref_normalizer(config, tensors, kind, path), kind)
    said = config.get(OURS) or {}
    return Head(weight, said.get("score_bias", bias), said.get("normalizer"), said.get("kind"))


def _ref_normalizer(config, tensors, kind, path):
    if not config.get("do_normalize"):
        return None
    if (kind or "reward") not in _REF_FUNCTION:
        raise UserError(f"{path}: config.json: expected score_type reward, cost or critic, got {kind!r}")

    def number(name, default):
        value = tensors.get(f"normalizer.{name}", config.get(name))
        if value is None:
            return default
        return (
            float(value.float().reshape(-1)[0])
            if hasattr(value, "reshape")
            else float(value[0] if isinstance(value, list) else value)
        )

    return {
        "function": _REF_FUNCTION[kind or "reward"],
        "mean": number("mean", 0.0),
        "var": number("var", 1.0),
    }


def _config(folder, path):
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: config.json: expected a JSON object, got {type(config).__name__}")
    return config


def read_tensors(folder, names):
    """-> {name: tensor} of those that a folder's weights have; one file or several, safetensors before .bin."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({where[name] for name in names if name in where})
        elif (folder / f"{stem}.{ending}").is_file():
            files = [f"{stem}.{ending}"]
        else:
            continue
        out = {}
        for file in files:
            out.update(_tensors_of(folder / file, names))
        return out
    return {}


def _tensors_of(file, names):
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in set(opened.keys()) & set(names)}
    import torch

    state = torch.load(file, map_location="cpu", weights_only=True)  # a pickle may not run code
    return {name: state[name] for name in names if name in state}


# ---------------------------------------------------------------- writing


def check_score_export(model, tokenizer, drop_bias=False, keep_bias=False):
    """UserError when `save_score_model` would refuse: call it before training, not after."""
    with_distinct_pad(tokenizer)
    bias, normalizer = _bias(model), model.normalizer
    if (bias is not None or normalizer is not None) and not (drop_bias or keep_bias):
        has = " and ".join(
            part
            for part in (
                f"a bias ({bias:+.4f})" if bias is not None else "",
                f"a normaliser ({normalizer})" if normalizer is not None else "",
            )
            if part
        )
        raise UserError(
            f"this score model has {has}, which AutoModelForSequenceClassification cannot hold: its scores "
            "would differ and C > 0 would mean something else; expected drop_bias=true to leave it out, "
            "got none"
        )


def save_score_model(
    folder: str | Path,
    model: Any,
    tokenizer: Any,
    *,
    kind: str,
    card: dict | None = None,
    state_dict: dict | None = None,
    drop_bias: bool = False,
    keep_bias: bool = False,
) -> None:
    """Writes a score model that AutoModelForSequenceClassification(num_labels=1) loads with the same scores.

    Safetensors, tokenizer with chat template, model card. Adapters are merged into what is written. kind:
    reward or cost · card: what the model card tells · state_dict: weights to write instead of the model's
    (its own names). A bias or normaliser is refused, unless drop_bias (left out; the shift is printed) or
    keep_bias (kept in config.json, where `load_score_model` finds it and the transformers class does not; the
    card says so). pad == eos: another special token becomes the padding token; refused when there is none.
    Architectures without such a class are written alike, for our loader alone.
    """
    assert state_dict is None or not has_lora(model.backbone), "a state dict of adapters cannot be merged"
    check_score_export(model, tokenizer, drop_bias, keep_bias)
    tokenizer = with_distinct_pad(tokenizer)
    backbone = plain(model.backbone)
    said, notes = {"kind": kind}, []
    bias, normalizer = _bias(model), model.normalizer
    if keep_bias and (bias is not None or normalizer is not None):
        said |= {"score_bias": bias, "normalizer": normalizer and _normalizer_fields(normalizer)}
        notes.append(
            f"Its scores include a bias ({bias}) and a normaliser ({normalizer}), which only saferlhf-fast's "
            "loader applies: through AutoModelForSequenceClassification the scores differ."
        )
    elif bias is not None or normalizer is not None:
        notes.append(_say_dropped(bias, normalizer))
    body, weight = _weights(model, state_dict)
    exported = _export_class(backbone, tokenizer, body)
    config = copy.deepcopy(backbone.config)
    _set_labels(config, tokenizer, said)
    prefix = (exported or type(backbone)).base_model_prefix
    state = {
        **{f"{prefix}.{name}" if prefix else name: tensor for name, tensor in body.items()},
        "score.weight": weight,
    }
    with replacing(folder) as new, quiet():
        if exported is None:
            notes.append(
                f"transformers has no sequence-classification class with a plain linear head for "
                f"{type(backbone).__name__}: load it with saferlhf-fast."
            )
            _save_ours(new, backbone, config, state)
        else:
            shell = _shell(exported, config, weight.dtype)
            shell.save_pretrained(new, state_dict=state)
        tokenizer.save_pretrained(new)
        write_card(new, kind, card, notes)


def _bias(model):
    return None if model.score.bias is None else float(model.score.bias.detach().float()[0])


def _normalizer_fields(normalizer):
    return {name: value for name, value in asdict(normalizer).items() if name != "eps"}


def _say_dropped(bias, normalizer):
    from ..runtime import console

    parts = [f"scores shift by {-bias:+.6f} (the bias, {bias:+.6f}, is left out)"] if bias is not None else []
    if normalizer is not None:
        parts.append(f"scores are no longer normalised ({normalizer})")
    line = "drop_bias: " + "; ".join(parts)
    console.say(line)
    return line[0].upper() + line[1:] + "."


def _weights(model, state_dict):
    """-> ({backbone's name: tensor}, head's weight)."""
    if state_dict is None:
        return plain_state(model.backbone), model.score.weight.detach()
    body = {
        name.removeprefix("backbone."): tensor
        for name, tensor in state_dict.items()
        if name.startswith("backbone.")
    }
    return body, state_dict["score.weight"]


def _export_class(backbone, tokenizer, body):
    """-> the transformers class that gives our scores from our weights under its own names; None when there
    is none.
    """
    from transformers import AutoModelForSequenceClassification

    mapping = AutoModelForSequenceClassification._model_mapping
    if type(backbone.config) not in mapping:
        return None
    cls = mapping[type(backbone.config)]
    config = copy.deepcopy(backbone.config)
    _set_labels(config, tokenizer, {})
    shell = _shell(cls, config, backbone.dtype)
    names = {f"{cls.base_model_prefix}.{name}" for name in body} | {"score.weight"}
    # Encoder classes have another head, multimodal ones other names: the names of the weights tell.
    return cls if set(shell.state_dict()) == names else None


def _shell(cls, config, dtype):
    """A model without memory for weights, whose save_pretrained writes a given state dict in the class's
    format.
    """
    import torch

    with torch.device("meta"):
        return cls(config).to(dtype)


def _set_labels(config, tokenizer, said):
    for field in _REF_FIELDS:
        # `bias` and the like belong to safe-rlhf only where the architecture itself has no such field.
        if hasattr(config, "score_dim") and field not in type(config)().to_dict() and field != "score_dim":
            config.__dict__.pop(field, None)
    config.__dict__.pop("score_dim", None)
    config.num_labels = 1
    config.problem_type = "regression"
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.pad_token_id = tokenizer.pad_token_id
    config.use_cache = True
    setattr(config, OURS, {name: value for name, value in said.items() if value is not None})


def _save_ours(folder, backbone, config, state):
    from huggingface_hub import save_torch_state_dict

    config.architectures = [type(backbone).__name__]
    config.dtype = str(backbone.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
