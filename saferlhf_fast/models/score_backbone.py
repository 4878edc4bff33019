"""Backbones of score models: loading one, its size, and writing into weights that ZeRO-3 may have sharded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UserError, require
from . import quantized
from .causal_lm import LOADERS, allowed_files, train_every_row
from .folders import has_weights, local_copy, quiet, readable, refuse_missing
from .score_inputs import require_source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@contextlib.contextmanager
def written(module: nn.Module) -> Iterator[None]:
    """Context in which weights are complete and may be written; ZeRO-3 broadcasts rank 0's at the end."""
    sharded = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    from ..runtime import engine

    with engine.written(sharded):
        yield


def hidden_size(config: "PretrainedConfig") -> int:
    """H of a backbone's output; a multimodal config has it in its text config, OPT may project its output."""
    text = config.get_text_config()
    return getattr(text, "word_embed_proj_dim", None) or text.hidden_size


def load_backbone(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    bits: int | None = None,
) -> "PreTrainedModel":
    """Loads an architecture's base model, without a head; of a multimodal model the language model.

    Args:
        path: A model folder or a name on the Hub.
        dtype: The type of the weights.
        trust_remote_code: Whether code beside the model may run.
        allow_pickle: Whether weights that exist in pickles alone are read.
        bits: 4 quantises the linear layers, as in `load_causal_lm`.

    Returns:
        The backbone.

    Raises:
        UserError: The model does not exist, weights are missing, or it is an encoder-decoder.
    """
    require_source("load_backbone", path, dtype)
    require("loading a score model", "train", *LOADERS)
    folder = local_copy(path, allow_pickle)
    if not has_weights(folder):
        raise UserError(f"{path} has no weights; expected a file that ends in .safetensors or .bin")
    from transformers import AutoModel

    with readable(path, "backbone"), quiet():
        backbone, info = AutoModel.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **allowed_files(allow_pickle),
            **quantized.loading_arguments(bits, dtype, headless=True),
        )
    # Encoders' poolers are not used: the head reads the hidden states.
    refuse_missing(path, info, "backbone", ignore=("pooler",))
    if backbone.config.is_encoder_decoder:
        raise UserError(
            f"{path}: expected a decoder or an encoder as backbone of a score model, got the "
            f"encoder-decoder {type(backbone).__name__}"
        )
    if bits is not None:
        quantized.prepare(backbone, path, dtype)
    if backbone.config.get_text_config() is not backbone.config:
        backbone = getattr(backbone, "language_model", backbone)
    try:
        train_every_row(backbone)
    except NotImplementedError as error:  # CANINE reads characters, by several tables of hashes
        raise UserError(
            f"{path}: expected a backbone with one embedding of tokens, got {type(backbone).__name__}"
        ) from error
    return backbone
