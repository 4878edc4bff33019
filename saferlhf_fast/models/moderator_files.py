"""Files of moderators: a Hugging Face folder of the backbone, the heads beside it, and moderation.json."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from .folders import local_copy, quiet, readable, refuse_large_vocabulary, replacing
from .lora import has_lora, plain, plain_state
from .model_card import write_card
from .moderator import ModeratorModel
from .moderator_spec import Calibration, ModeratorSpec, read_spec, write_spec
from .score_backbone import load_backbone
from .score_checkpoint import ENTRY, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "moderator."
"""What the heads' weights are called in the folder's weights, before their own names."""
_OWN = ("head.", "ngrams.")


def save_moderator(
    folder: str | Path,
    model: ModeratorModel,
    tokenizer: "PreTrainedTokenizerBase",
    calibration: Calibration | None = None,
    card: dict[str, Any] | None = None,
    state_dict: "Mapping[str, torch.Tensor] | None" = None,
) -> None:
    """Writes a moderator; adapters are merged into what is written.

    Args:
        folder: Where to write; an existing model folder is replaced at the end.
        model: The moderator.
        tokenizer: Its tokenizer.
        calibration: Its thresholds and temperatures; None: untuned.
        card: What the model card tells.
        state_dict: {name: tensor} by the model's own names, to write instead of its weights.

    Raises:
        UserError: The folder holds something else than a model.
    """
    from huggingface_hub import save_torch_state_dict

    assert state_dict is None or not has_lora(model.backbone), "a state dict of adapters cannot be merged"
    backbone = plain(model.backbone)
    whole = model.state_dict() if state_dict is None else state_dict
    own = {PREFIX + name: tensor.detach() for name, tensor in whole.items() if name.startswith(_OWN)}
    if state_dict is None:
        inner = plain_state(model.backbone)
    else:
        inner = {n.removeprefix("backbone."): t for n, t in state_dict.items() if n.startswith("backbone.")}
    prefix = f"{backbone.base_model_prefix}." if backbone.base_model_prefix else ""
    config = copy.deepcopy(backbone.config)
    config.architectures = [type(backbone).__name__]
    config.dtype = str(backbone.dtype).removeprefix("torch.")
    setattr(config, ENTRY, {"kind": "moderator", "pooling": model.pooling, "pairs": model.pairs or None})
    with replacing(folder) as new, quiet():
        config.save_pretrained(new)
        weights = {**{prefix + name: tensor for name, tensor in inner.items()}, **own}
        save_torch_state_dict(
            {name: _alone(tensor) for name, tensor in weights.items()}, new, metadata={"format": "pt"}
        )
        tokenizer.save_pretrained(new)
        write_spec(new, model.spec, calibration or Calibration())
        write_card(new, "moderator", card)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage of its own: ZeRO keeps weights as views of one flat tensor."""
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor.contiguous() if own else tensor.detach().clone(memory_format=torch.contiguous_format)


def load_moderator(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[ModeratorModel, Calibration]:
    """Loads a moderator that `save_moderator` wrote.

    Args:
        path: Its folder, or a name on the Hub.
        dtype: The type of the weights.
        tokenizer: When given, its vocabulary must fit the embedding.
        trust_remote_code: Whether code beside the model may run.
        allow_pickle: Whether weights that exist in pickles alone are read.

    Returns:
        The model, and what was tuned on validation data.

    Raises:
        UserError: It is no moderator, or its heads are missing or do not fit its labels.
    """
    folder = local_copy(path, allow_pickle)
    spec, calibration = read_spec(folder, path)
    backbone = load_backbone(
        path, dtype=dtype, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    with readable(path, "moderator"):
        model = ModeratorModel(backbone, spec)
    load_heads(model, folder, path)
    if tokenizer is not None:
        refuse_large_vocabulary(path, tokenizer, backbone.get_input_embeddings().weight.shape[0])
    return model, calibration


def load_heads(model: ModeratorModel, folder: Path, path: str | Path) -> None:
    """Reads a moderator's heads into a model.

    Args:
        model: The model, whose backbone is read already.
        folder: The local folder.
        path: The moderator as the user named it, for messages.

    Raises:
        UserError: Heads are missing or have other shapes.
    """
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_OWN)}
    with readable(path, "moderator"):
        tensors = read_tensors(folder, [PREFIX + name for name in expected])
    for name, tensor in expected.items():
        found = tensors.get(PREFIX + name)
        if found is None or found.shape != tensor.shape:
            got = "none" if found is None else f"one of shape {list(found.shape)}"
            raise UserError(
                f"{path}: {PREFIX}{name}: expected a weight of shape {list(tensor.shape)} for "
                f"{len(model.spec.categories)} categories, got {got}"
            )
        with torch.no_grad():
            tensor.copy_(found)


def moderator_from_backbone(
    path: str | Path,
    spec: ModeratorSpec,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> ModeratorModel:
    """A moderator with new heads on the backbone of another model.

    Args:
        path: A decoder or an encoder: a model folder or a name on the Hub.
        spec: What it predicts.
        trust_remote_code: Whether code beside the model may run.
        allow_pickle: Whether weights that exist in pickles alone are read.
        options: Of `load_backbone`: dtype, bits.

    Raises:
        UserError: As `load_backbone`.
    """
    backbone = load_backbone(path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, **options)
    return ModeratorModel(backbone, spec)


def refuse_moderator(path: str | Path, expected: str) -> None:
    """Raises a UserError where a local folder holds a moderator and another kind of model is expected."""
    from .moderator_spec import FILE

    if (Path(path).expanduser() / FILE).is_file():
        raise UserError(
            f"{path}: expected {expected}, got a moderator; as a scorer it is "
            f"{{kind: moderator, path: {path}}}"
        )
