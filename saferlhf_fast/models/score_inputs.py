"""What a ScoreModel accepts as masks and position ids.

Values are read on the CPU alone: elsewhere, and in torch.compile's graph, reading them would make the host
wait for the device.

Shapes: legend in rollout/types.py.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels import checks, kinds
from ..kernels.kinds import shown
from .lora import plain
from .score_head import Normalizer

KINDS = ("reward", "cost", "critic")


def checks_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are read to check them."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def require_backbone(backbone: Any) -> None:
    """Checks what a ScoreModel is made from.

    Raises:
        ValueError: It is no transformers model, or one with a head of its own.
    """
    expected = "ScoreModel: backbone: expected a transformers model without a head, as AutoModel loads it"
    inner = plain(backbone) if isinstance(backbone, nn.Module) else backbone
    config = getattr(inner, "config", None)
    if not isinstance(inner, nn.Module) or not hasattr(config, "get_text_config"):
        raise ValueError(f"{expected}, got {_described(backbone)}")
    if isinstance(inner, torch._dynamo.OptimizedModule):
        raise ValueError(f"{expected}, got a compiled model; compile the ScoreModel instead")
    if not hasattr(inner, "get_input_embeddings"):
        raise ValueError(f"{expected}, got {type(inner).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{expected}, got {type(inner).__name__}, which is an encoder and a decoder")
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    base = getattr(inner, "base_model", inner)
    if head is not None or base is not inner:
        instead = "" if base is inner else f"; its backbone is {type(inner).__name__}.base_model"
        raise ValueError(f"{expected}, got {type(inner).__name__}, which has a head{instead}")


def require_parts(*, bias: Any, packing: Any, normalizer: Any, head: Any) -> None:
    """Checks the other parts of a ScoreModel.

    Raises:
        ValueError: A flag is no flag, or a part is none.
    """
    for name, value in (("bias", bias), ("packing", packing)):
        kinds.flag("ScoreModel", name, value)
    if normalizer is not None and not isinstance(normalizer, Normalizer):
        raise kinds.wrong("ScoreModel", "normalizer", "a Normalizer or None", normalizer)
    if head is not None and not isinstance(head, nn.Module):
        raise kinds.wrong("ScoreModel", "head", "a module or None", head)


def _described(value: object) -> str:
    return f"{type(value).__name__} without a config" if isinstance(value, nn.Module) else shown(value)


def require_kind(op: str, kind: Any, *known: str | None) -> None:
    """Checks what a score model is for.

    Raises:
        ValueError: It is none of `known`.
    """
    if not (kind is None or isinstance(kind, str)) or kind not in known:
        expected = " or ".join(map(str, known))
        raise ValueError(f"{op}: kind: expected {expected}, got {shown(kind)}")


def require_source(op: str, path: Any, dtype: Any) -> None:
    """Checks from where weights are loaded, and in which dtype.

    Raises:
        ValueError: The path is no path or name, or the dtype no floating-point dtype of torch.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise ValueError(f"{op}: path: expected a folder or a name on the Hub, got {shown(path)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{op}: dtype: expected a floating-point dtype of torch, got {shown(dtype)}")


def real_tokens(op: str, mask_BL: torch.Tensor | None, like_BL: torch.Tensor) -> torch.Tensor:
    """The mask of real tokens.

    Floats are accepted when they are 0 and 1 with a 1 in each row. A row without a 1 shows the other kind of
    mask, which is added to attention's scores and has 0 where this one has 1.

    Args:
        op: The caller's name, for messages.
        mask_BL: Booleans or numbers 0 and 1; None: all tokens are real.
        like_BL: A tensor whose shape and device the mask must have.

    Returns:
        int64 [B, L], 1 at real tokens.

    Raises:
        ValueError: Another shape, device or (on the CPU) value.
    """
    if mask_BL is None:
        return torch.ones_like(like_BL, dtype=torch.long)
    checks.tensor_argument(op, "attention_mask", mask_BL)
    if mask_BL.shape != like_BL.shape or mask_BL.device != like_BL.device or mask_BL.dtype.is_complex:
        raise ValueError(
            f"{op}: attention_mask: expected booleans or numbers 0 and 1 {list(like_BL.shape)} on "
            f"{like_BL.device}, got {mask_BL.dtype} {list(mask_BL.shape)} on {mask_BL.device}"
        )
    if mask_BL.dtype != torch.bool and checks_values(mask_BL):
        other = (mask_BL != 0) & (mask_BL != 1)
        if other.any():
            raise ValueError(
                f"{op}: attention_mask: expected booleans or numbers 0 and 1, got {mask_BL[other][0].item()}"
            )
        if mask_BL.dtype.is_floating_point and mask_BL.numel() and not mask_BL.any(1).all():
            raise ValueError(
                f"{op}: attention_mask: expected a 1 at each real token (booleans or integers where a row "
                f"has none), got {mask_BL.dtype} and a row of zeros, as in a mask that is added"
            )
    return mask_BL.long()


def refuse_positions(position_ids: torch.Tensor, ids_BL: torch.Tensor) -> None:
    """Raises a ValueError for position ids that would be broadcast over columns, or are no integers."""
    checks.tensor_argument("ScoreModel", "position_ids", position_ids)
    expected = (list(ids_BL.shape), [1, ids_BL.shape[1]])
    if (
        list(position_ids.shape) not in expected
        or not checks.is_integer(position_ids)
        or position_ids.device != ids_BL.device
    ):
        raise ValueError(
            f"ScoreModel: position_ids: expected integers {expected[0]} on {ids_BL.device}, got "
            f"{position_ids.dtype} {list(position_ids.shape)} on {position_ids.device}"
        )


def last_scores(scores_BL: torch.Tensor, attention_mask_BL: torch.Tensor) -> torch.Tensor:
    """`ScoreModel.end_scores`."""
    checks.tensor_argument("end_scores", "scores", scores_BL)
    if scores_BL.dim() != 2 or not checks.is_floating(scores_BL):
        raise ValueError(
            f"end_scores: scores: expected floating point [B, L], got {scores_BL.dtype} "
            f"{list(scores_BL.shape)}"
        )
    if attention_mask_BL is None:
        raise ValueError("end_scores: attention_mask: expected a mask [B, L], got None")
    mask_BL = real_tokens("end_scores", attention_mask_BL, scores_BL)
    if not scores_BL.shape[0]:
        return scores_BL.flatten()
    some_B = mask_BL.any(1)
    if not mask_BL.shape[1] or checks_values(mask_BL) and not some_B.all():
        raise ValueError(
            f"end_scores: attention_mask: expected a real token in each row, got none in row "
            f"{some_B.tolist().index(False)}"
        )
    last_B = mask_BL.shape[1] - 1 - mask_BL.flip(1).argmax(1)
    return scores_BL.gather(1, last_B[:, None]).squeeze(1).where(some_B, float("nan"))
