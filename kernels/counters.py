"""A counter in device memory for kernels whose last program adds up the partial sums of all programs.

That takes one launch instead of two. Every program adds 1 when its partial sums are written. The one that
finds all others finished reads them in index order (so the sum has the same bits whichever comes last) and
sets the counter back to 0 for the next launch. Launches of one stream run one after another, so one counter
per device and stream is enough; it also holds when launches are captured in a graph.
"""

from functools import cache

import torch


@cache
def _counter(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def counter(device: torch.device) -> torch.Tensor:
    """int32 [1], 0 between launches, for the current stream of `device`."""
    return _counter(device, torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0)
