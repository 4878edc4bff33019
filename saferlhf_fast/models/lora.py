"""Low-rank adapters (peft): added for training, merged into plain weights when a model is saved.

Saving does not touch the model in training: the merged weights are computed beside it, since merging into the
weights and taking the adapters out again would leave rounding errors behind at every save.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import quantized

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor
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
        UserError: `target_modules` does not name linear layers of the model.
    """
    import peft

    is_score = is_score_model(model)
    lora = lora_config(cfg, None if is_score else "CAUSAL_LM")
    try:
        with quiet_peft():
            wrapped = peft.get_peft_model(model.backbone if is_score else model, lora)
    except ValueError as error:
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
        yield


def lora_config(cfg: "Lora", task_type: str | None) -> "LoraConfig":
    """The config that peft needs for our `Lora` section."""
    import peft

    targets = cfg.target_modules if isinstance(cfg.target_modules, str) else list(cfg.target_modules)
    return peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=targets,
        task_type=task_type,
    )


def is_score_model(model: object) -> bool:
    """True for a ScoreModel or a moderator, by what they have: their files import this one."""
    return hasattr(model, "end_scores") or hasattr(model, "is_moderator")


def has_lora(model: object) -> bool:
    """True for a model that peft wraps."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def plain(model: "PreTrainedModel | PeftModel") -> "PreTrainedModel":
    """The Hugging Face model under peft's wrapper, or the model itself."""
    return model.get_base_model() if has_lora(model) else model


def plain_state(model: "PreTrainedModel | PeftModel") -> "dict[str, Tensor]":
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
        if not isinstance(module, BaseTunerLayer):
            continue
        adapted.add(name + ".")
        for key, value in state.items():
            if key.startswith(name + ".base_layer."):
                merged[name + "." + key.removeprefix(name + ".base_layer.")] = value
        merged.pop(name + ".base_layer.weight", None)
        merged[name + ".weight"] = _merged_weight(module)
    prefixes = tuple(adapted)
    merged.update({key: value for key, value in state.items() if not key.startswith(prefixes)})
    return merged


def _dequantized(model: "PreTrainedModel") -> "dict[str, Tensor]":
    """{name: tensor} of a model's 4-bit weights, which its state dict leaves out."""
    return {
        f"{name}.weight": quantized.in_file_layout(layer, quantized.weight_of(layer))
        for name, layer in quantized.layers(model).items()
    }


def _merged_weight(layer: "BaseTunerLayer") -> "Tensor":
    """The weight of an adapted layer with its active adapters added."""
    inner = layer.get_base_layer()
    if not quantized.is_quantized(inner):
        weight = inner.weight.detach()
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        return weight
    weight = quantized.weight_of(inner)
    total = weight.float()
    for adapter in layer.active_adapters:
        total = total + layer.get_delta_weight(adapter).detach().float()
    return quantized.in_file_layout(inner, total.to(weight.dtype))
