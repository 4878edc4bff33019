"""How a model's backbone (all of it but the head) runs on packed tokens.

There are three ways, chosen by a probe when a model is wrapped, on a few tokens and on the CPU: packed with
our attention; padded, for architectures whose sequences would see each other when packed (recurrent layers,
attention that cannot be exchanged, alibi); and padded because the recipe says so (`engine.packing=false`).
"""

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch

from . import attention
from .packing import Packed, Padded, pack_sequences, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBES: dict[tuple[type, str], bool] = {}
"""{(class, configuration): whether it packs}; a run loads the same architecture up to six times."""


def hidden_states(backbone: "PreTrainedModel", packed: Packed, packs: bool) -> torch.Tensor:
    """The last hidden state of each packed token.

    Args:
        backbone: A transformers model without a head.
        packed: The tokens of one pass.
        packs: Whether the backbone runs packed, as the function `packs` or the recipe decided.

    Returns:
        hidden_MH in the model's dtype.
    """
    if not packs:
        return _padded_states(backbone, packed)
    inputs = {**packed_inputs(packed), **_fixed_inputs(backbone)}
    if packed.types_M is not None and takes_types(backbone):
        inputs["token_type_ids"] = packed.types_M[None]
    return backbone(**inputs).last_hidden_state[0]


def takes_types(backbone: "PreTrainedModel") -> bool:
    """Whether a model tells the two texts of a pair apart by token types."""
    return (
        getattr(backbone.config, "type_vocab_size", 0) > 1
        and "token_type_ids" in inspect.signature(backbone.forward).parameters
    )


def recompute_activations(model: "PreTrainedModel") -> None:
    """Switches a model's activation checkpointing on, by the name that its transformers version uses."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def packed_inputs(packed: Packed) -> dict[str, Any]:
    """Arguments of a transformers model for packed tokens."""
    return {
        "input_ids": packed.ids_M[None],
        "position_ids": packed.positions_M[None],
        "packed": packed.layout,
        "attention_mask": attention.dummy_mask(packed.ids_M.device),
    }


def padded_inputs(model: "PreTrainedModel", rows: Padded) -> dict[str, Any]:
    """Arguments of a transformers model for a `Padded` batch."""
    inputs = {"input_ids": rows.ids_SL, "attention_mask": rows.mask_SL, **_fixed_inputs(model)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = rows.positions_SL
    if rows.types_SL is not None and takes_types(model):
        inputs["token_type_ids"] = rows.types_SL
    return inputs


def _padded_states(backbone: "PreTrainedModel", packed: Packed) -> torch.Tensor:
    rows = padded(packed)
    hidden_SLH = backbone(**padded_inputs(backbone, rows)).last_hidden_state
    return hidden_SLH.flatten(0, 1).index_select(0, rows.flat_M)


def _fixed_inputs(model: "PreTrainedModel") -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()
def packs(backbone: torch.nn.Module) -> bool:
    """Installs our attention in a transformers model where it can run packed.

    A probe decides: two short sequences must give the same hidden states packed together and alone.

    Args:
        backbone: A model whose weights are complete, not yet sharded. One that is not of transformers never
            packs.

    Returns:
        True when packed sequences do not see each other.
    """
    transformers = sys.modules.get("transformers")  # without its import no model of it can exist
    if transformers is None or not isinstance(backbone, transformers.PreTrainedModel):
        return False
    if getattr(backbone.config, "attention_chunk_size", None):
        # chunked attention looks like any other over a few tokens
        return False
    if "position_ids" not in inspect.signature(backbone.forward).parameters or not attention.install(
        backbone
    ):
        return False
    key = (type(backbone), str(backbone.config.to_dict()))
    if key not in PROBES:
        PROBES[key] = _packed_equals_alone(backbone)
    if not PROBES[key]:
        attention.uninstall(backbone)
    return PROBES[key]


def _packed_equals_alone(backbone: "PreTrainedModel") -> bool:
    """True when two sequences have the same hidden states packed together as each of them alone."""
    training, vocabulary = backbone.training, backbone.get_input_embeddings().weight.shape[0]
    device = next(backbone.parameters()).device
    first, second = [[(7 * i + k) % vocabulary for i in range(n)] for k, n in ((1, 5), (3, 4))]
    backbone.eval()
    try:
        together_MH = hidden_states(
            backbone, pack_sequences([first, second], [range(0), range(0)], device), True
        )
        alone_MH = torch.cat(
            [_padded_states(backbone, pack_sequences([ids], [range(0)], device)) for ids in (first, second)]
        )
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError):
        return False  # an architecture that does not take what packing needs
    finally:
        backbone.train(training)
    scale = alone_MH.float().abs().max().clamp(min=1e-6)
    tolerance = 1e-4 if alone_MH.dtype == torch.float32 else 5e-2
    return bool(((together_MH - alone_MH).float().abs().max() <= tolerance * scale).item())
