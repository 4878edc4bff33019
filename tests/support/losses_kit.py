"""What the tests of the two losses share: places with their dtypes, odd memory layouts, poisoned outputs,
threads.
"""

from contextlib import contextmanager

import naive
import pytest
import torch

LAYOUTS = ("plain", "offset", "every second", "reversed axes")


def exact(impl):
    """The finest dtype of an implementation: Triton has no float64 (the dispatcher refuses it)."""
    return torch.float32 if impl == "triton" else torch.float64


def typed(*dtypes):
    """naive.PLACES times the dtypes that each of them takes."""
    return [
        pytest.param(*place.values, dtype, id=f"{place.id}-{dtype}".replace("torch.", ""), marks=place.marks)
        for place in naive.PLACES
        for dtype in dtypes
        if not (place.values[0] == "triton" and dtype == torch.float64)
    ]


def laid_out(tensor, layout):
    """The same numbers in memory that is not contiguous from its beginning; what lies between them is NaN."""

    def nan(*shape):
        return torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)

    if layout == "plain":
        return tensor.clone()
    if layout == "offset":
        view = nan(tensor.numel() + 3)[3:].view(tensor.shape)
    elif layout == "every second":
        view = nan(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)[..., 1::2]
    else:
        view = nan(*reversed(tensor.shape)).permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


@contextmanager
def nan_memory():
    """New memory is NaN: an output that is not written shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def with_threads(call):
    """What `call` gives with 1 thread and with 2."""
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results
