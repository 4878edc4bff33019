"""How much memory a forward and a backward pass take, measured on meta tensors, which have no data.

    with Tracker("cuda") as tracker: …            # counts every storage that is allocated and freed in here
    footprint = footprint_of(module, call, "cuda")

The module's real code runs. So everything is counted as it is: what is saved for backward, what checkpointing
frees, and what exists only for a short time. What happens inside one op is not seen. For our own ops and for
attention it is added (`workspace`); what libraries allocate for themselves is left out. Attention runs as it
would on the device that is planned for (`attention_as_on`).
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...kernels import linear


class Footprint(NamedTuple):
    """Bytes of a pass; weights, gradients and inputs from before it are not counted.

    Attributes:
        saved: What stays between forward and backward.
        forward: The maximum in the forward pass.
        backward: The maximum in the backward pass.
        head: Of the larger maximum, what the head takes: chunks of logits and their gradients.
        gradients: Of the maximum in backward, gradients of parameters, where they are kept.
    """

    saved: int
    forward: int
    backward: int
    head: int
    gradients: int = 0

    @property
    def peak(self) -> int:
        """The maximum of both passes."""
        return max(self.forward, self.backward)


class Tracker(TorchDispatchMode):
    """Counts the bytes of storages that ops allocate, until they are freed.

    Attributes:
        now: Bytes that are allocated.
        peak: The maximum of `now` and of what an op takes inside itself.
        head: Of `peak`, what one of our head ops takes inside itself.
        kept: Bytes of gradients of parameters.
        kept_at_peak: `kept` when `peak` was reached.
    """

    def __init__(self, device: str) -> None:
        """Starts at zero. device: "cuda" or "cpu", for `workspace`."""
        super().__init__()
        self.device = device
        self.sizes: dict[int, int] = {}  # storage -> bytes; 0 for what existed before
        self.now = self.peak = self.head = 0
        self.kept = self.kept_at_peak = 0

    def exclude(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leaves out tensors that existed before; they must outlive the tracker.

        Args:
            tensors: Tensors of any shape and dtype, whose storage is not counted.
        """
        for tensor in tensors:
            self.sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # models ask masks two questions: is there no padding? does every token fit?
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        inside = workspace(func, args, self.device)
        if self.now + inside > self.peak:
            self.peak, self.head, self.kept_at_peak = (
                self.now + inside,
                inside if _is_head(func) else 0,
                self.kept,
            )
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def count_gradient(self, parameter: torch.Tensor) -> None:
        """Counts a parameter's gradient, which is complete and stays."""
        assert parameter.grad is not None, "called after the gradient was accumulated"
        self.kept += parameter.grad.untyped_storage().nbytes()

    def restart_peak(self) -> None:
        """Forgets the maximum so far and counts it from now on."""
        self.peak, self.head = self.now, 0


def footprint_of(
    module: torch.nn.Module,
    call: Callable[[Any], torch.Tensor],
    device: str,
    *,
    train: bool = True,
    keep_gradients: bool = False,
) -> Footprint:
    """Runs a module's forward pass, and its backward pass when it trains, and measures both.

    Args:
        module: A module on the meta device.
        call: Runs the module and returns one tensor.
        device: "cuda" or "cpu": what is planned for.
        train: Whether there is a backward pass.
        keep_gradients: Whether to count gradients of parameters as they accumulate during the first backward
            pass of a step; otherwise each counts only while it is computed.
    """
    hooks = []
    module.train(train)
    with Tracker(device) as tracker, attention_as_on(device), torch.set_grad_enabled(train):
        tracker.exclude([*module.parameters(), *module.buffers()])
        out = call(module)
        saved, forward, head = tracker.now, tracker.peak, tracker.head
        if not train:
            return Footprint(0, forward, 0, head)
        hook = tracker.count_gradient if keep_gradients else _discard_gradient
        hooks = [p.register_post_accumulate_grad_hook(hook) for p in module.parameters() if p.requires_grad]
        tracker.restart_peak()
        out.sum().backward()
        if tracker.peak >= forward:
            head = tracker.head
    for handle in hooks:
        handle.remove()
    for parameter in module.parameters():
        parameter.grad = None
    return Footprint(saved, forward, tracker.peak, head, tracker.kept_at_peak)


def _discard_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


# ---------------------------------------------------------------- inside one op


def _is_head(func: Any) -> bool:
    return func.namespace == "saferlhf_fast"


