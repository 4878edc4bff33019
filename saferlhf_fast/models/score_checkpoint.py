"""Files of score models: reading the head of either layout, and writing the layout that transformers reads.

Read: `score.weight` beside a backbone (AutoModelForSequenceClassification(num_labels=1), and our own files)
and safe-rlhf's `score_head.weight`, `score_head.bias`, `normalizer.mean`, `normalizer.var`. Written: the
former, with what it has no place for (kind, bias, normaliser) under `saferlhf_fast` in config.json. No torch
at import.
"""

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .folders import quiet, readable, replacing
from .lora import has_lora, plain, plain_state
from .model_card import say_dropped, write_card
from .tokenizer import with_distinct_pad

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .score_model import ScoreModel

ENTRY = "saferlhf_fast"
"""Our entry in config.json."""
POOLED = "pooled_score.weight"
"""A linear head that reads pooled states. transformers' classes would read score.weight elsewhere."""
_HEAD_NAMES = (
    "score.weight",
    "score.bias",
    "score_head.weight",
    "score_head.bias",
    POOLED,
    "normalizer.mean",
    "normalizer.var",
)
# In safe-rlhf the kind of score decides what the normaliser does.
_SAFE_RLHF_FUNCTION = {"reward": "affine", "cost": "scale", "critic": "identity"}
_SAFE_RLHF_FIELDS = (
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
    """A score head, read from files."""

    weight: "torch.Tensor"  # [1, H]
    bias: float | None = None
    normalizer: dict[str, Any] | None = None  # {"function", "mean", "var"}
    kind: str | None = None  # reward, cost, critic


def read_head(folder: str | Path, path: str | Path, may_lack: bool = False) -> Head | None:
    """Reads a score head in either layout.

    Args:
        folder: The model's local folder.
        path: The model as the user named it, for messages.
        may_lack: Whether a plain language model, without a head, is accepted.

    Returns:
        The head, or None for a plain language model.

    Raises:
        UserError: There is no head, or one of several scores, or config.json cannot be read.
    """
    folder = Path(folder)
    config = _config(folder, path)
    architectures = config.get("architectures") or []
    is_safe_rlhf = "score_dim" in config or any(name.endswith("ForScore") for name in architectures)
    claims_head = (
        is_safe_rlhf or ENTRY in config or any("ForSequenceClassification" in name for name in architectures)
    )
    with readable(path, "score model"):
        tensors = read_tensors(folder, _HEAD_NAMES)
    weight = next((tensors[n] for n in ("score.weight", "score_head.weight", POOLED) if n in tensors), None)
    if weight is None and claims_head:
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
    bias_1 = tensors.get("score.bias", tensors.get("score_head.bias"))
    bias = None if bias_1 is None else float(bias_1.float().reshape(-1)[0])
    if is_safe_rlhf and ENTRY not in config:
        kind = config.get("score_type")
        return Head(weight, bias, _safe_rlhf_normalizer(config, tensors, kind, path), kind)
    entry = config.get(ENTRY) or {}
    return Head(weight, entry.get("score_bias", bias), entry.get("normalizer"), entry.get("kind"))


def _safe_rlhf_normalizer(
    config: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]", kind: str | None, path: str | Path
) -> dict[str, Any] | None:
    if not config.get("do_normalize"):
        return None
    if (kind or "reward") not in _SAFE_RLHF_FUNCTION:
        raise UserError(f"{path}: config.json: expected score_type reward, cost or critic, got {kind!r}")

    def number(name: str, default: float) -> float:
        value = tensors.get(f"normalizer.{name}", config.get(name))
        if value is None:
            return default
        return (
            float(value.float().reshape(-1)[0])
            if hasattr(value, "reshape")
            else float(value[0] if isinstance(value, list) else value)
        )

    return {
        "function": _SAFE_RLHF_FUNCTION[kind or "reward"],
        "mean": number("mean", 0.0),
        "var": number("var", 1.0),
    }


def _config(folder: Path, path: str | Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: config.json: expected a JSON object, got {type(config).__name__}")
    return config


def read_tensors(folder: Path, names: Collection[str]) -> "dict[str, torch.Tensor]":
    """Those of the named tensors that a folder's weights have.

    The weights are one file or several; safetensors are read before .bin files.
    """
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({file_of[name] for name in names if name in file_of})
        elif (folder / f"{stem}.{ending}").is_file():
            files = [f"{stem}.{ending}"]
        else:
            continue
        tensors = {}
        for file in files:
            tensors.update(_tensors_of(folder / file, names))
        return tensors
    return {}


def _tensors_of(file: Path, names: Collection[str]) -> "dict[str, torch.Tensor]":
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in set(opened.keys()) & set(names)}
    import torch

    state = torch.load(file, map_location="cpu", weights_only=True)  # a pickle may not run code
    return {name: state[name] for name in names if name in state}


