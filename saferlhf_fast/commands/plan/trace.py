"""How much memory a forward and a backward pass take, found by running them on meta tensors, which have
shapes and no data.

    with Tracker("cuda") as tracker: …            # every storage that is made and freed in here is counted
    footprint = footprint_of(module, call, "cuda")

The module's real code runs, so what is saved for backward, what checkpointing lets go of and what is only
there for a moment come out as they are. Not seen: what happens inside one op. Of ours and of attention's,
that is added (`workspace`); what libraries take for themselves is not. Attention runs as it would on the
device that is planned for (`standing_in_for`).
"""

import contextlib
import weakref
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...kernels import linear


class Footprint(NamedTuple):
    """Bytes above what lay there before the pass: weights, gradients and inputs are not in it."""

    saved: int  # between forward and backward
    forward: int  # at the worst moment of the forward pass
    backward: int  # at the worst moment of the backward pass
    head: int  # of the worst moment: chunks of logits and what goes with them
    gradients: int = 0  # of the worst moment of backward: of parameters, where they are kept

    @property
    def peak(self):
        """At the worst moment of both."""
        return max(self.forward, self.backward)


class Tracker(TorchDispatchMode):
    """Counts the bytes of storages that ops make, until they are freed. device: "cuda" or "cpu", for
    `workspace`.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.sizes = {}  # storage -> bytes; 0 for what was there before
        self.now = self.peak = self.head = 0
        self.kept = self.kept_at_peak = 0  # gradients of parameters

    def know(self, tensors):
        """Leaves tensors out that were there before; they must outlive the tracker."""
        for tensor in tensors:
            self.sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # asked of a mask: is there no padding? does every token fit?
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

    def _count(self, storage):
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key):
        self.now -= self.sizes.pop(key)

    def keep(self, parameter):
        """A parameter's gradient is done and stays."""
        self.kept += parameter.grad.untyped_storage().nbytes()

    def since(self):
        """Forgets the worst moment so far: what counts is from now on."""
        self.peak, self.head = self.now, 0


def footprint_of(module, call, device, *, train=True, keep_gradients=False):
    """Runs call(module) -> tensor, and its backward where train -> Footprint.

    Everything lies on the meta device.

    keep_gradients: count gradients of parameters, as they fill up during the first backward pass of a step;
    otherwise each counts for the moment in which it is made.
    """
    hooks = []
    module.train(train)
    with Tracker(device) as tracker, standing_in_for(device), torch.set_grad_enabled(train):
        tracker.know([*module.parameters(), *module.buffers()])
        out = call(module)
        saved, forward, head = tracker.now, tracker.peak, tracker.head
        if not train:
            return Footprint(0, forward, 0, head)
        hook = tracker.keep if keep_gradients else _let_go
        hooks = [p.register_post_accumulate_grad_hook(hook) for p in module.parameters() if p.requires_grad]
        tracker.since()
        out.sum().backward()
        if tracker.peak >= forward:
            head = tracker.head
    for hook in hooks:
        hook.remove()
    for parameter in module.parameters():
        parameter.grad = None
    return Footprint(saved, forward, tracker.peak, head, tracker.kept_at_peak)


def _let_go(parameter):
    parameter.grad = None


# ---------------------------------------------------------------- inside one op


def _is_head(func):
    return func.namespace == "saferlhf_fast"


def workspace(func, args, device):
    """Bytes that an op takes inside itself and gives back, beside its outputs."""
    name = func.name() if isinstance(func, torch._ops.OpOverload) else ""
    if name == "saferlhf_fast::linear_logprob":
        return _logprob_bytes(args[0], args[1], device, made=args[9])
    if name == "saferlhf_fast::linear_logprob_backward":
        return _gradient_bytes(args[0], args[1], args[12], device)
    if name == "saferlhf_fast::linear_ppo_loss":
        hidden_NH, weight_VH, _, wanted = args[:4]
        return (
            _logprob_bytes(hidden_NH, weight_VH, device, made=True)
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


def _chunk(hidden_NH, weight_VH, device):
    """Tokens whose logits exist at once."""
    slices = linear.chunks(hidden_NH.shape[0], weight_VH.shape[0], None, torch.device(device))
    return max((at.stop - at.start for at in slices), default=0)


def _widened(hidden_NH, weight_VH, device):
    """A CPU multiplies half precision in float32: hidden states and weight are there a second time."""
    half = hidden_NH.dtype in (torch.bfloat16, torch.float16)
    return 4 * (hidden_NH.numel() + weight_VH.numel()) if half and device == "cpu" else 0


def _logprob_bytes(hidden_NH, weight_VH, device, made):
    """made: logits are made in chunks. Without a gradient on a GPU one kernel makes them in registers."""
    logits = 4 * _chunk(hidden_NH, weight_VH, device) * weight_VH.shape[0]
    return (logits if made or device == "cpu" else 0) + _widened(hidden_NH, weight_VH, device)


def _d_chunk(hidden_NH, weight_VH, device):
    """A chunk of d hidden on its way into the whole."""
    return 4 * _chunk(hidden_NH, weight_VH, device) * hidden_NH.shape[1]


def _gradient_bytes(hidden_NH, weight_VH, wanted, device):
    """Backward of linear_logprob: the logits again, and d weight in float32 before it becomes the weight's
    own type.
    """
    d_weight = 4 * weight_VH.numel() if wanted[1] and weight_VH.dtype != torch.float32 else 0
    return (
        _logprob_bytes(hidden_NH, weight_VH, device, made=True)
        + d_weight
        + _d_chunk(hidden_NH, weight_VH, device)
    )


def _attention_bytes(query, key):
    """Backward of flash attention on a GPU: d query in float32, and d key and d value of every head before
    they are summed over the heads that share one.
    """
    shared = query.numel() > key.numel()
    return 4 * query.numel() + (2 * query.numel() * query.element_size() if shared else 0)


# ---------------------------------------------------------------- attention


@contextlib.contextmanager
def standing_in_for(device):
    """Context in which attention on meta tensors takes the way that it takes on a device: with meta tensors
    torch would choose the form that writes out all scores. Flash attention, the GPU's and the CPU's, keeps
    query, key, value, output and one float32 for each token and head.
    """
    from torch.nn import functional

    from ...models import attention

    real, real_varlen = functional.scaled_dot_product_attention, attention._varlen

    def flash(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        # a CPU's flash attention drops nothing out: all scores are written
        if dropout_p and device == "cpu":
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # torch makes an additive one
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    def varlen(dtype, _, head_size):
        fits = (
            device == "cuda"
            and dtype in (torch.float16, torch.bfloat16)
            and head_size <= 256
            and head_size % 8 == 0
        )
        return attention._torch_varlen if fits else None

    functional.scaled_dot_product_attention, attention._varlen = flash, varlen
    linear.WORKSPACE["meta"] = linear.WORKSPACE[device]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, attention._varlen = real, real_varlen
        linear.WORKSPACE.pop("meta", None)
