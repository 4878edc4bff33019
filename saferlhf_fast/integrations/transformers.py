"""One Hugging Face causal LM whose loss and log-probs never build logits.

Its class, and every other model, stays as it is.

    patch_model(model)
    loss = model(input_ids, attention_mask=mask, labels=labels).loss          # transformers' own loss;
    `.logits` is None logp = model.token_logprobs(input_ids, mask)                             # [B, T-1]
    unpatch_model(model)                                                     # nothing is left behind

The body runs as it always does; of its hidden states only the positions that a label belongs to reach the
head, whose logits exist in chunks. Without labels the model's own forward runs, so generation is unchanged;
what cannot be had without logits (`logits_to_keep`, a router's auxiliary loss, a loss of another kind, a head
that has changed since) goes there too, with a warning. Not for nn.DataParallel, whose replicas share the
first one's forward.

Shapes: B rows, T tokens, H hidden, V vocabulary, N labelled positions.
"""

import dataclasses
import functools
import inspect
import itertools
import types
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import nn

from ..models.packing import boolean
from .head import is_open, name_of, negative_sum, scored, through_head
from .report import Refused, Report
from .shared import known_ids
from .sites import uncompiled

STATE = "_saferlhf_fast_patch"
OURS = ("forward", "token_logprobs", STATE)
VERSIONS = ("5.",)
IGNORED = -100
NOT_THE_BODYS = {
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "shift_labels",
    "ignore_index",
    "return_dict",
}


