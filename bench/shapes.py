"""The shapes of the benches for each device, and their data.

They are in one place, so that figures of different files are comparable.
Data are random: zeros or equal rows would make arithmetic and caches look too good. BENCH_TINY=1 uses shapes
that take milliseconds, to test the benches without measuring anything. BENCH_QUICK=1 uses small shapes for a
real measurement (`saferlhf-fast bench --quick`). "full" shapes run with every peer, the others only with
eager torch.
"""

import os
from functools import lru_cache
from typing import NamedTuple

import torch

TINY = os.environ.get("BENCH_TINY") == "1"
QUICK = os.environ.get("BENCH_QUICK") == "1"
F32, BF16 = torch.float32, torch.bfloat16
# tokens N, vocabulary V, dtype of the logits
LOGITS = {
    "cpu": [(1024, 32_000, F32), (3072, 350, F32)],
    "cuda": [
        (8192, 151_936, BF16),
        (8192, 32_000, BF16),
        (8192, 128_256, BF16),
        (32_768, 32_000, BF16),
        (32_768, 128_256, BF16),
        (32_768, 151_936, BF16),
    ],
}
# tokens N, hidden H, vocabulary V, dtype
LINEAR = {
    "cpu": [(1024, 512, 32_000, F32)],
    "cuda": [(8192, 4096, 128_256, BF16), (8192, 4096, 32_000, BF16), (8192, 4096, 151_936, BF16)],
}
LINEAR_LOSS = {"cpu": [(4096, 512, 32_000, F32)], "cuda": LINEAR["cuda"]}
# rows B, tokens per row T
ROWS = {"cpu": [(16, 768), (96, 32)], "cuda": [(4096, 2048), (256, 1024)]}
FULL = {
    (1024, 32_000, F32),
    (8192, 151_936, BF16),
    (1024, 512, 32_000, F32),
    (4096, 512, 32_000, F32),
    (8192, 4096, 128_256, BF16),
    (16, 768),
    (4096, 2048),
    (256, 1024),
}
CLIP = 0.2

if QUICK:
    LOGITS = {"cpu": [(256, 8000, F32)], "cuda": [(2048, 32_000, BF16)]}
    LINEAR = LINEAR_LOSS = {"cpu": [(256, 256, 8000, F32)], "cuda": [(2048, 1024, 32_000, BF16)]}
    ROWS = {"cpu": [(16, 256)], "cuda": [(256, 512)]}
    FULL = {shape for table in (LOGITS, LINEAR, ROWS) for shape in (*table["cpu"], *table["cuda"])}
if TINY:
    # A GPU's kernels are compiled for half precision; on a CPU, float32 gives the best comparison.
    _KIND = getattr(torch, os.environ.get("BENCH_TINY_DTYPE", "float32"))
    LOGITS = {device: [(8, 515, _KIND)] for device in LOGITS}
    LINEAR = LINEAR_LOSS = {device: [(8, 64, 512, _KIND)] for device in LINEAR}
    ROWS = {device: [(4, 160)] for device in ROWS}
    FULL = {(8, 515, _KIND), (8, 64, 512, _KIND), (4, 160)}


class Batch(NamedTuple):
    """One micro-batch of `rows` packed sequences of equal length."""

    ids_N: torch.Tensor
    old_logp_N: torch.Tensor
    advantage_N: torch.Tensor
    rows: int

    @property
    def cu_seqlens(self):
        count = self.ids_N.shape[0]
        return torch.arange(0, count + 1, count // self.rows, dtype=torch.int32, device=self.ids_N.device)


def devices():
    """Returns only "cuda" if there is a GPU, otherwise only "cpu"."""
    return ["cuda"] if torch.cuda.is_available() else ["cpu"]


@lru_cache(maxsize=1)
def logits(shape, device):
    """Returns (logits [N, V] inside a buffer with one more row, ids [N], upstream [N]).

    The upstream gradient is random, never ones. The additional row is for peers that take logits [B, T + 1,
    V] and ignore the last row.
    """
    tokens, vocabulary, dtype = shape
    generator = torch.Generator(device).manual_seed(0)
    buffer = torch.empty(tokens + 1, vocabulary, device=device, dtype=dtype).normal_(
        std=2, generator=generator
    )
    return (
        buffer[:tokens],
        torch.randint(vocabulary, (tokens,), generator=generator, device=device),
        torch.randn(tokens, generator=generator, device=device),
    )


@lru_cache(maxsize=1)
def linear(shape, device):
    """Returns (hidden [N, H], weight [V, H], ids [N], upstream [N]).

    The logits have a standard deviation of 2.
    """
    tokens, width, vocabulary, dtype = shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator, device=device)

    return (
        random(tokens, width).to(dtype),
        (random(vocabulary, width) * 2 / width**0.5).to(dtype),
        torch.randint(vocabulary, (tokens,), generator=generator, device=device),
        random(tokens),
    )


def batch(ids_N, logp_N, rows=4):
    """Returns a Batch with ratios inside 1 +- 0.1 or beyond exp(+-0.4).

    So rounding in the logits cannot change which tokens are clipped.
    """
    generator = torch.Generator(ids_N.device).manual_seed(1)
    inside, sign, far = (torch.rand(ids_N.shape, generator=generator, device=ids_N.device) for _ in range(3))
    step_N = torch.where(far < 0.2, torch.where(sign < 0.5, -0.45, 0.45), (inside - 0.5) * 0.19)
    advantage_N = torch.randn(ids_N.shape, generator=generator, device=ids_N.device)
    return Batch(ids_N, (logp_N + step_N).float(), advantage_N, rows)


def rows(shape, device):
    """Returns (mask [B, T] with rows of random length, a function that returns a new random [B, T])."""
    count, width = shape
    generator = torch.Generator(device).manual_seed(0)
    lengths = torch.randint(width // 2, width + 1, (count,), generator=generator, device=device)
    mask = torch.arange(width, device=device)[None] < lengths[:, None]
    return mask, lambda: torch.randn(count, width, generator=generator, device=device)


def name(shape):
    """Returns a shape as the tables write it."""
    return "x".join(str(part).removeprefix("torch.") for part in shape)
