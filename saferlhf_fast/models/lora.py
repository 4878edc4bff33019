"""Low-rank adapters (peft): added for training, merged into plain weights when a model is saved.

Saving does not touch the model in training: the merged weights are computed beside it, since merging into the
weights and taking the adapters out again would leave rounding errors behind at every save.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError
from . import quantized

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

    from ..config.sections import Lora
    from .score_model import ScoreModel


def add_lora(model: "PreTrainedModel | ScoreModel", cfg: "Lora") -> Any:
    """Puts adapters into a causal LM or into a ScoreModel's backbone.

    Everything else is frozen, except a score head.

    Args:
        model: The model to adapt; a ScoreModel is changed in place.
        cfg: Rank, alpha, dropout and target layers.

    Returns:
        The causal LM inside peft's wrapper, or the same ScoreModel.

    Raises:
        UserError: `target_modules` does not name linear layers of the model, or names experts beside dropout.
    """
    import peft

    is_score = is_score_model(model)
    inner = model.backbone if is_score else model
    try:
        with quiet_peft():
            wrapped = peft.get_peft_model(inner, lora_config(cfg, None if is_score else "CAUSAL_LM", inner))
    except ValueError as error:
        if cfg.dropout and "lora_dropout" in str(error):
            raise UserError(
                "lora.dropout: expected 0, since target_modules names experts, whose adapters have no "
                f"dropout; got {cfg.dropout}"
            ) from error
        raise UserError(
            f"lora.target_modules: expected names of linear layers of the model, got {cfg.target_modules!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not is_score:
        return wrapped
    model.backbone = wrapped
    return model


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Context without peft's warnings about what it does itself when it adds adapters."""
    with warnings.catch_warnings():
        # GPT-2's layers keep their weight transposed; peft notices, corrects itself and says so for each.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # Experts have ranks of their own there; peft looks for these names among layers alone.
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match", category=RuntimeWarning)
        yield


def lora_config(cfg: "Lora", task_type: str | None, model: nn.Module) -> "LoraConfig":
    """The config that peft needs for our `Lora` section.

    Args:
        cfg: The section.
        task_type: peft's name for what the model is.
        model: The model that gets the adapters.

    Returns:
        The config.
    """
    import peft

    targets = cfg.target_modules if isinstance(cfg.target_modules, str) else list(cfg.target_modules)
    return peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=targets,
        exclude_modules=(_no_plain_linear(model) or None) if targets == "all-linear" else None,
        task_type=task_type,
    )


@torch.no_grad()
def _no_plain_linear(model: nn.Module) -> list[str]:
    """Names of linear layers that give something else than one vector, as the routers of Llama 4 do.

    peft takes a layer for a plain one by its class's parents, and adds its own result to whatever it gives.
    """
    names = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or not type(layer).__module__.startswith("transformers"):
            continue
        if type(layer).forward is nn.Linear.forward or not layer.weight.numel():  # 0: sharded by ZeRO-3
            continue
        try:
            result = layer(layer.weight.new_zeros(1, layer.in_features))
        except (RuntimeError, ValueError, IndexError, TypeError):
            result = None
        if not isinstance(result, torch.Tensor) or result.shape != (1, layer.out_features):
            names.append(name)
    return names


def is_score_model(model: object) -> bool:
    """True for a ScoreModel or a moderator, by what they have: their files import this one."""
    return hasattr(model, "end_scores") or hasattr(model, "is_moderator")


def has_lora(model: object) -> bool:
    """True for a model that peft wraps."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def plain(model: "PreTrainedModel | PeftModel") -> "PreTrainedModel":
    """The Hugging Face model under peft's wrapper, or the model itself."""
    return model.get_base_model() if has_lora(model) else model


def plain_state(model: "PreTrainedModel | PeftModel") -> dict[str, torch.Tensor]:
    """{name: tensor} of the plain model, with adapters merged; the model itself does not change.

    4-bit weights are dequantised and get their adapters in float32, before they take the model's dtype.
    """
    if not has_lora(model):
        return {**model.state_dict(), **_dequantized(model)}
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    state, adapted = base.state_dict(), set()
    merged = _dequantized(base)
    for name, module in base.named_modules():
        # the experts of a layer have an adapter for each of their parameters, one around the other
        if not isinstance(module, BaseTunerLayer) or name.endswith(".base_layer"):
            continue
        adapted.add(name + ".")
        wrappers = [module]
        while isinstance(inner := wrappers[-1].base_layer, BaseTunerLayer):
            wrappers.append(inner)
        inside = name + ".base_layer" * len(wrappers) + "."
        for key, value in state.items():
            if key.startswith(inside):
                merged[name + "." + key.removeprefix(inside)] = value
        merged.pop(name + ".base_layer.weight", None)
        for wrapper in wrappers:
            parameter = getattr(wrapper, "parameter_name", "weight")
            merged[f"{name}.{parameter}"] = _merged_weight(wrapper, parameter)
    prefixes = tuple(adapted)
    merged.update({key: value for key, value in state.items() if not key.startswith(prefixes)})
    return merged


def _dequantized(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """{name: tensor} of a model's 4-bit weights, which its state dict leaves out."""
    return {
        f"{name}.weight": quantized.in_file_layout(layer, quantized.weight_of(layer))
        for name, layer in quantized.layers(model).items()
    }


def _merged_weight(layer: "BaseTunerLayer", parameter: str) -> torch.Tensor:
    """The weight of an adapted layer, which has this name there, with its active adapters added."""
    inner = layer.get_base_layer()
    if not quantized.is_quantized(inner):
        weight = getattr(inner, parameter).detach()
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        return weight
    weight = quantized.weight_of(inner)
    total = weight.float()
    for adapter in layer.active_adapters:
        total = total + layer.get_delta_weight(adapter).detach().float()
    return quantized.in_file_layout(inner, total.to(weight.dtype))
