"""How a model's body (all of it but the head) runs on packed tokens.

Three ways, told by a probe when a model is wrapped, on a few tokens and on the CPU: packed with our
attention; padded, for architectures whose sequences would see each other when packed (recurrent layers,
attention that cannot be exchanged, alibi); and padded because the recipe says so (`engine.packing=false`).
"""

import inspect
import sys

import torch

from . import attention
from .packing import pack_sequences, padded

PROBES = {}
"""(class, configuration) -> whether it packs: a run loads the same architecture up to six times."""


def hidden_states(backbone, packed, packs):
    """-> hidden_MH, the last hidden state of each packed token. packs: as `packs` or the recipe says."""
    if not packs:
        return _padded_states(backbone, packed)
    return backbone(**packed_inputs(packed), **_fixed(backbone)).last_hidden_state[0]


def recompute_activations(model):
    """Activation checkpointing of a transformers model, by the name that its version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def packed_inputs(packed):
    """Arguments of a transformers model for packed tokens."""
    return {
        "input_ids": packed.ids_M[None],
        "position_ids": packed.positions_M[None],
        "packed": packed.layout,
        "attention_mask": attention.dummy_mask(packed.ids_M.device),
    }


def padded_inputs(model, rows):
    """Arguments of a transformers model for a `Padded` batch."""
    inputs = {"input_ids": rows.ids_SL, "attention_mask": rows.mask_SL, **_fixed(model)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = rows.positions_SL
    return inputs


def _padded_states(backbone, packed):
    rows = padded(packed)
    hidden_SLH = backbone(**padded_inputs(backbone, rows)).last_hidden_state
    return hidden_SLH.flatten(0, 1).index_select(0, rows.flat_M)


def _fixed(model):
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()
def packs(backbone):
    """Installs our attention in a transformers model -> True when packed sequences do not see each other, as
    found by running two short ones together and apart. The model must be whole (not yet sharded).
    """
    transformers = sys.modules.get("transformers")  # where it is not imported, there is no model of its
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
        PROBES[key] = _alike(backbone)
    if not PROBES[key]:
        attention.uninstall(backbone)
    return PROBES[key]


def _alike(backbone):
    training, vocabulary = backbone.training, backbone.get_input_embeddings().weight.shape[0]
    device = next(backbone.parameters()).device
    first, second = [[(7 * i + k) % vocabulary for i in range(n)] for k, n in ((1, 5), (3, 4))]
    backbone.eval()
    try:
        together = hidden_states(
            backbone, pack_sequences([first, second], [range(0), range(0)], device), True
        )
        apart = torch.cat(
            [_padded_states(backbone, pack_sequences([ids], [range(0)], device)) for ids in (first, second)]
        )
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError):
        return False  # an architecture that does not take what packing needs
    finally:
        backbone.train(training)
    scale = apart.float().abs().max().clamp(min=1e-6)
    tolerance = 1e-4 if apart.dtype == torch.float32 else 5e-2
    return bool(((together - apart).float().abs().max() <= tolerance * scale).item())
