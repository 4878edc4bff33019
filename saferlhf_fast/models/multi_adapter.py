"""Several low-rank adapters (peft) on one base, one of them on at a time; and a score model's adapter in
files.

A score model that was trained with LoRA is saved whole, and beside it, in <model>/adapter, as peft would save
it (AutoPeftModelForSequenceClassification reads it): one shared base takes that instead of another base.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from .lora import lora_config, plain, quiet_peft

HEAD = "base_model.model.score.weight"


class Saved(NamedTuple):
    """A score model's adapter as it lies in files."""

    config: object  # peft.LoraConfig
    state: dict  # {name: tensor} of the adapter, as peft names them
    head: torch.Tensor  # [1, H]


def add(model, config, role):
    """Adds an adapter that changes nothing yet to a causal LM, or to one that has some -> peft's wrapper.

    config: a Lora config or a peft.LoraConfig. Every adapter takes gradients, whichever is on.
    """
    import peft

    config = config if isinstance(config, peft.LoraConfig) else lora_config(config, "CAUSAL_LM")
    with quiet_peft():
        if hasattr(model, "peft_config"):
            model.add_adapter(role, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=role)
    for name in model.peft_config:
        for parameter in parameters(model, name):
            parameter.requires_grad_(True)
    return model


def layers(model):
    """All layers that carry adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def use(all_layers, role):
    """Switches one adapter on, or all off (None).

    Not by peft's set_adapter: that takes gradients from the others.
    """
    for layer in all_layers:
        layer._disable_adapters = role is None
        if role is not None:
            layer._active_adapter = [role]


def parameters(model, role):
    """The weights of one adapter, in the model's order."""
    return [p for name, p in model.named_parameters() if "lora_" in name and f".{role}." in f"{name}."]


def load(model, role, state):
    """Puts weights into an adapter. ValueError when they are not its."""
    import peft

    done = peft.set_peft_model_state_dict(model, state, adapter_name=role)
    missing = [name for name in done.missing_keys if "lora_" in name and f".{role}." in name]
    if done.unexpected_keys or missing:
        raise ValueError(
            f"adapter {role}: expected weights for all of its layers, got {len(missing)} missing and "
            f"{len(done.unexpected_keys)} unknown"
        )


def save_score(folder, score, base):
    """Writes the adapter and head of a ScoreModel. base: what it was trained on, as a path or Hub name."""
    import copy

    import peft
    from safetensors.torch import save_file

    wrapped = score.backbone
    prefix = plain(wrapped).base_model_prefix or "model"
    state = {
        name.replace("base_model.model.", f"base_model.model.{prefix}.", 1): tensor.detach()
        .cpu()
        .contiguous()
        for name, tensor in peft.get_peft_model_state_dict(wrapped).items()
    }
    state[HEAD] = score.score.weight.detach().cpu().contiguous()
    config = copy.copy(wrapped.peft_config["default"])
    config.base_model_name_or_path, config.task_type = _name(base), peft.TaskType.SEQ_CLS
    config.modules_to_save, config.inference_mode = ["score"], True
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(state, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def config_of_score(path, base):
    """-> peft.LoraConfig of the score model's adapter in a folder, or None where it has none, or one of
    another base. Reads no weights.
    """
    folder = Path(path).expanduser() / "adapter"
    if not (folder / "adapter_config.json").is_file():
        return None
    import peft

    config = peft.LoraConfig.from_pretrained(folder)
    return config if config.base_model_name_or_path == _name(base) else None


def of_score(path, base):
    """-> Saved of the score model in a folder, or None where it has none, or one of another base."""
    from safetensors.torch import load_file

    config = config_of_score(path, base)
    if config is None:
        return None
    state = load_file(Path(path).expanduser() / "adapter" / "adapter_model.safetensors")
    head = state.pop(HEAD)
    config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", False
    return Saved(config, state, head)


def _name(base):
    """A local folder by its real path, anything else as it is."""
    return os.path.realpath(os.path.expanduser(base)) if Path(base).expanduser().exists() else str(base)
