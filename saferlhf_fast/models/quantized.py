"""A frozen base in 4 bits for adapters (QLoRA): bitsandbytes' NF4 with double quantisation.

Loading quantises each linear layer of the backbone as it is read, on the device that trains. Embeddings,
norms and the head keep the engine's precision, in which the layers also compute. peft advises float32 for
them, for torch's autocast; DeepSpeed casts a module as a whole, and the norms of transformers compute in
float32 anyway.

The 4-bit weights are no part of a module's state: they follow from the base's files, so checkpoints leave
them out, and `base_hash` proves that a resumed run has the same ones.

Left out: 8 bits, since LLM.int8 rounds activations in evaluation and not in training: a rollout's log-probs
would be another function of the weights than the update's.

Source: Dettmers et al. (2023), QLoRA, arXiv 2305.14314.
"""

import copy
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config.sections import Engine as EngineConfig
    from ..config.sections import Lora

_HASH = "_base_hash"


def options_of_base(lora: "Lora", cfg: "EngineConfig") -> dict[str, Any]:
    """Arguments of `load_causal_lm` and `load_score_model` for the base of adapters.

    Args:
        lora: The adapters' settings.
        cfg: The engine's settings.

    Returns:
        bits and dtype of a quantised base; none for another one, which is loaded in fp32.
    """
    if lora.bits is None:
        return {}
    from ..runtime import engine

    return {"bits": lora.bits, "dtype": engine.precision(cfg)}


def loading_arguments(bits: int | None, dtype: torch.dtype, headless: bool) -> dict[str, Any]:
    """Arguments of from_pretrained that quantise a model while it is read.

    Args:
        bits: 4; None for a model that is not quantised.
        dtype: The type in which the layers compute.
        headless: Whether the model has no language-model head; a head is never quantised.

    Returns:
        The arguments; none without `bits`.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    if bits is None:
        return {}
    require("lora.bits", "qlora", "bitsandbytes")
    from transformers import BitsAndBytesConfig

    from ..runtime import engine

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # Without a list transformers spares the head, and of a model without one some last layer.
        llm_int8_skip_modules=[] if headless else None,
    )
    return {"quantization_config": config, "device_map": {"": engine.device()}}


def prepare(model: "PreTrainedModel", path: str | Path, dtype: torch.dtype) -> None:
    """Makes a model that was loaded with `loading_arguments` one that the trainer treats like any other.

    Args:
        model: The model, changed in place.
        path: The model as the user named it, for the message.
        dtype: The type in which the layers compute.

    Raises:
        UserError: Its files are quantised already, or it has no linear layers to quantise.
    """
    if model.hf_quantizer.pre_quantized:
        raise UserError(
            f"{path}: expected a model whose files are not quantised, since lora.bits=4 quantises it; got "
            f"files quantised by {model.config.quantization_config.quant_method.value}"
        )
    quantized = layers(model)
    if not quantized:
        raise UserError(f"{path}: expected linear layers, which lora.bits=4 quantises; got none")
    for layer in quantized.values():
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        # In evaluation bitsandbytes would repack the weights for this instruction set, in place: with scales
        # rounded to bf16, only for some shapes, and without a gradient afterwards.
        layer.support_avx512bf16_for_cpu = False
        if layer.in_features % layer.weight.blocksize:
            layer.forward = functools.partial(_forward_of_uneven, layer)
        layer.register_state_dict_post_hook(_leave_out_weight)
        layer.register_load_state_dict_pre_hook(_keep_weight)
    # transformers refuses to cast a model that it knows to be quantised, and saves it quantised.
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if hasattr(module, "base_model_prefix"):  # a transformers model, also inside of another
            module.is_loaded_in_4bit = True  # peft chooses its adapter layers by this
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            # Copied out of the file: while one tensor is in it, all pages that were read stay resident.
            parameter.data = parameter.data.clone()
    weights = sum(layer.in_features * layer.out_features for layer in quantized.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(quantized))
    from ..runtime import console

    console.say(
        f"lora.bits: {len(quantized)} linear layers of {path} in 4 bits: {weights:,} weights in "
        f"{size / 2**20:,.2f} MiB, {8 * size / weights:.2f} bits each"
    )


def layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the 4-bit layers of a model; none where bitsandbytes has not been imported."""
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


def is_quantized(layer: nn.Module) -> bool:
    """True for a 4-bit layer, told by its class's name: bitsandbytes may not be installed."""
    cls = type(layer)
    return cls.__name__ == "Linear4bit" and cls.__module__.startswith("bitsandbytes.")


def weight_of(layer: Any) -> torch.Tensor:
    """The weight of a 4-bit layer, dequantised: [out, in].

    It is read as one row: blocks cross the ends of rows where a row is no multiple of a block, and there
    bitsandbytes' kernel for the CPU (0.50) takes the scales of other blocks.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(layer.weight.quant_state)
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    return dequantize_4bit(layer.weight.data, state).view(shape)


def _forward_of_uneven(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of a layer whose rows are no multiple of a block; the backward dequantises again."""
    from torch.utils.checkpoint import checkpoint

    def linear(x: torch.Tensor) -> torch.Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, weight_of(layer).to(x.dtype), bias)

    inside = x.to(layer.compute_dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return checkpoint(linear, inside, use_reentrant=False, preserve_rng_state=False).to(x.dtype)
    return linear(inside).to(x.dtype)


def in_file_layout(layer: Any, weight_OI: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] as the model's files have it: GPT-2's layers keep theirs transposed.

    Args:
        layer: The 4-bit layer.
        weight_OI: The weight to convert.
    """
    from transformers.pytorch_utils import Conv1D

    transposed = issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)
    return weight_OI.T.contiguous() if transposed else weight_OI


def base_hash(model: nn.Module) -> str | None:
    """The sha256 of a model's 4-bit weights; None where it has none. Computed once, since they are frozen."""
    known = getattr(model, _HASH, None)
    if known is not None:
        return known
    quantized = layers(model)
    if not quantized:
        return None
    digest = hashlib.sha256()
    for tensor in _tensors(quantized):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    object.__setattr__(model, _HASH, digest.hexdigest())
    return digest.hexdigest()


def _tensors(quantized: Mapping[str, Any]) -> list[torch.Tensor]:
    """Packed weights and their scales, in the order of the layers."""
    tensors = []
    for layer in quantized.values():
        state = layer.weight.quant_state
        tensors += [layer.weight.data, state.absmax]
        tensors += [state.offset.reshape(1), state.state2.absmax] if state.nested else []
    return tensors


def _leave_out_weight(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Removes the 4-bit weight and its scales from a state dict; a bias stays."""
    for key in [key for key in state if key == f"{prefix}weight" or key.startswith(f"{prefix}weight.")]:
        del state[key]


def _keep_weight(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a state dict without the 4-bit weight be loaded: the layer's own weight stays."""
    state[f"{prefix}weight"] = layer.weight.data