# ---------------------------------------------------------------- writing


def _require_arguments(folder: Any, model: Any, tokenizer: Any, kind: Any) -> None:
    """ValueError for arguments of `save_score_model` that are something else than it takes."""
    from ..kernels.kinds import wrong
    from .score_inputs import KINDS, require_kind

    for name, value, expected, fits in (
        ("folder", folder, "a path", isinstance(folder, (str, Path)) and bool(str(folder))),
        ("model", model, "a ScoreModel", hasattr(model, "backbone") and hasattr(model, "score")),
        ("tokenizer", tokenizer, "a tokenizer of transformers", hasattr(tokenizer, "save_pretrained")),
    ):
        if not fits:
            raise wrong("save_score_model", name, expected, value)
    require_kind("save_score_model", kind, *KINDS)


def check_score_export(
    model: "ScoreModel",
    tokenizer: "PreTrainedTokenizerBase",
    drop_bias: bool = False,
    keep_bias: bool = False,
) -> None:
    """Refuses before training what `save_score_model` would refuse after it.

    Args:
        model: The score model.
        tokenizer: Its tokenizer.
        drop_bias: Whether a bias and a normaliser are left out of the files.
        keep_bias: Whether they are kept in config.json.

    Raises:
        UserError: There is a bias or a normaliser and neither is allowed, or no token can be the padding.
    """
    if not model.pairs:
        with_distinct_pad(tokenizer)
    bias, normalizer = _bias(model), model.normalizer
    if (bias is not None or normalizer is not None) and not (drop_bias or keep_bias):
        extras = " and ".join(
            text
            for text in (
                f"a bias ({bias:+.4f})" if bias is not None else "",
                f"a normaliser ({normalizer})" if normalizer is not None else "",
            )
            if text
        )
        raise UserError(
            f"this score model has {extras}, which AutoModelForSequenceClassification cannot hold: "
            "its scores would differ and C > 0 would mean something else; expected drop_bias=true to leave "
            "it out, got none"
        )


def save_score_model(
    folder: str | Path,
    model: "ScoreModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    kind: str,
    card: dict[str, Any] | None = None,
    state_dict: "dict[str, torch.Tensor] | None" = None,
    drop_bias: bool = False,
    keep_bias: bool = False,
) -> None:
    """Writes a score model that AutoModelForSequenceClassification(num_labels=1) loads with the same scores.

    Written are safetensors, tokenizer with chat template and model card; adapters are merged into what is
    written. Where pad == eos, another special token becomes the padding token. Architectures without such a
    class are written in the same form, which our loader alone reads.

    Args:
        folder: Where to write; an existing model folder is replaced at the end.
        model: A ScoreModel.
        tokenizer: Its tokenizer.
        kind: reward or cost.
        card: What the model card tells.
        state_dict: {name: tensor} by the model's own names, to write instead of its weights.
        drop_bias: A bias or normaliser is left out; the shift of the scores is printed.
        keep_bias: A bias or normaliser is kept in config.json, where `load_score_model` finds it and the
            transformers class does not; the card says so.

    Raises:
        UserError: There is a bias or normaliser and neither is allowed, no token can be the padding, or the
            folder holds something else than a model.
        ValueError: An argument is of another kind.
    """
    _require_arguments(folder, model, tokenizer, kind)
    assert state_dict is None or not has_lora(model.backbone), "a state dict of adapters cannot be merged"
    check_score_export(model, tokenizer, drop_bias, keep_bias)
    tokenizer = tokenizer if model.pairs else with_distinct_pad(tokenizer)
    backbone = plain(model.backbone)
    entry: dict[str, Any] = {"kind": kind, "pooling": model.pooling, "pairs": model.pairs or None}
    notes = []
    bias, normalizer = _bias(model), model.normalizer
    if keep_bias and (bias is not None or normalizer is not None):
        entry |= {"score_bias": bias, "normalizer": normalizer and normalizer.fields()}
        notes.append(
            f"Its scores include a bias ({bias}) and a normaliser ({normalizer}), which only saferlhf-fast's "
            "loader applies: through AutoModelForSequenceClassification the scores differ."
        )
    elif bias is not None or normalizer is not None:
        notes.append(say_dropped(bias, normalizer))
    backbone_state, head_state = _weights(model, state_dict)
    exported = _export_class(model, tokenizer, {*backbone_state}, {*head_state})
    config = copy.deepcopy(backbone.config)
    # RoBERTa and its kin count positions from the padding id on
    counts_from_pad = model.form.skipped is not None or bool(model.form.first)
    _set_labels(config, None if counts_from_pad else tokenizer.pad_token_id, entry)
    prefix = (exported or type(backbone)).base_model_prefix
    state = {
        **{f"{prefix}.{name}" if prefix else name: tensor for name, tensor in backbone_state.items()},
        **head_state,
    }
    with replacing(folder) as new, quiet():
        if exported is None:
            notes.append(
                f"transformers has no sequence-classification class that reads the score of "
                f"{type(backbone).__name__} like this (pooling: {model.pooling}, a linear head): load it "
                "with saferlhf-fast."
            )
            _save_without_class(new, backbone, config, state)
        else:
            shell = _shell(exported, config, backbone.dtype)
            shell.save_pretrained(new, state_dict=state)
        tokenizer.save_pretrained(new)
        write_card(new, kind, card, notes, is_pair=model.pairs)


