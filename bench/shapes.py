"""The shapes that the benches run, per device, and their data: one place, so that figures of different files
can be put side by side.

Random data only: zeros or equal rows flatter the arithmetic and the caches. BENCH_TINY=1 takes shapes that
end in milliseconds: they try the benches, they measure nothing. BENCH_QUICK=1 takes small ones that do
measure (`saferlhf-fast bench --quick`). "full" shapes run with every peer, the others with eager torch alone.
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
# rows B, tokens a row T
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
    # Half precision is what a GPU's kernels are compiled for; on a CPU float32 is what is compared best.
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
    """ "cpu" alone, or "cuda" alone where there is one: on such a machine the CPU's figures are not what is
    asked for.
    """
    return ["cuda"] if torch.cuda.is_available() else ["cpu"]


@lru_cache(maxsize=1)
def logits(shape, device):
    """(logits [N, V] inside a buffer with one row more, ids [N], upstream [N]); the upstream gradient is
    random, never ones.

    The row after the last is for peers that want logits [B, T + 1, V] of which they leave out the last.
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
    """(hidden [N, H], weight [V, H], ids [N], upstream [N]); the logits have a standard deviation of 2."""
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
    """A Batch whose ratios lie inside 1 +- 0.1 or beyond exp(+-0.4): rounding in the logits cannot flip a
    clip.
    """
    generator = torch.Generator(ids_N.device).manual_seed(1)
    inside, sign, far = (torch.rand(ids_N.shape, generator=generator, device=ids_N.device) for _ in range(3))
    step_N = torch.where(far < 0.2, torch.where(sign < 0.5, -0.45, 0.45), (inside - 0.5) * 0.19)
    advantage_N = torch.randn(ids_N.shape, generator=generator, device=ids_N.device)
    return Batch(ids_N, (logp_N + step_N).float(), advantage_N, rows)


def rows(shape, device):
    """(mask [B, T] with rows of random length, a function that makes one more [B, T] of random numbers)."""
    count, width = shape
    generator = torch.Generator(device).manual_seed(0)
    lengths = torch.randint(width // 2, width + 1, (count,), generator=generator, device=device)
    mask = torch.arange(width, device=device)[None] < lengths[:, None]
    return mask, lambda: torch.randn(count, width, generator=generator, device=device)


def name(shape):
    """A shape as it stands in the tables."""
    return "x".join(str(part).removeprefix("torch.") for part in shape)
