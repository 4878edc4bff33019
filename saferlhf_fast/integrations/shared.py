"""What the functions of several libraries share: masks, log-probs, entropies, GAE, whitening and losses.

Each function here that computes something by our ops either means what the libraries' functions mean, or
returns None, and the caller then calls the library's own function. Shapes: B rows, T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from ..kernels import checks
from ..kernels.dispatch import checking, interpreted
from ..kernels.first_order import transformed
from ..kernels.gae import gae
from ..kernels.ppo_loss import ppo_loss
from ..kernels.token_logprob import token_logprob
from ..kernels.value_loss import value_loss
from .registry import LibraryFunction

DEVICES = ("cpu", "cuda")


def plain(*tensors: torch.Tensor | None) -> bool:
    """True for ordinary tensors on a CPU or a CUDA device, outside transforms.

    No DTensors, nested ones, other accelerators, or tensors without values: `without_values`.
    """
    return (
        all(
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.device.type in DEVICES
            and not tensor.is_nested
            for tensor in tensors
            if tensor is not None
        )
        and not _transforming()
    )


MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def _transforming() -> bool:
    """True under transforms of torch.func, forward-mode derivatives, torch.jit.trace, make_fx, FakeTensor.

    There the libraries' own functions run: they look at no values, and can be differentiated in every way.
    """
    if torch.compiler.is_compiling():
        return _compiling_transform()
    return (
        transformed()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in MODES)
    )


# torch.compile enters torch.vmap and torch.func.grad for real while it traces what is inside them, but cannot
# trace the question.
_compiling_transform = torch.compiler.assume_constant_result(transformed)


def without_values(*tensors: torch.Tensor | None) -> bool:
    """True for tensors whose values cannot be looked at: under a transform, fake ones, or on "meta"."""
    return _transforming() or any(
        isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors if tensor is not None
    )


def logits_of_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Logits [..., V] of hidden states [..., H] and a head, by plain torch in float32 at least.

    For tensors `without_values`, where neither our ops nor the libraries' autograd functions run.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).transpose(0, 1)
    logits = (logits if bias is None else logits + bias.to(dtype)) * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def logp_and_entropy_by_torch(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of ids [...] and entropies [...] under softmax(logits [..., V]), by plain torch."""
    log_p = torch.log_softmax(logits, -1)
    logp = log_p.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)
    # A logit of -inf is probability 0, whose log would make the product NaN.
    return logp, -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def given(*tensors: torch.Tensor | None) -> bool:
    """True for ordinary tensors, as `plain`, of which none is None."""
    return plain(*tensors) and not any(tensor is None for tensor in tensors)


def flags(mask: torch.Tensor) -> torch.Tensor | None:
    """A mask as booleans; None for a floating-point mask that may hold weights.

    The values of a floating-point mask are read on a CPU alone; on a device it is taken for weights.
    """
    if mask.dtype == torch.bool:
        return mask
    if mask.device.type == "cpu":
        booleans = mask != 0
        return booleans if torch.equal(booleans.to(mask.dtype), mask) else None
    return None if mask.dtype.is_floating_point else mask != 0


def one_id_each(logits: torch.Tensor, ids: torch.Tensor) -> bool:
    """True for plain logits [..., V] with one integer id for each row [...], which our log-prob takes.

    The libraries' functions may broadcast.
    """
    return (
        plain(logits, ids)
        and ids.shape == logits.shape[:-1]
        and checks.is_integer(ids)
        and logits.dtype.is_floating_point
    )


def known_ids(expected: str, ids: torch.Tensor, vocabulary: int) -> None:
    """Refuses ids outside the vocabulary as our ops do, with a message in the caller's words.

    Args:
        expected: Beginning of the message, such as "labels: expected".
        ids: Integers of any shape; their values are read on a CPU, and on a device only where the ops check
            them too.
        vocabulary: V.

    Raises:
        ValueError: An id is not in 0 … V−1.
    """
    if (
        torch.compiler.is_compiling()
        or not ids.numel()
        or not (ids.device.type == "cpu" and not interpreted() or checking())
    ):
        return  # compiled code would break here; the op checks the ids itself
    lowest, highest = ids.aminmax()
    if lowest < 0 or highest >= vocabulary:
        outside = (ids < 0) | (ids >= vocabulary)
        raise ValueError(f"{expected} 0 <= id < {vocabulary}, got {ids[outside][0].item()}")


def any_needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """True where a gradient will flow into one of the tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def numbers(*values: object) -> bool:
    """True where none is a tensor.

    The libraries broadcast a tensor, or compute its gradient; our ops take a scalar and do neither.
    """
    return not any(isinstance(value, torch.Tensor) for value in values)


def one_temperature(value: float | torch.Tensor) -> bool:
    """True for a number, and for a 0-d tensor that needs no gradient; the library handles the others."""
    if not isinstance(value, torch.Tensor):
        return True
    return plain(value) and value.dim() == 0 and value.is_floating_point() and not any_needs_gradient(value)


def counts_fit(mask: torch.Tensor, *counts: float | torch.Tensor | None) -> bool:
    """False for a global count that our losses would treat in another way than the libraries do.

    That is a count of 0 although there are tokens (the libraries divide by it, our losses are 0 then; without
    tokens 0 is right), a number below 0, a tensor with dimensions or one that needs a gradient. The values
    of a tensor on a device are not read, because the host would have to wait.

    Args:
        mask: [B, T], nonzero at the tokens that count.
        counts: What the libraries divide sums by; None: they count themselves.
    """
    for count in counts:
        if isinstance(count, torch.Tensor):
            if count.dim() or any_needs_gradient(count):
                return False
            if count.device.type != "cpu":
                continue
        if count is not None and (not count >= 0 or (count == 0 and bool(mask.any()))):
            return False
    return True


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(logits) in nats, [...] of [..., V]; logits of -inf are probability 0."""
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprob(logits, ids, return_entropy=True)[1]