def _bias(model: "ScoreModel") -> float | None:
    return None if model.score.bias is None else float(model.score.bias.detach().float()[0])


def _weights(
    model: "ScoreModel", state_dict: "Mapping[str, torch.Tensor] | None"
) -> "tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]":
    """({backbone's name: tensor}, {name in the file: tensor of the head})."""
    if state_dict is None:
        backbone_state = plain_state(model.backbone)
        head = {name: tensor.detach() for name, tensor in model.score.state_dict().items()}
    else:
        backbone_state, head = (
            {n.removeprefix(start): tensor for n, tensor in state_dict.items() if n.startswith(start)}
            for start in ("backbone.", "score.")
        )
    if has_own_head(model):
        return backbone_state, {n.removeprefix("classifier."): tensor for n, tensor in head.items()}
    return backbone_state, {"score.weight" if model.pooling == "last" else POOLED: head["weight"]}


def has_own_head(model: "ScoreModel") -> bool:
    """Whether the head is that of an encoder's own classification class."""
    return hasattr(model.score, "classifier")


def _export_class(
    model: "ScoreModel",
    tokenizer: "PreTrainedTokenizerBase",
    backbone_names: Collection[str],
    head_names: Collection[str],
) -> "type[PreTrainedModel] | None":
    """The transformers class that gives our scores from our weights under its own names, or None."""
    from transformers import AutoModelForSequenceClassification

    backbone = plain(model.backbone)
    mapping = AutoModelForSequenceClassification._model_mapping
    if type(backbone.config) not in mapping or POOLED in head_names:
        return None
    cls = mapping[type(backbone.config)]
    config = copy.deepcopy(backbone.config)
    _set_labels(config, tokenizer.pad_token_id, {})
    shell = _shell(cls, config, backbone.dtype)
    names = {f"{cls.base_model_prefix}.{name}" for name in backbone_names} | {*head_names}
    # Encoder classes have another head, multimodal ones other names; the names of the weights show it.
    return cls if set(shell.state_dict()) == names else None


def _shell(
    cls: "type[PreTrainedModel]", config: "PretrainedConfig", dtype: "torch.dtype"
) -> "PreTrainedModel":
    """A model without memory for weights, whose save_pretrained writes a state dict in the class's format."""
    import torch

    with torch.device("meta"):
        return cls(config).to(dtype)


def _set_labels(config: "PretrainedConfig", pad: int | None, entry: Mapping[str, Any]) -> None:
    """Changes a config, in place, to that of a one-score model, with our entry and no safe-rlhf fields."""
    for field in _SAFE_RLHF_FIELDS:
        # `bias` and the like belong to safe-rlhf only where the architecture itself has no such field.
        if hasattr(config, "score_dim") and field not in type(config)().to_dict() and field != "score_dim":
            config.__dict__.pop(field, None)
    config.__dict__.pop("score_dim", None)
    config.num_labels = 1
    config.problem_type = "regression"
    for section in {id(c): c for c in (config, config.get_text_config())}.values():
        section.pad_token_id = section.pad_token_id if pad is None else pad
    config.use_cache = True
    setattr(config, ENTRY, {name: value for name, value in entry.items() if value is not None})


def _save_without_class(
    folder: Path,
    backbone: "PreTrainedModel",
    config: "PretrainedConfig",
    state: "dict[str, torch.Tensor]",
) -> None:
    from huggingface_hub import save_torch_state_dict

    config.architectures = [type(backbone).__name__]
    config.dtype = str(backbone.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    # parts of a larger tensor, as architectures with one weight for q, k and v have them, are copied
    state = {k: v if v.untyped_storage().nbytes() == v.nbytes else v.clone() for k, v in state.items()}
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