def workspace(func: Any, args: tuple[Any, ...], device: str) -> int:
    """Returns the bytes that an op allocates inside itself and frees, besides its outputs.

    Args:
        func: The op, as torch dispatches it.
        args: Its positional arguments.
        device: "cuda" or "cpu": what is planned for.
    """
    name = func.name() if isinstance(func, torch._ops.OpOverload) else ""
    if name == "saferlhf_fast::linear_logprob":
        return _logprob_bytes(args[0], args[1], device, in_chunks=args[9])
    if name == "saferlhf_fast::linear_logprob_backward":
        return _gradient_bytes(args[0], args[1], args[12], device)
    if name == "saferlhf_fast::linear_ppo_loss":
        hidden_NH, weight_VH, _, wanted = args[:4]
        return (
            _logprob_bytes(hidden_NH, weight_VH, device, in_chunks=True)
            + hidden_NH.numel() * hidden_NH.element_size()
            + (_d_chunk(hidden_NH, weight_VH, device) if any(wanted) else 0)
        )
    if (
        device == "cuda"
        and name.endswith("_backward")
        and ("varlen_attn" in name or "flash_attention" in name)
    ):
        return _attention_bytes(args[1], args[2])
    return 0


def _chunk(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, device: str) -> int:
    """Returns the number of tokens whose logits exist at once."""
    slices = linear.chunks(hidden_NH.shape[0], weight_VH.shape[0], None, torch.device(device))
    return max((tokens.stop - tokens.start for tokens in slices), default=0)


def _widened(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, device: str) -> int:
    """Returns the bytes of float32 copies, in which a CPU multiplies half-precision tensors."""
    half = hidden_NH.dtype in (torch.bfloat16, torch.float16)
    return 4 * (hidden_NH.numel() + weight_VH.numel()) if half and device == "cpu" else 0


def _logprob_bytes(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, device: str, in_chunks: bool) -> int:
    """Returns the bytes of a forward pass of the head.

    in_chunks: logits are written in chunks. Without a gradient on a GPU one kernel keeps them in registers.
    """
    logits = 4 * _chunk(hidden_NH, weight_VH, device) * weight_VH.shape[0]
    return (logits if in_chunks or device == "cpu" else 0) + _widened(hidden_NH, weight_VH, device)


def _d_chunk(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, device: str) -> int:
    """Returns the bytes of one chunk of d hidden, before it is added to the whole."""
    return 4 * _chunk(hidden_NH, weight_VH, device) * hidden_NH.shape[1]


def _gradient_bytes(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, wanted: Sequence[bool], device: str
) -> int:
    """Returns the bytes of linear_logprob's backward pass.

    These are the logits again, and d weight in float32 before it gets the weight's own type. wanted: whether
    d hidden and d weight are needed.
    """
    d_weight = 4 * weight_VH.numel() if wanted[1] and weight_VH.dtype != torch.float32 else 0
    return (
        _logprob_bytes(hidden_NH, weight_VH, device, in_chunks=True)
        + d_weight
        + _d_chunk(hidden_NH, weight_VH, device)
    )


def _attention_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    """Returns the bytes of flash attention's backward pass on a GPU.

    These are d query in float32, and d key and d value of every head before heads that share one are summed.
    """
    shared = query.numel() > key.numel()
    return 4 * query.numel() + (2 * query.numel() * query.element_size() if shared else 0)


# ---------------------------------------------------------------- attention


@contextlib.contextmanager
def attention_as_on(device: str) -> Iterator[None]:
    """Context in which attention on meta tensors takes the implementation that it takes on a device.

    For meta tensors torch would choose the implementation that writes all scores. Flash attention, on a GPU
    and on a CPU, keeps query, key, value, output and one float32 for each token and head.
    """
    from torch.nn import functional

    from ...models import attention

    real, real_varlen = functional.scaled_dot_product_attention, attention._varlen

    def flash(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        # a CPU's flash attention has no dropout: all scores are written
        if dropout_p and device == "cpu":
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # torch allocates an additive one
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    def varlen(dtype: torch.dtype, _: object, head_size: int) -> Callable[..., Any] | None:
        supported = (
            device == "cuda"
            and dtype in (torch.float16, torch.bfloat16)
            and head_size <= 256
            and head_size % 8 == 0
        )
        return attention._torch_varlen if supported else None

    functional.scaled_dot_product_attention = flash
    attention._varlen = varlen  # type: ignore[assignment]  # it replaces a cached function until the end
    linear.WORKSPACE["meta"] = linear.WORKSPACE[device]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, attention._varlen = real, real_varlen
        linear.WORKSPACE.pop("meta", None)
