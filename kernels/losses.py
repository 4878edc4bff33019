"""What the two losses share in Python: the reduction over rows, the statistics, the gradient that only has to be scaled.

A loss is `inverse` times the sum over tokens of share * term. The gradient is made in the forward pass without `inverse`, so
that one launch can write it before the global count is known. Shapes: N flat positions of all rows, B rows, C critics.
"""

import torch

from .layout import per_token

REDUCTIONS = ("sequence-mean", "token-mean")


def shares(rows, token_mean, normalizer, dtype):
    """(share_N, inverse): sequence-mean shares are 1 / the tokens of the row, token-mean shares 1; 0 where masked.

    inverse: 1 / `normalizer` (0-d), or 1 / this call's count of rows with a token (of tokens); 0 where there is none.
    """
    share_N = rows.valid_N.to(dtype)
    if not token_mean:
        share_N = share_N / per_token(rows.count_B.clamp(min=1).to(dtype), rows)
    if normalizer is None:
        normalizer = (rows.count_B.sum() if token_mean else (rows.count_B > 0).sum()).to(dtype)
    return share_N, torch.where(normalizer > 0, 1 / normalizer, 0)


def statistics(rows, dtype, tokens):
    """The means over valid tokens of each of `tokens` ([..., N], 0 where masked), then sequences and tokens: [..., K + 2]."""
    count = rows.count_B.sum().to(dtype)
    means = [value.sum(-1).to(dtype) / count.clamp(min=1) for value in tokens]
    counts = [(rows.count_B > 0).sum().to(dtype).expand(means[0].shape), count.expand(means[0].shape)]
    return torch.stack([*means, *counts], dim=-1)


def scaled(gradient, inverse, upstream, dtype):
    """The gradient of the forward pass times 1/Z and the upstream gradient, in float32, then in the input's dtype."""
    return (gradient * (inverse * upstream)).to(dtype)
