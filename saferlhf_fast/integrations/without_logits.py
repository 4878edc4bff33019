"""What a patched model runs: its forward with labels, and `token_logprobs`, neither of which builds logits.

The backbone runs as it always does. Of its hidden states only the positions that a label belongs to reach the
head, whose logits exist in chunks.

Shapes: B rows, T tokens, H hidden, V vocabulary, M = B·T positions, N labelled positions.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..kernels.checks import is_integer
from ..models.packing import boolean
from .head import head_logprobs, is_open, name_of, negative_sum, through_head
from .shared import known_ids, without_values
from .sites import uncompiled

if TYPE_CHECKING:
    from ..models.policy import LogitForm

STATE = "_saferlhf_fast_patch"  # the attribute of a patched model that holds its PatchState
IGNORED = -100
NOT_FOR_BACKBONE = {
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "shift_labels",
    "ignore_index",
    "return_dict",
}


@dataclasses.dataclass(eq=False)
class PatchState:
    """What a patched model carries.

    Attributes:
        form: Scale and softcap of its logits.
        head_class: The class of its head before the head was opened.
        defaults: {parameter of the model's forward: its default}, in order.
        backbone_parameters: Names of the parameters of the backbone's forward; None: it takes any.
        on_call: Called at each loss and each `token_logprobs` that is computed without logits.
        target: The key of its calls in `sites.CALLS`; None where they are not counted.
        warned: Whether a warning has said that evaluations get no logits.
        output_class: The class of the model's own outputs.
        forward: The function that replaces the class's forward.
    """

    form: "LogitForm"
    head_class: type[nn.Module]
    defaults: dict[str, Any]
    backbone_parameters: set[str] | None
    on_call: Callable[[], None] | None = None
    target: str | None = None
    warned: bool = False
    output_class: Any = None
    forward: Callable[..., Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PatchState":
        return self  # a copy is counted with its original

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a model patched by saferlhf-fast cannot be pickled; unpatch_model(model) first, or save its "
            "state_dict"
        )


def forward_like(original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with the name and signature of the class's own, which Trainer and generate inspect."""

    @functools.wraps(uncompiled(original))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # None where the model has been unpatched inside a wrapper.
        state: PatchState | None = vars(self).get(STATE)
        arguments = {**dict(zip(state.defaults, args)), **kwargs} if state else {}
        if state is None or arguments.get("labels") is None or len(args) > len(state.defaults):
            return type(self).forward(self, *args, **kwargs)
        reason = _needs_logits(self, state, arguments)
        if reason:
            warnings.warn(
                f"saferlhf-fast: {type(self).__name__}'s own forward makes this loss: {reason}", stacklevel=2
            )
            return type(self).forward(self, *args, **kwargs)
        _warn_of_no_logits(self, state)
        output = output_with_loss(self, state, arguments)
        return_dict = arguments.get("return_dict")
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    return forward


def _warn_of_no_logits(model: nn.Module, state: PatchState) -> None:
    """Warns once per model; otherwise Trainer.predict would silently pass () to compute_metrics."""
    if state.warned or model.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    state.warned = True
    warnings.warn(
        f"saferlhf-fast: {type(model).__name__} is patched: with labels it returns the loss and logits=None, "
        "also in eval mode. If this evaluation wants logits (Trainer.predict, compute_metrics), unpatch the "
        "model before it",
        stacklevel=2,
    )


def _needs_logits(model: Any, state: PatchState, arguments: Mapping[str, Any]) -> str | None:
    """Why a call with labels has to run the model's own forward; None when it does not have to."""
    if without_values(arguments["labels"]):
        return "under a transform (torch.func, torch.jit.trace, FakeTensor) its labels have no values"
    logits_to_keep = arguments.get("logits_to_keep", 0)
    if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep not in (0, None):
        return "logits_to_keep was given"
    if arguments.get("output_router_logits"):
        return "output_router_logits adds a loss that is made from the router"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear and not is_open(head):
        return f"its head has become {name_of(head)}"
    if state.backbone_parameters is not None:
        for name, value in arguments.items():
            if name in NOT_FOR_BACKBONE or name in state.backbone_parameters or value is None:
                continue
            if isinstance(value, torch.Tensor) or value != state.defaults.get(name):
                return f"its backbone does not take {name}"
    return other_loss(model)


def other_loss(model: Any) -> str | None:
    """Why the model's settings give another loss than `output_with_loss`; None when they do not."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", model.loss_function)
        return f"its loss is {name}, not transformers' ForCausalLMLoss"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "output_router_logits adds a loss that is made from the router"
    return None


def output_with_loss(model: Any, state: PatchState, arguments: Mapping[str, Any]) -> Any:
    """The model's output for a call with labels, without logits.

    Args:
        model: The patched model.
        state: Its state.
        arguments: {name: argument} of the call.

    Returns:
        An instance of `state.output_class` with the loss, and None as logits.

    Raises:
        ValueError: The labels are no integers [B, T], or a label is outside the vocabulary (on a CPU).
    """
    inputs = {
        name: value
        for name, value in arguments.items()
        if name not in NOT_FOR_BACKBONE
        and (state.backbone_parameters is None or name in state.backbone_parameters)
    }
    outputs = model.base_model(**inputs, return_dict=True)
    hidden_BTH = outputs.last_hidden_state
    ignored = arguments.get("ignore_index", IGNORED)
    name, targets_M = _targets(arguments, hidden_BTH, ignored)
    at_N = (targets_M != ignored).nonzero().squeeze(1)
    hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).index_select(0, at_N)
    targets_N = targets_M.index_select(0, at_N)

    # Types in quotes: torch.compile traces this definition.
    def use(hidden: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor | None") -> "torch.Tensor":
        known_ids(f"{name}: expected {ignored} or", targets_N, len(weight))
        return negative_sum(hidden, weight, bias, targets_N, state.form)

    total = through_head(model, hidden_NH, use)
    count = arguments.get("num_items_in_batch")
    if isinstance(count, torch.Tensor):
        count = count.to(total.device)
    loss = total / (max(len(at_N), 1) if count is None else count)
    if count is None and not len(at_N):
        loss = loss + float("nan")  # the mean of nothing, as in transformers; its gradients are 0
    if state.on_call is not None:
        state.on_call()
    values = {
        field.name: getattr(outputs, field.name, None) for field in dataclasses.fields(state.output_class)
    }
    return state.output_class(**{**values, "loss": loss, "logits": None})


def _targets(
    arguments: Mapping[str, Any], hidden_BTH: torch.Tensor, ignored: int
) -> tuple[str, torch.Tensor]:
    """The name of the labels' argument, and the token that each position predicts, [M]."""
    shifted = arguments.get("shift_labels")
    name, labels = ("labels", arguments["labels"]) if shifted is None else ("shift_labels", shifted)
    count = hidden_BTH[..., 0].numel()
    if not is_integer(labels) or labels.numel() != count:
        raise ValueError(
            f"{name}: expected {count} integers of shape {list(hidden_BTH.shape[:-1])}, got "
            f"{labels.numel()} of {labels.dtype}"
        )
    targets = labels.long()  # before padding: -100 in uint8 would be a label, 156
    if shifted is None:
        targets = nn.functional.pad(targets, (0, 1), value=ignored)[..., 1:]
    return name, targets.reshape(-1).to(hidden_BTH.device)


def token_logprobs(
    self: Any,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each next token, without logits: a method of a patched model.

    Means the same as, with ids = input_ids if labels is None else labels and real = mask & mask shifted right
    by one::

        logits = self(input_ids, attention_mask=mask, position_ids=…).logits.float()[:, :-1] / temperature
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * real[:, 1:]

    Args:
        self: The patched model.
        input_ids: [B, T] integers.
        mask: [B, T], booleans or integers 0 and 1, 1 at real tokens, padding on either side; None: all are
            real. Positions are counted from each row's first real token.
        labels: [B, T], ids to score in the place of input_ids, −100 where none is wanted.
        temperature: > 0; a number, or a tensor [B, T−1], which gets no gradient.
        return_entropy: Also return the entropies.

    Returns:
        logp [B, T−1] in nats, or (logp, entropy): entry t belongs to token t + 1; fp32 (float64 for float64
        weights); 0 where the token or the one before it is masked, or its label −100. Differentiable.

    Raises:
        ValueError: Shapes or dtypes do not fit, or, on the CPU, an id is outside the vocabulary (on a device
            its log-prob is NaN).
    """
    state: PatchState = vars(self)[STATE]
    ids, wanted = _ids_and_wanted(input_ids, mask, labels)
    weight, (rows, columns) = self.get_output_embeddings().weight, ids.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    outputs = torch.zeros(
        2 if return_entropy else 1, rows, max(columns - 1, 0), dtype=dtype, device=weight.device
    )
    if outputs.numel():
        at_N = wanted.reshape(-1).nonzero().squeeze(1)
        if isinstance(temperature, torch.Tensor) and temperature.dim():
            temperature = temperature.expand(wanted.shape).reshape(-1).index_select(0, at_N)
        attention_mask = torch.ones_like(ids) if mask is None else mask.long()
        inputs = _backbone_inputs(self, state, input_ids, attention_mask)
        hidden_BTH = self.base_model(**inputs).last_hidden_state
        hidden_NH = (
            hidden_BTH[:, :-1].reshape(-1, hidden_BTH.shape[-1]).index_select(0, at_N.to(hidden_BTH.device))
        )
        ids_N = ids[:, 1:].reshape(-1).index_select(0, at_N).long().to(hidden_BTH.device)
        name = "input_ids" if labels is None else "labels"

        # Types in quotes: torch.compile traces this definition.
        def use(hidden: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor | None") -> "Any":
            known_ids(f"token_logprobs: {name}: expected", ids_N, len(weight))
            return head_logprobs(hidden, weight, bias, ids_N, state.form, temperature, return_entropy)

        values = through_head(self, hidden_NH, use)
        values = torch.stack(values if return_entropy else [values])
        flat = outputs.reshape(len(outputs), -1).index_copy(1, at_N.to(outputs.device), values)
        outputs = flat.reshape(outputs.shape)
    if state.on_call is not None:
        state.on_call()
    return (outputs[0], outputs[1]) if return_entropy else outputs[0]


def _backbone_inputs(
    model: Any, state: PatchState, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> dict[str, Any]:
    """The backbone's arguments, with positions counted from each row's first real token."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    parameters = inspect.signature(model.base_model.forward).parameters
    if "position_ids" in parameters:
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in parameters or state.backbone_parameters is None:
        inputs["use_cache"] = False
    return inputs


def _ids_and_wanted(
    input_ids: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids to score [B, T], and for each but the first whether it is scored [B, T-1]."""
    ids = input_ids if labels is None else labels
    for name, tensor in (("input_ids", input_ids), ("labels", ids)):
        if tensor.dim() != 2 or not is_integer(tensor) or tensor.shape != input_ids.shape:
            raise ValueError(
                f"token_logprobs: {name}: expected integers [B, T], got {tensor.dtype} {list(tensor.shape)}"
            )
    labelled = ids[:, 1:] != IGNORED if labels is not None else torch.ones_like(ids[:, 1:], dtype=torch.bool)
    if mask is None:
        return ids, labelled
    if mask.shape != ids.shape or mask.device != ids.device:
        raise ValueError(
            f"token_logprobs: mask: expected {list(ids.shape)} on {ids.device} as input_ids, got "
            f"{list(mask.shape)} on {mask.device}"
        )
    real = boolean("token_logprobs", mask)
    return ids, labelled & real[:, 1:] & real[:, :-1]
