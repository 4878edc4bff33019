"""Causal language models of any Hugging Face architecture: load one, train every row of it, save it.

    lm = load_causal_lm(folder)
    save_causal_lm(folder, lm, tokenizer)

Dropout stays as the config has it; the PPO stages switch it off (`without_dropout`).
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..errors import UserError, require
from . import quantized
from .folders import (
    checked,
    has_weights,
    local_copy,
    quiet,
    readable,
    refuse_large_vocabulary,
    refuse_missing,
    replacing,
)
from .lora import has_lora, plain, plain_state
from .model_card import write_card
from .tokenizer import logit_count

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Module = TypeVar("Module", bound=nn.Module)

LOADERS = ("transformers", "huggingface_hub", "safetensors")  # what reading a model folder needs


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    bits: int | None = None,
) -> "PreTrainedModel":
    """Loads a causal LM from a folder or the Hub, with attention by SDPA where the architecture has it.

    Args:
        path: A model folder or a name on the Hub.
        dtype: The type of the weights.
        tokenizer: When given, its vocabulary must fit the embedding.
        trust_remote_code: Whether code beside the model may run.
        allow_pickle: Whether weights that exist in pickles alone are read. Only tensors are taken from them;
            nothing in them is run.
        bits: 4 quantises the backbone's linear layers, for adapters on them; the model is then on this
            process's device.

    Returns:
        The model, every row of its embedding trainable.

    Raises:
        UserError: There is no folder, no config.json or no weights; weights are missing (a score model has no
            language-model head); it is an encoder; generation_config.json is damaged; the vocabulary is
            larger than the embedding; or the weights are pickles and `allow_pickle` is False.
    """
    require("load_causal_lm", "train", *LOADERS)
    folder = checked(path)
    if folder is not None and not has_weights(folder):
        raise UserError(f"{path} has no weights; expected a file that ends in .safetensors or .bin")
    folder = local_copy(path, allow_pickle)
    _refuse_damaged_generation_config(path, folder)
    from transformers import AutoModelForCausalLM

    with readable(path, "causal language model"), quiet():
        lm, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **allowed_files(allow_pickle),
            **quantized.loading_arguments(bits, dtype, headless=False),
        )
    refuse_missing(path, info, "causal language model")
    _refuse_encoder(path, lm)
    _require_ids(f"{path}/config.json", vars(lm.generation_config))
    if tokenizer is not None:
        rows = lm.get_input_embeddings().weight.shape[0]
        refuse_large_vocabulary(path, tokenizer, min(rows, logit_count(lm)))
    if bits is not None:
        quantized.prepare(lm, path, dtype)
    train_every_row(lm)
    lm.config.use_cache = True  # for `generate`; training passes use_cache=False itself
    return lm


def _refuse_encoder(path: str | Path, lm: "PreTrainedModel") -> None:
    """Raises a UserError for an encoder: transformers loads it, and it would copy what it has to predict."""
    from .encoders import is_encoder  # which imports this file

    if is_encoder(lm.config):
        raise UserError(
            f"{path}: expected a causal language model, got the encoder {type(lm).__name__}, whose tokens "
            "see the tokens after them (config.json: is_decoder is false)"
        )


def _refuse_damaged_generation_config(path: str | Path, folder: Path) -> None:
    """Raises a UserError for a generation_config.json that is no JSON object, or has ids that are none.

    transformers passes over a file that it cannot read: the model would lose its end tokens, and the next
    save would replace the file.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}/generation_config.json: expected a JSON object in UTF-8, got {error}"
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}/generation_config.json: expected a JSON object, got {type(fields).__name__}")
    _require_ids(f"{path}/generation_config.json", fields)


def _require_ids(file: str, fields: Mapping[str, Any]) -> None:
    """Raises a UserError where a generation config's special tokens are not ids."""
    for name, kind in (
        ("bos_token_id", "a token id"),
        ("eos_token_id", "a token id or a list of them"),
        ("pad_token_id", "a token id"),
    ):
        value = fields.get(name)
        is_list = name == "eos_token_id" and isinstance(value, (list, tuple))
        ids = [] if value is None else value if is_list else [value]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{file}: {name}: expected {kind}, got {value!r}")


def allowed_files(allow_pickle: bool) -> dict[str, bool | None]:
    """Arguments of from_pretrained: safetensors alone, or pickles too, but only their tensors."""
    return {"use_safetensors": None if allow_pickle else True, "weights_only": True}


def train_every_row(model: "PreTrainedModel") -> None:
    """Lets the padding token's embedding learn, in place.

    An nn.Embedding has no gradient at its padding_idx. With pad == eos (or pad == unk) that row belongs to a
    token that the model does read; where the token is padding, the mask already keeps gradients away.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None


def write_generation_config(
    folder: str | Path, generation: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Writes generation_config.json with every field as it is; missing ids are the tokenizer's.

    transformers loads configs whose fields contradict each other, as a temperature without sampling, which
    many published models have, but refuses to save such a config once it was changed. What a model does must
    not depend on who saved it last, so the fields are written without its check.

    Args:
        folder: An existing folder.
        generation: The generation config of a model; it is not changed.
        tokenizer: Its tokenizer.
    """
    generation = copy.deepcopy(generation)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name, None) is None:
            setattr(generation, name, getattr(tokenizer, name))
    fields = json.loads(generation.to_json_string(use_diff=True))
    fields.pop("compile_config", None)  # of a compiled model in memory; save_pretrained leaves it out too
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    (Path(folder) / "generation_config.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def without_own_generation(lm: "PreTrainedModel") -> "Iterator[GenerationConfig]":
    """Context in which a model has transformers' default generation config; yields its own.

    `generate` then follows nothing but its arguments, and `save_pretrained` has nothing to refuse.
    """
    from transformers import GenerationConfig

    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield own
    finally:
        lm.generation_config = own


def save_causal_lm(
    folder: str | Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    state_dict: Mapping[str, torch.Tensor] | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Writes a causal LM: safetensors, tokenizer with chat template, generation config, model card.

    Adapters are merged into what is written, not into the model.

    Args:
        folder: Where to write; an existing model folder is replaced at the end.
        model: A causal LM, which peft may wrap.
        tokenizer: Its tokenizer.
        state_dict: {name: tensor} of a plain model, to write instead of the model's weights.
        card: What the model card tells.

    Raises:
        UserError: The folder exists and holds something else than a model.
    """
    assert state_dict is None or not has_lora(model), "a state dict of a model with adapters cannot be merged"
    lm = plain(model)
    state = plain_state(model) if state_dict is None else dict(state_dict)
    with replacing(folder) as new, quiet(), without_own_generation(lm) as generation:
        lm.save_pretrained(new, state_dict=state)
        write_generation_config(new, generation, tokenizer)
        tokenizer.save_pretrained(new)
        write_card(new, "policy", card)


def without_dropout(model: Module) -> Module:
    """Switches every dropout off, in place, and returns the model.

    The log-probs of a rollout and of its update must be the same function of the weights.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
