"""What the two losses share in Python: sums, statistics, and the gradient that only has to be scaled.

A loss is `inverse` times the sum over tokens of share * term (layout.shares). The gradient is made in the
forward pass without `inverse`, so that one launch can write it before the global count is known.
"""

import torch

REDUCTIONS = ("sequence-mean", "token-mean")
KL_ESTIMATORS = ("k3", "k1")


def total(value):
    """The sum over the last dimension in blocks: torch shares out one long sum among threads, whose number
    would show in the last bits, but not many short ones.
    """
    length, block = value.shape[-1], 1024
    if length <= block:
        return value.sum(-1)
    if length % block:
        value = torch.nn.functional.pad(value, (0, -length % block))
    return total(value.unflatten(-1, (-1, block)).sum(-1))


def statistics(rows, dtype, tokens):
    """The means over valid tokens of each of `tokens` ([..., N], 0 where masked), then sequences and tokens:

    [..., K + 2].
    """
    count = rows.count_B.sum().to(dtype)
    means = [total(value.to(dtype)) / count.clamp(min=1) for value in tokens]
    counts = [(rows.count_B > 0).sum().to(dtype).expand(means[0].shape), count.expand(means[0].shape)]
    return torch.stack([*means, *counts], dim=-1)


def scaled(gradient, inverse, upstream, dtype):
    """The gradient of the forward pass times 1/Z and the upstream gradient, in float32, then in the input's
    dtype.
    """
    return (gradient * (inverse * upstream)).to(dtype)
