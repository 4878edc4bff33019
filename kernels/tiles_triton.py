"""How rows of logits are cut into tiles: what a launch decides, and what its kernel has to know of it.

A tile is [R, T, W]: T threads, each of which loads R times W logits that are neighbours.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton

# Arguments whose value must not choose another kernel: a launch says what it knows of alignment in ALIGNED or
# W.
INTEGERS = [
    "logits_stride",
    "out_stride",
    "vocabulary",
    "parts",
    "tiles",
    "upwards",
    "per_row",
    "has_logp",
    "has_entropy",
    "has_ref",
    "k1",
    "count",
    "splits",
    "width",
    "hidden_stride",
    "weight_stride",
]


@triton.constexpr_function
def width(bits: int, aligned: bool) -> int:
    """W, how many logits of so many bits a thread loads at once: 16 bytes of them, or one if not aligned."""
    return 128 // bits if aligned else 1


@triton.constexpr_function
def depth(w: int, capped: bool) -> int:
    """R, how often a thread loads; less often where a softcap needs registers of its own."""
    return 16 // w if w > 1 and not capped else 8 // w


def unit_rows(tensor_NV: torch.Tensor) -> torch.Tensor:
    """The matrix itself if the elements of a row are neighbours in memory, else a contiguous copy."""
    return tensor_NV if tensor_NV.stride(1) == 1 else tensor_NV.contiguous()


def unit_target(out_NV: torch.Tensor) -> torch.Tensor:
    """The matrix itself if the elements of a row are neighbours in memory, else a new one of its shape."""
    return (
        out_NV if out_NV.stride(1) == 1 else torch.empty_like(out_NV, memory_format=torch.contiguous_format)
    )


def tiling(
    table: Sequence[tuple[int, int]], capped: bool, out_NV: torch.Tensor, logits_NV: torch.Tensor
) -> tuple[dict[str, Any], int, int]:
    """How a launch cuts its rows into tiles.

    Args:
        table: (widest vocabulary, warps of a program), in rising order.
        capped: Whether there is a softcap.
        out_NV: What is written, with rows of neighbouring elements.
        logits_NV: What is read, the same. Rows are aligned if they begin and end at 16 bytes in both.

    Returns:
        (options of the launch, W, tiles of a row).
    """
    vocabulary, bits = logits_NV.shape[1], 8 * logits_NV.element_size()
    w = width(bits, True)
    aligned = vocabulary % w == 0 and all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) % w == 0 for tensor in (out_NV, logits_NV)
    )
    launch = options(next(warps for limit, warps in table if vocabulary <= limit), capped, aligned)
    w = width(bits, aligned)
    return launch, w, triton.cdiv(vocabulary, depth(w, capped) * launch["T"] * w)


def options(warps: int, capped: bool, aligned: bool) -> dict[str, Any]:
    """Options of a launch whose programs have so many warps.

    ptxas aims at 32 or 40 registers a thread and misses by a few where a thread has more to hold: there it
    may use 64.
    """
    return dict(
        ALIGNED=aligned,
        T=32 * warps,
        CAPPED=capped,
        num_warps=warps,
        maxnreg=None if aligned and not capped else 64,
    )
