"""One Hugging Face causal LM whose loss and log-probs never build logits.

Its class, and every other model, stays as it is::

    patch_model(model)
    loss = model(input_ids, attention_mask=mask, labels=labels).loss    # transformers' own; `.logits` is None
    logp = model.token_logprobs(input_ids, mask)                        # [B, T-1]
    unpatch_model(model)                                                # removes everything again

Without labels the model's own forward runs, so generation is unchanged. It also runs, with a warning, where
logits are needed: `logits_to_keep`, a router's auxiliary loss, a loss of another kind, a head that has
changed since. Not for nn.DataParallel, whose replicas share the first one's forward.

What runs instead of the model's forward is in without_logits.py, what makes a model unfit in patchable.py.
"""

import itertools
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from .head import is_open
from .patchable import patch_state
from .report import Refused, Report
from .without_logits import STATE, PatchState, forward_like, token_logprobs

PATCHED = ("forward", "token_logprobs", STATE)  # attributes that the patch sets on the instance
VERSIONS = ("5.",)


def patch_model(
    model: nn.Module, *, force: bool = False, on_call: Callable[[], None] | None = None
) -> nn.Module:
    """Patches one causal LM, also inside peft's wrapper; a patched one is left as it is.

    `model(input_ids, …, labels=…)` then gives transformers' loss (fp32; num_items_in_batch, ignore_index and
    shift_labels as there) and `logits=None`; in the tuple of return_dict=False the loss is followed by what
    followed the logits. A label outside 0 … V−1 other than ignore_index raises ValueError on the CPU and
    gives NaN on a device. `model.token_logprobs` is `without_logits.token_logprobs`. Patch before DDP,
    DeepSpeed (ZeRO-3 too) or accelerate wrap the model; deepcopy copies the patch, pickling a patched model
    is refused, `save_pretrained` and `state_dict` are as before.

    An evaluation that wants logits (Trainer.predict, compute_metrics) gets none: unpatch before it. The first
    call with labels in eval mode and without gradients warns of that. A hook registered on the head after
    patching sees the op's result, not logits. torch.compile works, but not with fullgraph=True: the number of
    labelled positions is data.

    Args:
        model: Any Hugging Face causal LM whose logits are its backbone's hidden states times a plain linear
            layer, scaled (Cohere, Granite) or softcapped (Gemma) or neither. That, and the loss, is checked
            on a few tokens.
        force: Also patches with a version of transformers other than 5.
        on_call: Called at each loss and each `token_logprobs` that is computed without logits.

    Returns:
        The same model.

    Raises:
        Refused: The model is not like that (the message says how it differs); then nothing has changed. It is
            a ValueError.
    """
    inner = _inner(model)
    if STATE not in vars(inner):
        _patch(inner, force, on_call)
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Removes the patch and returns the model; one without a patch is left as it is.

    What has wrapped the patched forward since (accelerate's autocast) stays, and runs the class's own forward
    from then on.
    """
    inner = _inner(model)
    if STATE not in vars(inner):
        return model
    head, state = inner.get_output_embeddings(), vars(inner)[STATE]
    if is_open(head):
        head.__class__ = state.head_class
    forward = vars(inner).get("forward")
    is_patched = isinstance(forward, types.MethodType) and forward.__func__ is state.forward
    if is_patched and forward.__self__ is inner:  # a copy's forward may be bound to its original
        del inner.forward
    for name in PATCHED[1:]:
        delattr(inner, name)
    return model


# {key in sites.CALLS: the patched model}; a key is free again when its model no longer exists.
TARGETS: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


def patch_report(model: nn.Module, force: bool = False) -> Report:
    """`patch_model` for `integrations.patch`; calls are counted under a key of this instance's own.

    Args:
        model: As in `patch_model`.
        force: As in `patch_model`.

    Returns:
        What was replaced.

    Raises:
        Refused: As in `patch_model`.
    """
    from . import sites

    version, inner = _transformers().__version__, _inner(model)
    fresh = STATE not in vars(inner)
    patch_model(model, force=force)
    state, name = vars(inner)[STATE], type(inner).__name__
    if state.target is None:
        target = _target(inner)
        state.on_call = _in_turn(sites.counting(target), state.on_call)
        state.target, sites.CALLS[target] = target, 0

    def is_active() -> bool:
        return vars(inner).get(STATE) is state

    return Report(
        "transformers",
        version,
        replaced={state.target: [f"forward and token_logprobs of this {name} alone"]},
        why={state.target: "no logits for the loss; token_logprobs"},
        standing=is_active,
        left={f"{name} without labels, or with logits_to_keep": "the model's own forward runs, with logits"},
        undo=(lambda: unpatch_model(model) if is_active() else None) if fresh else None,
    )


def _in_turn(first: Callable[[], None], second: Callable[[], None] | None) -> Callable[[], None]:
    if second is None:
        return first

    def both() -> None:
        first()
        second()

    return both


def unpatch_places(model: nn.Module) -> list[str]:
    """`unpatch_model` for `integrations.unpatch`: the places that were restored."""
    inner = _inner(model)
    places = (
        [f"{type(inner).__name__}.{name} of this instance" for name in PATCHED[:2]]
        if STATE in vars(inner)
        else []
    )
    unpatch_model(model)
    return places


def _target(inner: nn.Module) -> str:
    """A key for the calls of one model.

    "transformers:LlamaForCausalLM" for the first model of that class, "… (2)" for another one while the first
    exists.
    """
    name = f"transformers:{type(inner).__name__}"
    names = itertools.chain([name], (f"{name} ({n})" for n in itertools.count(2)))
    return next(each for each in names if TARGETS.setdefault(each, inner) is inner)


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            'patch("transformers", model): transformers is not installed here: '
            "pip install 'saferlhf-fast[train]'"
        ) from error
    return transformers


def _inner(model: nn.Module) -> Any:
    """The Hugging Face model under peft's wrapper; Refused when there is none."""
    from ..models.lora import plain

    inner = plain(model)
    if not isinstance(inner, nn.Module) or not all(
        hasattr(inner, name) for name in ("config", "base_model", "loss_function")
    ):
        raise Refused(f"expected a Hugging Face causal language model, got {type(model).__name__}")
    return inner


def _patch(model: Any, force: bool, on_call: Callable[[], None] | None) -> None:
    version = _transformers().__version__
    if not version.startswith(VERSIONS) and not force:
        raise Refused(
            f"transformers {version}: expected 5.x, the versions that our loss was compared with; "
            "force=True patches anyway"
        )
    state: PatchState = patch_state(model)
    state.on_call = on_call
    setattr(model, STATE, state)
    state.forward = forward_like(type(model).forward)
    model.forward = types.MethodType(state.forward, model)
    model.token_logprobs = types.MethodType(token_logprobs, model)
