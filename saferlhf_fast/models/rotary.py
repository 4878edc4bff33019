"""Rotary factors of each sequence by its own length, for architectures whose factors follow the longest one.

With the kinds longrope and dynamic (NTK), transformers chooses the factors of a whole pass from its largest
position: a long sequence changes its short neighbours, packed and padded alike. A hook on the rotary module
computes the factors again, for each length that needs factors of its own. These modules have no weights and
return cos and sin of [B, L] positions: next to a layer the hook costs nothing, but it reads positions on the
host.

A sequence is a run of ascending positions in a row. Padding is a sequence of its own and nothing reads it.
"""

from typing import TYPE_CHECKING, Any

import torch

from .shrunken import rope_kinds

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KINDS = ("dynamic", "longrope")
"""Kinds of rotary factors that follow the longest sequence of a pass."""


def follows_length(config: "PretrainedConfig") -> bool:
    """Whether a configuration has such factors."""
    return any(kind in str(rope_kinds(config)) for kind in KINDS)


def separate(model: torch.nn.Module) -> bool:
    """Makes the rotary factors of a transformers model depend on each sequence alone, in place.

    Args:
        model: Any model; one whose factors do not follow the length is not changed.

    Returns:
        True when the model has such factors.
    """
    found = False
    for module in model.modules():
        if not any(kind in str(getattr(module, "rope_type", "")) for kind in KINDS):
            continue
        found = True
        if _by_sequence not in module._forward_hooks.values():
            module.register_forward_hook(_by_sequence, with_kwargs=True)
    return found


def _by_sequence(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A rotary module's output, computed for each length by itself."""
    named = dict(zip(("x", "position_ids", "layer_type"), args)) | kwargs
    x, positions_BL, layer = named.get("x"), named.get("position_ids"), named.get("layer_type")
    kind, config = module.rope_type, module.config
    table = getattr(config, "rope_parameters", None) or {}
    if isinstance(kind, dict):
        kind, table = kind[layer], table[layer]
    one_kind = next((k for k in KINDS if k in str(kind)), None)
    if one_kind is None or positions_BL is None or positions_BL.dim() != 2 or positions_BL.is_meta:
        return None
    whole = output if isinstance(output, tuple) else (output,)  # cos and sin, or complex numbers
    if any(getattr(part, "shape", ())[:2] != positions_BL.shape for part in whole):
        return None  # factors in a form of its own: the probe decides
    first = table.get("original_max_position_embeddings") if one_kind == "longrope" else None
    first = first or module.original_max_seq_len
    lengths_BL = _lengths(positions_BL).clamp(min=first)
    if one_kind == "longrope":
        lengths_BL = lengths_BL.clamp(max=first + 1)  # two sets of factors, whatever the length
    lengths = lengths_BL.unique().tolist()
    parts = [torch.empty_like(part) for part in whole]
    extra = {} if layer is None else {"layer_type": layer}
    for length in lengths:
        rows, columns = (lengths_BL == length).nonzero(as_tuple=True)
        module.forward(x, positions_BL.new_zeros(1, 1), **extra)  # forgets the longest so far
        # The largest position decides: it is put behind, and its factors are dropped.
        positions_1m = torch.cat([positions_BL[rows, columns], positions_BL.new_tensor([length - 1])])[None]
        factors = module.forward(x, positions_1m, **extra)
        for part, values in zip(parts, factors if isinstance(factors, tuple) else (factors,)):
            part[rows, columns] = values[0, :-1]
    return tuple(parts) if isinstance(output, tuple) else parts[0]


def _lengths(positions_BL: torch.Tensor) -> torch.Tensor:
    """[B, L]: the length of the sequence that each position belongs to."""
    begins_BL = torch.ones_like(positions_BL, dtype=torch.bool)
    begins_BL[:, 1:] = positions_BL[:, 1:] <= positions_BL[:, :-1]
    sequence_N = begins_BL.flatten().cumsum(0) - 1
    count = int(sequence_N[-1]) + 1 if len(sequence_N) else 0
    longest = positions_BL.new_zeros(count).scatter_reduce(0, sequence_N, positions_BL.flatten(), "amax")
    return (longest[sequence_N] + 1).view_as(positions_BL)
