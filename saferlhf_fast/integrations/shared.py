"""What the libraries' functions have in common: log-probs, entropies, masks, GAE, whitening and the clipped
losses by our ops.

Each function here either means what the library's means, or answers None so that the caller goes to the
library's own. Shapes: B rows, T tokens, V vocabulary.
"""

import torch

from ..kernels import checks
from ..kernels.dispatch import checking, interpreted
from ..kernels.gae import gae
from ..kernels.ppo_loss import ppo_loss
from ..kernels.token_logprob import token_logprob
from ..kernels.value_loss import value_loss

DEVICES = ("cpu", "cuda")


def plain(*tensors):
    """True for ordinary tensors on a CPU or a CUDA device: no DTensors, nested ones or other accelerators."""
    return all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type in DEVICES
        and not tensor.is_nested
        for tensor in tensors
        if tensor is not None
    )


def given(*tensors):
    """As plain, and none is missing."""
    return plain(*tensors) and not any(tensor is None for tensor in tensors)


def flags(mask):
    """A mask as booleans, or None where it may hold weights: a floating-point mask, looked at on a CPU alone."""
    if mask.dtype == torch.bool:
        return mask
    if mask.device.type == "cpu":
        made = mask != 0
        return made if torch.equal(made.to(mask.dtype), mask) else None
    return None if mask.dtype.is_floating_point else mask != 0


def one_id_each(logits, ids):
    """True for plain logits with one integer id for each row: what our log-prob takes.

    The libraries may broadcast.
    """
    return (
        plain(logits, ids)
        and ids.shape == logits.shape[:-1]
        and checks.whole(ids)
        and logits.dtype.is_floating_point
    )


def known_ids(expected, ids, vocabulary):
    """ValueError for an id outside the vocabulary, where our ops look too, but in the caller's words:

    "labels: expected".
    """
    if (
        torch.compiler.is_compiling()
        or not ids.numel()
        or not (ids.device.type == "cpu" and not interpreted() or checking())
    ):
        return  # compiled code would break here; the op looks for itself
    outside = (ids < 0) | (ids >= vocabulary)
    if outside.any():
        raise ValueError(f"{expected} 0 <= id < {vocabulary}, got {ids[outside][0].item()}")


def learns(*tensors):
    """True where a gradient is to flow into one of the tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def numbers(*values):
    """True where none is a tensor.

    The libraries broadcast one, or let it learn; our ops take a scalar that does neither.
    """
    return not any(isinstance(value, torch.Tensor) for value in values)


def one_temperature(value):
    """True for a number, or a 0-d tensor on its way through: one that learns gets a gradient from the
    library's own.
    """
    return numbers(value) or (
        plain(value) and value.dim() == 0 and value.is_floating_point() and not learns(value)
    )


def counts_fit(mask, *counts):
    """False where a global count is 0 though there are tokens: the libraries divide by it, our losses are 0
    then.

    Without tokens 0 is right. A tensor on a device is not looked at, which would make the host wait; one with
    dimensions, that learns, or a number below 0 does not fit.
    """
    for count in counts:
        if isinstance(count, torch.Tensor):
            if count.dim() or learns(count):
                return False
            if count.device.type != "cpu":
                continue
        if count is not None and (not count >= 0 or (count == 0 and bool(mask.any()))):
            return False
    return True


def entropy(logits):
    """Entropy of softmax(logits) in nats: -inf logits are probability 0."""
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprob(logits, ids, return_entropy=True)[1]


def entropy_from_logits(theirs):
    """In the place of a function of logits [..., V] and perhaps of a chunk size, which chooses nothing: no
    softmax is kept.
    """

    def ours(logits, chunk_size=None):
        if plain(logits):
            return entropy(logits)
        return theirs(logits) if chunk_size is None else theirs(logits, chunk_size)

    return ours


def whiten(values, mask, shift_mean=True):
    """(values - mean) / sqrt(var + 1e-8) with the mean and Bessel's variance where mask is True; computed in
    float32 at least.

    ValueError for fewer than two such values, on a CPU; on a device, where knowing would make the host wait,
    NaN.
    """
    kind = torch.float64 if values.dtype == torch.float64 else torch.float32
    count = mask.sum()
    if mask.device.type == "cpu" and count < 2:
        raise ValueError(f"whitening: expected at least two values under the mask, got {int(count)}")
    inside = torch.where(mask, values.to(kind), 0.0)
    mean = inside.sum() / count
    centered = torch.where(mask, inside - mean, 0.0)
    rate = torch.rsqrt(centered.square().sum() / (count - 1) + 1e-8)
    made = (values - mean) * rate
    return made if shift_mean else made + mean


def advantages(rewards, values, mask, gamma, lam, masked):
    """GAE by our op, or None where it does not fit: (advantages, returns), 0 where masked.

    Ours are targets without a graph.
    """
    if (
        not given(rewards, values, mask)
        or rewards.dim() != 2
        or not (mask.shape == rewards.shape == values.shape)
        or learns(rewards, values)
        or not (rewards.is_floating_point() and values.is_floating_point())
        or not numbers(gamma, lam)
        or not (0 <= gamma <= 1 and 0 <= lam <= 1)
    ):
        return None
    mask = flags(mask)
    if mask is None:
        return None
    with torch.no_grad():
        return gae(rewards, values, gamma=float(gamma), lam=float(lam), mask=mask, masked=masked)


def policy_loss(logp, old_logp, advantages, mask, *, reduction, normalizer, **clip):
    """(loss, statistics) of our clipped loss, or None where it does not fit."""
    mask = _rows_mask(logp, old_logp, advantages, mask)
    if mask is None or not numbers(*clip.values()):
        return None
    return ppo_loss(logp, old_logp, advantages, mask=mask, reduction=reduction, normalizer=normalizer, **clip)


def critic_loss(values, old_values, returns, mask, *, clip_value, reduction, normalizer):
    """(half the mean clipped square, statistics) by our op, or None where it does not fit."""
    mask = _rows_mask(values, old_values, returns, mask)
    if mask is None or not numbers(clip_value):
        return None
    return value_loss(
        values,
        old_values,
        returns,
        clip_value=clip_value,
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
    )


def _rows_mask(first, second, third, mask):
    """The boolean mask of [B, T] tensors of one shape of which the first alone learns, or None."""
    if (
        not given(first, second, third, mask)
        or first.dim() != 2
        or learns(second, third)
        or not all(tensor.is_floating_point() for tensor in (first, second, third))
    ):
        return None
    if not (first.shape == second.shape == third.shape == mask.shape):
        return None  # the library broadcasts
    return flags(mask)