def entropy_from_logits(original: LibraryFunction) -> LibraryFunction:
    """Replaces a function of logits [..., V], with or without a chunk size; no softmax is kept for backward.

    The chunk size does not matter to our op.
    """

    def replacement(logits: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
        if plain(logits):
            return entropy(logits)
        return original(logits) if chunk_size is None else original(logits, chunk_size)

    return replacement


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """(values - mean) / sqrt(var + 1e-8), with Bessel's variance, in float32 at least.

    Args:
        values: Any shape.
        mask: Booleans of this shape; mean and variance are those of the values where it is True.
        shift_mean: False adds the mean again.

    Returns:
        All values whitened, also those that are masked. With fewer than two values under the mask NaN on a
        device, where a check would make the host wait.

    Raises:
        ValueError: Fewer than two values under the mask, on a CPU.
    """
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    count = mask.sum()
    if mask.device.type == "cpu" and count < 2:
        raise ValueError(f"whitening: expected at least two values under the mask, got {int(count)}")
    inside = torch.where(mask, values.to(dtype), 0.0)
    mean = inside.sum() / count
    centered = torch.where(mask, inside - mean, 0.0)
    rate = torch.rsqrt(centered.square().sum() / (count - 1) + 1e-8)
    whitened = (values - mean) * rate
    return whitened if shift_mean else whitened + mean


def advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float,
    lam: float,
    masked: str,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """GAE by our op.

    Args:
        rewards: [B, T].
        values: [B, T].
        mask: [B, T], nonzero at the tokens that count.
        gamma: 0 … 1.
        lam: 0 … 1.
        masked: What `gae` does at masked tokens, "zero" or "carry".

    Returns:
        (advantages, returns), [B, T], 0 where masked, without a graph; None where the library's own function
        has to compute them.
    """
    if (
        not given(rewards, values, mask)
        or rewards.dim() != 2
        or not (mask.shape == rewards.shape == values.shape)
        or any_needs_gradient(rewards, values)
        or not (rewards.is_floating_point() and values.is_floating_point())
        or not numbers(gamma, lam)
        or not (0 <= gamma <= 1 and 0 <= lam <= 1)
    ):
        return None
    counted = flags(mask)
    if counted is None:
        return None
    with torch.no_grad():
        return gae(rewards, values, gamma=float(gamma), lam=float(lam), mask=counted, masked=masked)


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    **clip: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
    """The clipped policy loss by our op.

    Args:
        logp: [B, T], nats; it alone may learn.
        old_logp: [B, T], nats.
        advantages: [B, T].
        mask: [B, T], nonzero at the tokens that count.
        reduction: As in `ppo_loss`.
        normalizer: As in `ppo_loss`.
        clip: The clip_ratio, clip_high and dual_clip of `ppo_loss`.

    Returns:
        (loss, statistics); None where the library's own function has to compute them.
    """
    counted = _rows_mask(logp, old_logp, advantages, mask)
    if counted is None or not numbers(*clip.values()):
        return None
    return ppo_loss(
        logp, old_logp, advantages, mask=counted, reduction=reduction, normalizer=normalizer, **clip
    )


def critic_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    clip_value: float,
    reduction: str,
    normalizer: float | torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
    """Half the mean clipped square by our op.

    Args:
        values: [B, T]; it alone may learn.
        old_values: [B, T].
        returns: [B, T].
        mask: [B, T], nonzero at the tokens that count.
        clip_value: How far a value may move from its old one.
        reduction: As in `value_loss`.
        normalizer: As in `value_loss`.

    Returns:
        (loss, statistics); None where the library's own function has to compute them.
    """
    counted = _rows_mask(values, old_values, returns, mask)
    if counted is None or not numbers(clip_value):
        return None
    return value_loss(
        values,
        old_values,
        returns,
        clip_value=clip_value,
        mask=counted,
        reduction=reduction,
        normalizer=normalizer,
    )


def _rows_mask(
    first: torch.Tensor, second: torch.Tensor, third: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The boolean mask of three tensors [B, T] of one shape, or None.

    None also where another one than the first needs a gradient.
    """
    if (
        mask is None
        or not given(first, second, third, mask)
        or first.dim() != 2
        or any_needs_gradient(second, third)
        or not all(tensor.is_floating_point() for tensor in (first, second, third))
    ):
        return None
    if not (first.shape == second.shape == third.shape == mask.shape):
        return None  # the library broadcasts
    return flags(mask)
