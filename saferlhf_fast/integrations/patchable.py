"""Whether a Hugging Face model can be patched: checks of its parts, and of its loss on a few tokens."""

import inspect
from typing import Any

import torch
from torch import nn

from .head import is_open, name_of
from .report import Refused
from .without_logits import IGNORED, PatchState, other_loss, output_with_loss


def patch_state(model: Any) -> PatchState:
    """Checks a model and opens its head.

    Args:
        model: A Hugging Face causal LM.

    Returns:
        The state of the patch, not attached to the model yet.

    Raises:
        Refused: The model cannot be patched; then nothing has changed.
    """
    reason = _unsupported(model)
    if reason:
        raise Refused(f"{type(model).__name__}: {reason}")
    from ..models.policy import logit_form

    head = model.get_output_embeddings()
    head_class, form = type(head), logit_form(model)
    if form is None:
        raise Refused(
            f"{type(model).__name__}: expected logits = softcap(scale · (hidden · weightᵀ + bias)) of a "
            f"plain linear layer; its {type(head).__name__} does not give them on three tokens"
        )
    in_backbone = inspect.signature(model.base_model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in in_backbone.values())
    in_model = inspect.signature(model.forward).parameters
    defaults = {
        name: p.default for name, p in in_model.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    state = PatchState(form, head_class, defaults, None if takes_any else set(in_backbone))
    if not _same_loss(model, state):
        head.__class__ = head_class
        raise Refused(
            f"{type(model).__name__}: its loss is not the mean cross-entropy of the next token, on six tokens"
        )
    return state


def _unsupported(model: Any) -> str | None:
    """Why a model cannot be patched, found without running it; None when there is no reason."""
    head, parameters = model.get_output_embeddings(), list(model.parameters())
    if getattr(model.config, "is_encoder_decoder", False):
        return "expected a decoder, got an encoder-decoder"
    if head is None or model.base_model is model:
        return "expected a model with a backbone and a head of its own"
    if type(head) is not nn.Linear and not is_open(head):
        return f"expected torch.nn.Linear as head, got {name_of(head)} (adapters or quantisation?)"
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return "its head has hooks, which wait for logits"
    if "forward" in vars(model):
        return "its forward has been replaced already, by something else; patch before that"
    if any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in parameters):
        return "its weights are sharded (ZeRO-3, DTensor); patch before they are"
    if any(p.device.type == "meta" for p in parameters):
        return "its weights are on the meta device, where nothing can be checked"
    return other_loss(model)


@torch.no_grad()
def _same_loss(model: Any, state: PatchState) -> bool:
    """True when our loss is the model's own on six tokens, two of them without a label.

    Also notes the class of the model's outputs in `state`.
    """
    head, training = model.get_output_embeddings(), model.training
    ids = torch.arange(1, 7, device=head.weight.device)[None] % head.weight.shape[0]
    labels = ids.clone()
    labels[0, 2:4] = IGNORED
    model.eval()
    try:
        output = model(input_ids=ids, labels=labels)
        state.output_class, expected = type(output), output.loss
        loss = output_with_loss(model, state, {"input_ids": ids, "labels": labels}).loss
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return False
    finally:
        model.train(training)
    if expected is None:
        return False
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2
    return bool(((loss - expected).abs() <= tolerance * expected.abs().clamp(min=1.0)).item())
