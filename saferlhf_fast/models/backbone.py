"""How a model's backbone (all of it but the head) runs on packed tokens.

There are four ways; row_form.py chooses one when a model is wrapped: packed with our attention; padded, for
architectures whose sequences would see each other when packed (recurrent layers, attention that cannot be
exchanged, alibi); padded because the recipe says so (`engine.packing=false`); and rows of one length at a
time, for architectures whose rows see their padding.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from .packing import Packed, padded
from .row_form import RowForm, fixed_inputs, packed_inputs, row_inputs
from .row_form import form_of as form_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hidden_states(backbone: "PreTrainedModel", packed: Packed, form: RowForm) -> torch.Tensor:
    """The last hidden state of each packed token.

    Args:
        backbone: A transformers model without a head.
        packed: The tokens of one pass.
        form: How the backbone runs them, as `form_of` or the recipe decided.

    Returns:
        hidden_MH in the model's dtype.
    """
    return of_each_token(
        packed, form, backbone, lambda inputs: backbone(**inputs, **fixed_inputs(backbone)).last_hidden_state
    )


def of_each_token(
    packed: Packed,
    form: RowForm,
    model: "PreTrainedModel",
    run: Callable[[dict[str, Any]], torch.Tensor],
) -> torch.Tensor:
    """What a model computes for each packed token, in the form that its architecture can.

    Args:
        packed: The tokens of one pass.
        form: How its backbone runs them.
        model: The model, with or without a head.
        run: Calls it with some arguments and returns [S, L, X].

    Returns:
        [M, X].

    Raises:
        UserError: The rows need passes of their own, of which ZeRO-3 would run another number on each rank.
    """
    if form.packs:
        inputs = packed_inputs(packed, form)
        return run(inputs | token_types(model, None if packed.types_M is None else packed.types_M[None]))[0]
    if form.pads:
        rows = padded(packed)
        inputs = row_inputs(model, form, rows.ids_SL, rows.mask_SL, rows.positions_SL)
        outputs_SLX = run(inputs | token_types(model, rows.types_SL))
        return outputs_SLX.flatten(0, 1).index_select(0, rows.flat_M)
    _refuse_uneven_passes(model)
    outputs, places = [], []
    for length, starts in _by_length(packed).items():
        place_SL = torch.tensor(starts)[:, None] + torch.arange(length)
        place_SL = place_SL.to(packed.ids_M.device)
        inputs = row_inputs(model, form, packed.ids_M[place_SL], None, packed.positions_M[place_SL])
        types_SL = None if packed.types_M is None else packed.types_M[place_SL]
        outputs.append(run(inputs | token_types(model, types_SL)).flatten(0, 1))
        places.append(place_SL.flatten())
    return torch.cat(outputs).index_select(0, torch.cat(places).argsort())


def token_types(model: "PreTrainedModel", types: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The argument that tells the two texts of a pair apart, for a model that does."""
    takes = (
        getattr(model.config, "type_vocab_size", 0) > 1
        and "token_type_ids" in inspect.signature(model.forward).parameters
    )
    return {"token_type_ids": types} if takes and types is not None else {}


def _by_length(packed: Packed) -> dict[int, list[int]]:
    """{length: where its sequences begin in M}; one of length 0 is left out where there are others."""
    starts: dict[int, list[int]] = {}
    begin = 0
    for length in packed.lengths:
        starts.setdefault(length, []).append(begin)
        begin += length
    return {length: where for length, where in starts.items() if length} or starts


def _refuse_uneven_passes(model: "PreTrainedModel") -> None:
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return
    from ..runtime import engine

    if engine.world_size() > 1:
        raise UserError(
            f"engine.zero_stage: expected 0, 1 or 2 for a {type(model).__name__} on several ranks, got 3: "
            "rows of different length change each other there, so that each length needs a pass of its own"
        )


def recompute_activations(model: "PreTrainedModel") -> None:
    """Switches a model's activation checkpointing on, by the name that its transformers version uses."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
