"""What the two losses share in Python: sums, statistics, and the gradient that only has to be scaled.

A loss is `inverse` times the sum over tokens of share * term (layout.shares). The gradient is made in the
forward pass without `inverse`, so that one launch can write it before the global count is known.
"""

from collections.abc import Sequence

import torch

from .layout import Layout

REDUCTIONS = ("sequence-mean", "token-mean")
KL_ESTIMATORS = ("k3", "k1")


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, in blocks.

    torch splits one long sum among threads, whose number would show in the last bits, but not many short
    ones.
    """
    length, block = value.shape[-1], 1024
    if length <= block:
        return value.sum(-1)
    if length % block:
        value = torch.nn.functional.pad(value, (0, -length % block))
    return total(value.unflatten(-1, (-1, block)).sum(-1))


def statistics(rows: Layout, dtype: torch.dtype, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """The means of K quantities over valid tokens, then the counts of sequences and of tokens: [..., K + 2].

    Args:
        rows: Where the tokens are.
        dtype: Of the result.
        tokens: K tensors [..., N], 0 where masked.
    """
    count = rows.count_B.sum().to(dtype)
    means = [total(value.to(dtype)) / count.clamp(min=1) for value in tokens]
    counts = [(rows.count_B > 0).sum().to(dtype).expand(means[0].shape), count.expand(means[0].shape)]
    return torch.stack([*means, *counts], dim=-1)


def scaled(
    gradient: torch.Tensor, inverse: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of the forward pass times `inverse` and the upstream gradient, rounded once.

    Args:
        gradient: Of any shape, without the factor `inverse`.
        inverse: 0-d, as `layout.shares` returns it.
        upstream: Upstream gradient of the loss, of a shape that broadcasts with that of `gradient`.
        dtype: That of the result.
    """
    return (gradient * (inverse * upstream)).to(dtype)