def patch_model(
    model: nn.Module, *, force: bool = False, on_call: Callable[[], None] | None = None
) -> nn.Module:
    """Patches one causal LM (also inside peft's wrapper) and returns it; a patched one is left as it is.

    model: any Hugging Face causal LM whose logits are its body's hidden states times a plain linear layer,
    scaled (Cohere, Granite) or softcapped (Gemma) or neither. That, and the loss, is checked on a few tokens.
    force: goes on with a version of transformers other than 5. on_call: called at each loss and each
    `token_logprobs` that ours makes.

    `model(input_ids, …, labels=…)` then gives transformers' loss (fp32; num_items_in_batch, ignore_index,
    shift_labels as there) and `logits=None`; in the tuple of return_dict=False the loss is followed by what
    followed the logits. A label outside 0 … V−1 other than ignore_index raises ValueError on the CPU and
    gives NaN on a device. `model.token_logprobs` is `token_logprobs` below. Patch before DDP, DeepSpeed
    (ZeRO-3 too) or accelerate wrap the model; deepcopy copies the patch, pickling a patched model is refused,
    `save_pretrained` and `state_dict` are as before.

    An evaluation that wants logits (Trainer.predict, compute_metrics) gets none: unpatch before it. The first
    call with labels in eval mode and without gradients warns of that. A hook registered on the head after
    patching sees the op's result, not logits. torch.compile works, but not with fullgraph=True: the number of
    labelled positions is data.

    Raises Refused (a ValueError) when the model is not like that, and says what was found; then nothing has
    changed.
    """
    inner = _inner(model)
    if STATE not in vars(inner):
        _patch(inner, force, on_call)
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Takes the patch off again and returns the model; one without a patch is left as it is.

    What has wrapped the patched forward since (accelerate's autocast) stays, and runs the class's own forward
    from then on.
    """
    inner = _inner(model)
    if STATE not in vars(inner):
        return model
    head, state = inner.get_output_embeddings(), vars(inner)[STATE]
    if is_open(head):
        head.__class__ = state.head_class
    mine = vars(inner).get("forward")
    if getattr(mine, "__self__", None) is inner and mine.__func__ is state.forward:
        del inner.forward
    for name in OURS[1:]:
        delattr(inner, name)
    return model


# {key in sites.CALLS: the patched model}; a key is free again when its model is gone
TARGETS = weakref.WeakValueDictionary()


def patch_report(model, force=False):
    """`patch_model` for `integrations.patch`: -> Report, with calls counted under a key of this instance's
    own.
    """
    from . import sites

    version, inner = _transformers().__version__, _inner(model)
    fresh = STATE not in vars(inner)
    patch_model(model, force=force)
    state, name = vars(inner)[STATE], type(inner).__name__
    if state.target is None:
        target, told = _target(inner), state.on_call
        count, sites.CALLS[target] = sites.counting(target), 0
        state.target, state.on_call = target, count if told is None else lambda: (count(), told())

    def standing():
        return vars(inner).get(STATE) is state

    return Report(
        "transformers",
        version,
        replaced={state.target: [f"forward and token_logprobs of this {name} alone"]},
        why={state.target: "no logits for the loss; token_logprobs"},
        standing=standing,
        left={f"{name} without labels, or with logits_to_keep": "whoever asks for logits gets them"},
        undo=(lambda: unpatch_model(model) if standing() else None) if fresh else None,
    )


def unpatch_places(model):
    """`unpatch_model` for `integrations.unpatch`: -> the places restored."""
    inner = _inner(model)
    places = (
        [f"{type(inner).__name__}.{name} of this instance" for name in OURS[:2]]
        if STATE in vars(inner)
        else []
    )
    unpatch_model(model)
    return places


def _target(inner):
    """ "transformers:LlamaForCausalLM" for the first model of that class, "… (2)" for another while the first
    is there.
    """
    name = f"transformers:{type(inner).__name__}"
    names = itertools.chain([name], (f"{name} ({n})" for n in itertools.count(2)))
    return next(each for each in names if TARGETS.setdefault(each, inner) is inner)


def _transformers():
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


class Patch:
    """What a patched model carries: how its head makes logits, and what its parts take."""

    def __init__(self, form, head_class, names, body_takes, on_call):
        self.form = form  # policy.LogitForm
        self.head_class = head_class  # what the head was before it was opened
        self.names = names  # {parameter of the model's forward: its default}, in order
        self.body_takes = body_takes  # parameters of the body's forward; None: any
        self.on_call = on_call
        self.target = None  # the key of its calls in sites.CALLS
        self.warned = False  # that evaluations get no logits
        self.kind = None  # the class of the model's own outputs
        self.forward = None  # ours, a function

    def __deepcopy__(self, memo):
        return self  # a copy is counted with its original

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "a model patched by saferlhf-fast cannot be pickled; unpatch_model(model) first, or save its "
            "state_dict"
        )


def _inner(model):
    """The Hugging Face model under peft's wrapper. Refused when there is none."""
    from ..models.lora import plain

    inner = plain(model)
    if not isinstance(inner, nn.Module) or not all(
        hasattr(inner, name) for name in ("config", "base_model", "loss_function")
    ):
        raise Refused(f"expected a Hugging Face causal language model, got {type(model).__name__}")
    return inner


def _patch(model, force, on_call):
    version = _transformers().__version__
    if not version.startswith(VERSIONS) and not force:
        raise Refused(
            f"transformers {version}: expected 5.x, the versions that ours was compared with; "
            "force=True goes on"
        )
    reason = _unfit(model)
    if reason:
        raise Refused(f"{type(model).__name__}: {reason}")
    from ..models.policy import logit_form

    head = model.get_output_embeddings()
    head_class, form = type(head), logit_form(model)
    if form is None:
        raise Refused(
            f"{type(model).__name__}: expected logits = softcap(scale · (hidden · weightᵀ + bias)) of a "
            f"plain linear "
            f"layer; its {type(head).__name__} does not give them on three tokens"
        )
    body = inspect.signature(model.base_model.forward).parameters
    taken = None if any(p.kind is p.VAR_KEYWORD for p in body.values()) else set(body)
    own = inspect.signature(model.forward).parameters
    names = {
        name: p.default for name, p in own.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    state = Patch(form, head_class, names, taken, None)
    if not _same_loss(model, state):
        head.__class__ = head_class
        raise Refused(
            f"{type(model).__name__}: its loss is not the mean cross-entropy of the next token, on six tokens"
        )
    state.on_call = on_call
    setattr(model, STATE, state)
    state.forward = _forward_like(type(model).forward)
    model.forward = types.MethodType(state.forward, model)
    model.token_logprobs = types.MethodType(token_logprobs, model)


def _unfit(model):
    """Why a model cannot be patched, told without running it; None when it may be."""
    head, parameters = model.get_output_embeddings(), list(model.parameters())
    if getattr(model.config, "is_encoder_decoder", False):
        return "expected a decoder, got an encoder-decoder"
    if head is None or model.base_model is model:
        return "expected a model with a body and a head of its own"
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
    return _other_loss(model)


def _other_loss(model):
    """Why the model's loss is another one than ours; None when it is the same, as far as its settings tell."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        return f"its loss is {getattr(model.loss_function, '__name__', model.loss_function)}, not transformers' ForCausalLMLoss"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "output_router_logits adds a loss that is made from the router"
    return None


@torch.no_grad()
def _same_loss(model, state):
    """True when ours is the model's own loss on six tokens, two of them without a label."""
    head, training = model.get_output_embeddings(), model.training
    ids = torch.arange(1, 7, device=head.weight.device)[None] % head.weight.shape[0]
    labels = ids.clone()
    labels[0, 2:4] = IGNORED
    model.eval()
    try:
        output = model(input_ids=ids, labels=labels)
        state.kind, expected = type(output), output.loss
        made = _with_loss(model, state, {"input_ids": ids, "labels": labels}).loss
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return False
    finally:
        model.train(training)
    if expected is None:
        return False
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2
    return bool(((made - expected).abs() <= tolerance * expected.abs().clamp(min=1.0)).item())


# ---------------------------------------------------------------- what runs instead


def _forward_like(original):
    """A forward that looks like the class's own to whoever inspects it (Trainer, generate)."""

    @functools.wraps(uncompiled(original))
    def forward(self, *args, **kwargs):
        state = vars(self).get(STATE)
        # no state: unpatched inside a wrapper
        given = {**dict(zip(state.names, args)), **kwargs} if state else {}
        if given.get("labels") is None or len(args) > len(state.names):
            return type(self).forward(self, *args, **kwargs)
        reason = _needs_logits(self, state, given)
        if reason:
            warnings.warn(
                f"saferlhf-fast: {type(self).__name__}'s own forward makes this loss: {reason}", stacklevel=2
            )
            return type(self).forward(self, *args, **kwargs)
        _warn_of_no_logits(self, state)
        output = _with_loss(self, state, given)
        wanted = given.get("return_dict")
        wanted = getattr(self.config, "return_dict", True) if wanted is None else wanted
        return output if wanted else output.to_tuple()

    return forward


def _warn_of_no_logits(model, state):
    """Once per model: without a word Trainer.predict would hand () to compute_metrics."""
    if state.warned or model.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    state.warned = True
    warnings.warn(
        f"saferlhf-fast: {type(model).__name__} is patched: with labels it returns the loss and logits=None, "
        f"also in "
        "eval mode. If this evaluation wants logits (Trainer.predict, compute_metrics), unpatch the model "
        "before it",
        stacklevel=2,
    )


def _needs_logits(model, state, given):
    """Why a call with labels has to go to the model's own forward; None when it does not."""
    kept = given.get("logits_to_keep", 0)
    if isinstance(kept, torch.Tensor) or kept not in (0, None):
        return "logits_to_keep was given"
    if given.get("output_router_logits"):
        return "output_router_logits adds a loss that is made from the router"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear and not is_open(head):
        return f"its head has become {name_of(head)}"
    unknown = (
        []
        if state.body_takes is None
        else [
            name
            for name, value in given.items()
            if name not in NOT_THE_BODYS | state.body_takes
            and value is not None
            and (isinstance(value, torch.Tensor) or value != state.names.get(name))
        ]
    )
    return f"its body does not take {unknown[0]}" if unknown else _other_loss(model)


def _with_loss(model, state, given):
    """A call with labels, as {name: argument} -> the model's kind of output, without logits."""
    inputs = {
        name: value
        for name, value in given.items()
        if name not in NOT_THE_BODYS and (state.body_takes is None or name in state.body_takes)
    }
    outputs = model.base_model(**inputs, return_dict=True)
    hidden_BTH = outputs.last_hidden_state
    ignored, shifted = given.get("ignore_index", IGNORED), given.get("shift_labels")
    name, labels = ("labels", given["labels"]) if shifted is None else ("shift_labels", shifted)
    if not _integers(labels) or labels.numel() != hidden_BTH[..., 0].numel():
        raise ValueError(
            f"{name}: expected {hidden_BTH[..., 0].numel()} integers of shape {list(hidden_BTH.shape[:-1])}, "
            f"got "
            f"{labels.numel()} of {labels.dtype}"
        )
    targets = labels.long()  # before padding: -100 in uint8 would be a label, 156
    if shifted is None:
        targets = nn.functional.pad(targets, (0, 1), value=ignored)[..., 1:]
    targets = targets.reshape(-1).to(hidden_BTH.device)
    at_N = (targets != ignored).nonzero().squeeze(1)
    hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).index_select(0, at_N)
    targets_N = targets.index_select(0, at_N)

    def use(hidden, weight, bias):
        known_ids(f"{name}: expected {ignored} or", targets_N, len(weight))
        return negative_sum(hidden, weight, bias, targets_N, state.form)

    total = through_head(model, hidden_NH, use)
    count = given.get("num_items_in_batch")
    if isinstance(count, torch.Tensor):
        count = count.to(total.device)
    loss = total / (max(len(at_N), 1) if count is None else count)
    if count is None and not len(at_N):
        loss = loss + float("nan")  # the mean of nothing, as theirs; its gradients are 0
    if state.on_call is not None:
        state.on_call()
    kept = {field.name: getattr(outputs, field.name, None) for field in dataclasses.fields(state.kind)}
    return state.kind(**{**kept, "loss": loss, "logits": None})


def token_logprobs(
    self,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each next token, without logits: the method of a patched model.

    Means the same as, with ids = input_ids if labels is None else labels and real = mask & mask shifted right
    by one::

        logits = self(input_ids, attention_mask=mask, position_ids=…).logits.float()[:, :-1] / temperature
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * real[:, 1:]

    input_ids: [B, T] integers. mask: [B, T], boolean or integers 0 and 1, 1 at real tokens, padding on either
    side; None: all are real. Positions are counted from each row's first real token. labels: [B, T] ids to
    score in the place of input_ids, −100 where none is wanted. temperature: > 0; a number, or a tensor [B,
    T−1], which gets no gradient.

    Returns logp [B, T−1] in nats, or (logp, entropy): entry t belongs to token t + 1; fp32 (float64 for
    float64 weights); 0 where the token or the one before it is masked, or its label −100. Differentiable.
    Raises ValueError for shapes and dtypes that do not fit and, on the CPU, for ids outside the vocabulary
    (on a device: NaN).
    """
    state = vars(self)[STATE]
    ids, real = _checked(input_ids, mask, labels)
    weight, (rows, columns) = self.get_output_embeddings().weight, ids.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    made = torch.zeros(
        2 if return_entropy else 1, rows, max(columns - 1, 0), dtype=dtype, device=weight.device
    )
    if made.numel():
        at_N = real.reshape(-1).nonzero().squeeze(1)
        if isinstance(temperature, torch.Tensor) and temperature.dim():
            temperature = temperature.expand(real.shape).reshape(-1).index_select(0, at_N)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(ids) if mask is None else mask.long(),
        }
        body = inspect.signature(self.base_model.forward).parameters
        if "position_ids" in body:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        if "use_cache" in body or state.body_takes is None:
            inputs["use_cache"] = False
        hidden_BTH = self.base_model(**inputs).last_hidden_state
        hidden_NH = (
            hidden_BTH[:, :-1].reshape(-1, hidden_BTH.shape[-1]).index_select(0, at_N.to(hidden_BTH.device))
        )
        ids_N = ids[:, 1:].reshape(-1).index_select(0, at_N).long().to(hidden_BTH.device)

        def use(hidden, weight, bias):
            known_ids(
                f"token_logprobs: {'input_ids' if labels is None else 'labels'}: expected", ids_N, len(weight)
            )
            return scored(hidden, weight, bias, ids_N, state.form, temperature, return_entropy)

        values = through_head(self, hidden_NH, use)
        values = torch.stack(values if return_entropy else [values])
        made = made.reshape(len(made), -1).index_copy(1, at_N.to(made.device), values).reshape(made.shape)
    if state.on_call is not None:
        state.on_call()
    return (made[0], made[1]) if return_entropy else made[0]


def _integers(tensor):
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


def _checked(input_ids, mask, labels):
    """-> ids to score [B, T], and of each but the first whether it counts [B, T-1]."""
    ids = input_ids if labels is None else labels
    for name, tensor in (("input_ids", input_ids), ("labels", ids)):
        if tensor.dim() != 2 or not _integers(tensor) or tensor.shape != input_ids.shape:
            raise ValueError(
                f"token_logprobs: {name}: expected integers [B, T], got {tensor.dtype} {list(tensor.shape)}"
            )
    wanted = ids[:, 1:] != IGNORED if labels is not None else torch.ones_like(ids[:, 1:], dtype=torch.bool)
    if mask is None:
        return ids, wanted
    if mask.shape != ids.shape or mask.device != ids.device:
        raise ValueError(
            f"token_logprobs: mask: expected {list(ids.shape)} on {ids.device} as input_ids, got "
            f"{list(mask.shape)} "
            f"on {mask.device}"
        )
    real = boolean("token_logprobs", mask)
    return ids, wanted & real[:, 1:] & real[:, :-1]
