"""Several low-rank adapters (peft) on one base, one of them on at a time; and the files of adapters.

A score model that was trained with LoRA is saved with merged weights, and its adapter alone is saved in
<model>/adapter, in peft's own form (AutoPeftModelForSequenceClassification reads it). A shared base loads
that adapter and so needs no second base. A policy's adapter is saved beside it where its base has 4 bits,
since the merged weights are then not the trained function (see quantized.py).
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from .folders import replacing
from .lora import lora_config, plain, quiet_peft
from .score_head import ScoreHead

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

    from ..config.sections import Lora
    from .score_model import ScoreModel

HEAD = "base_model.model.score.weight"


class Saved(NamedTuple):
    """A score model's adapter, read from files."""

    config: "LoraConfig"  # peft's
    state: dict[str, torch.Tensor]  # {name: tensor} of the adapter, by peft's names
    head: torch.Tensor  # [1, H]


def add(model: "PreTrainedModel | PeftModel", config: "Lora | LoraConfig", role: str) -> "PeftModel":
    """Adds an adapter that changes nothing yet to a causal LM, which may have adapters already.

    Args:
        model: A causal LM or peft's wrapper of one.
        config: Our Lora section or a peft.LoraConfig.
        role: The adapter's name.

    Returns:
        peft's wrapper. Every adapter takes gradients, whichever is on.
    """
    import peft

    config = config if isinstance(config, peft.LoraConfig) else lora_config(config, "CAUSAL_LM", model)
    with quiet_peft():
        if hasattr(model, "peft_config"):
            model.add_adapter(role, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=role)
    for name in model.peft_config:
        for parameter in parameters(model, name):
            parameter.requires_grad_(True)
    return model


def layers(model: nn.Module) -> "list[BaseTunerLayer]":
    """All layers that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def use(all_layers: "Iterable[BaseTunerLayer]", role: str | None) -> None:
    """Switches one adapter on, or all off (None).

    peft's set_adapter would do, but it takes gradients from the other adapters.
    """
    for layer in all_layers:
        layer._disable_adapters = role is None
        if role is not None:
            layer._active_adapter = [role]


def parameters(model: nn.Module, role: str) -> list[nn.Parameter]:
    """The weights of one adapter, in the model's order."""
    return [p for name, p in model.named_parameters() if "lora_" in name and f".{role}." in f"{name}."]


def load(model: "PeftModel", role: str, state: Mapping[str, torch.Tensor]) -> None:
    """Loads weights into an adapter.

    Args:
        model: peft's wrapper.
        role: The adapter's name.
        state: {name: tensor} by peft's names.

    Raises:
        ValueError: The weights belong to other layers.
    """
    import peft

    result = peft.set_peft_model_state_dict(model, state, adapter_name=role)
    missing = [name for name in result.missing_keys if "lora_" in name and f".{role}." in name]
    if result.unexpected_keys or missing:
        raise ValueError(
            f"adapter {role}: expected weights for all of its layers, got {len(missing)} missing and "
            f"{len(result.unexpected_keys)} unknown"
        )


def can_be_adapter(score: "ScoreModel") -> bool:
    """Whether an adapter on a shared base can give a model's scores: a plain linear head at each token."""
    plain_head = score.score.bias is None and score.normalizer is None
    return plain_head and score.pooling == "last" and not score.pairs


def save_score(folder: str | Path, score: "ScoreModel", base: str | Path) -> None:
    """Writes the adapter and head of a ScoreModel.

    Args:
        folder: Where to write.
        score: A ScoreModel with adapters.
        base: The model that it was trained on, as a path or Hub name.
    """
    import copy

    import peft

    wrapped = score.backbone
    prefix = plain(wrapped).base_model_prefix or "model"
    state = {
        name.replace("base_model.model.", f"base_model.model.{prefix}.", 1): tensor.detach()
        .cpu()
        .contiguous()
        for name, tensor in peft.get_peft_model_state_dict(wrapped).items()
    }
    assert isinstance(score.score, ScoreHead), "`can_be_adapter` refuses other heads"
    state[HEAD] = score.score.weight.detach().cpu().contiguous()
    config = copy.copy(wrapped.peft_config["default"])
    config.base_model_name_or_path, config.task_type = _name(base), peft.TaskType.SEQ_CLS
    config.modules_to_save = ["score"]
    _write(folder, config, state)


def save_policy(folder: str | Path, lm: "PeftModel", base: str | Path) -> None:
    """Writes the adapter of a causal LM that is on, as peft's AutoPeftModelForCausalLM reads it.

    Args:
        folder: Where to write.
        lm: peft's wrapper.
        base: The model that it was trained on, as a path or Hub name.
    """
    import copy

    import peft

    (role,) = layers(lm)[0].active_adapters
    state = peft.get_peft_model_state_dict(lm, adapter_name=role)
    config = copy.copy(lm.peft_config[role])
    config.base_model_name_or_path, config.task_type = _name(base), peft.TaskType.CAUSAL_LM
    _write(folder, config, {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def _write(folder: str | Path, config: "LoraConfig", state: dict[str, torch.Tensor]) -> None:
    """Writes an adapter's two files."""
    from safetensors.torch import save_file

    config.inference_mode = True
    with replacing(folder) as new:
        config.save_pretrained(new)
        save_file(state, new / "adapter_model.safetensors", metadata={"format": "pt"})


def config_of_score(path: str | Path, base: str | Path) -> "LoraConfig | None":
    """The config of a score model's adapter; reads no weights.

    Args:
        path: The score model's folder.
        base: The base that the adapter must belong to, as a path or Hub name.

    Returns:
        The config, or None where the folder has no adapter or one of another base.
    """
    folder = Path(path).expanduser() / "adapter"
    if not (folder / "adapter_config.json").is_file():
        return None
    import peft

    config = peft.LoraConfig.from_pretrained(folder)
    return config if config.base_model_name_or_path == _name(base) else None


def load_score_adapter(path: str | Path, base: str | Path) -> Saved | None:
    """Reads a score model's adapter and head.

    Args:
        path: The score model's folder.
        base: The base that the adapter must belong to, as a path or Hub name.

    Returns:
        Both with their config, or None where the folder has no adapter or one of another base.
    """
    from safetensors.torch import load_file

    config = config_of_score(path, base)
    if config is None:
        return None
    state = load_file(Path(path).expanduser() / "adapter" / "adapter_model.safetensors")
    head = state.pop(HEAD)
    config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", False
    return Saved(config, state, head)


def _name(base: str | Path) -> str:
    """A local folder by its real path, anything else unchanged."""
    return os.path.realpath(os.path.expanduser(base)) if Path(base).expanduser().exists() else str(base)
