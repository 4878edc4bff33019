"""Kernels that may be faster than the present ones, as changes of their sources.

Each change is a list of lines to replace, and raises an error if the source no longer has them. The variants
are measured next to the present kernels, under the names below; if one is faster, it replaces the present
one.

A changed source is imported under its own name inside its room, so that its relative imports work; Triton
reads the file from which it came.
"""

import atexit
import importlib.util
import shutil
import sys
import tempfile
from functools import lru_cache, partial
from pathlib import Path

import peers
import shapes

import saferlhf_fast

KERNELS = "saferlhf_fast.kernels"
ROWS, POLICY = "token_logprob", "ppo_loss_from_logits"
CHUNKS = (2, 4) if shapes.TINY else (2048, 4096, 8192)
COLUMNS = "    first = (tl.arange(0, R)[:, None, None] * T + tl.arange(0, T)[None, :, None]) * W"
LOAD = 'x = tl.load(row_V + at, mask=first < vocabulary, other=float("-inf")).to(tl.float32)'
# A tile as [T, R, W]: Triton then assigns the 32 threads of a warp to T alone, and a reduction over R needs
# no exchange between them.
AXES = (
    (COLUMNS, "    first = (tl.arange(0, R)[None, :, None] * T + tl.arange(0, T)[:, None, None]) * W"),
    ("tl.max(tl.max(x, 2), 0) * scale", "tl.max(tl.max(x, 2), 1) * scale"),
    ("t = x * scale - new[None, :, None]", "t = x * scale - new[:, None, None]"),
    (
        "weighted = shrink * (weighted + down * total) + tl.sum(tl.sum(e * finite(t), 2), 0)",
        "weighted = shrink * (weighted + down * total) + tl.sum(tl.sum(e * finite(t), 2), 1)",
    ),
    (
        "shrink * total + tl.sum(tl.sum(e, 2), 0), weighted",
        "shrink * total + tl.sum(tl.sum(e, 2), 1), weighted",
    ),
)
ZEROS = (("tl.zeros([R, T, W], out_NV", "tl.zeros([T, R, W], out_NV"),)
# The first read of a row asks the L2 cache to keep it, the second one to evict it.
KEEP = ((LOAD, LOAD.replace("other=float", 'eviction_policy="evict_last", other=float')),)
SECOND = (
    (
        "x = tile(row_V, start + at, start + first, vocabulary, softcap, CAPPED)\n        for i in range(1, "
        "tiles + 1):",
        "x = tile_once(row_V, start + at, start + first, vocabulary, softcap, CAPPED)\n        for i in "
        "range(1, tiles + 1):",
    ),
    ("            following = tile(row_V", "            following = tile_once(row_V"),
)
ONCE = """


@triton.jit
def tile_once(row_V, at, first, vocabulary, softcap, CAPPED: tl.constexpr):
    x = tl.load(row_V + at, mask=first < vocabulary, eviction_policy="evict_first", other=float("-inf"))
    x = x.to(tl.float32)
    if CAPPED:
        x = tl.where(first < vocabulary, softcap * tanh(x / softcap), float("-inf"))
    return x
"""


@lru_cache(maxsize=1)
def _folder():
    """Returns the folder of the changed sources, which exists until the process ends.

    Triton reads a kernel's source from its file.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def changed(room, name, *replacements, more=""):
    """Returns the room's triton_impl with each (old, new) replaced, as a separate module.

    It raises ValueError if an old text is missing.
    """
    full = f"{KERNELS}.{room}.triton_impl_{name}"
    if full in sys.modules:
        return sys.modules[full]
    source = Path(importlib.util.find_spec(f"{KERNELS}.{room}.triton_impl").origin).read_text()
    for old, new in replacements:
        if source.count(old) != 1:
            raise ValueError(
                f"{room}, {name}: expected once in triton_impl.py, got {source.count(old)} times: {old}"
            )
        source = source.replace(old, new)
    path = _folder() / f"{room}_{name}.py"
    path.write_text(source + more)
    spec = importlib.util.spec_from_file_location(full, path)
    module = sys.modules[full] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def axes():
    """Returns (token_logprob, ppo_loss_from_logits) with the threads first in a tile."""
    rows = changed(ROWS, "axes", *AXES)
    return rows, changed(
        POLICY, "axes", ("..token_logprob.triton_impl import", f"..{ROWS}.triton_impl_axes import"), *ZEROS
    )


def eviction():
    """Returns ppo_loss_from_logits with hints to the L2 cache."""
    changed(ROWS, "hints", *KEEP, more=ONCE)
    return changed(
        POLICY,
        "hints",
        ("..token_logprob.triton_impl import (\n", f"..{ROWS}.triton_impl_hints import (\n    tile_once,\n"),
        *SECOND,
    )


def more_warps(warps):
    """Returns token_logprob with `warps` warps per row."""
    return changed(ROWS, f"warps{warps}", ("WARPS = ((1 << 31, 8),)", f"WARPS = ((1 << 31, {warps}),)"))


def entropy(module):
    """Returns a call of a changed token_logprob for the benches: (logits, ids) gives (logp, entropy)."""
    return lambda logits, ids: module.token_logprob(logits, ids, 1.0, None, 0.0, True)[:2]


def policy_rows(module):
    """Returns a call of a changed ppo_loss_from_logits in place: the kernel alone, with given weights."""
    objective = (shapes.CLIP, shapes.CLIP, float("inf"), 0.0, False, 0.0, 1.0, None, 0.0)
    return lambda logits, ids, old, advantage, weight: module.ppo_loss_from_logits(
        logits, ids, old, advantage, None, weight, *objective, logits
    )


def chunked_logprob(hidden, weight, ids):
    """Runs linear_logprob forward with chunks of logits in memory, as it runs when a gradient is needed."""
    from saferlhf_fast.kernels.linear_logprob import triton_impl

    return triton_impl.linear_logprob(hidden, weight, ids, None, 1.0, None, 0.0, False, None, True)[0]


def in_chunks(tokens):
    """Returns linear_ppo_loss with chunks of `tokens` tokens."""

    def call(hidden, weight, batch):
        return saferlhf_fast.linear_ppo_loss(
            hidden,
            weight,
            batch.ids_N,
            batch.old_logp_N,
            batch.advantage_N,
            clip_ratio=shapes.CLIP,
            cu_seqlens=batch.cu_seqlens,
            chunk_tokens=tokens,
            impl="triton",
        )[0]

    return call


def register():
    """Registers the variants as versions of the benches, under the names that the sections use."""
    cuda = ("cpu", "cuda")  # a rehearsal's tensors are on the CPU
    peers.peer("logprob_entropy", "triton, threads first", "torch", cuda)(lambda: entropy(axes()[0]))
    for warps in (4, 16):
        peers.peer("logprob_entropy", f"triton, {warps} warps", "torch", cuda)(
            partial(lambda w: entropy(more_warps(w)), warps)
        )
    peers.peer("linear_logprob", "triton, chunks", "torch", cuda, forward_only=True)(lambda: chunked_logprob)
    for tokens in CHUNKS:
        peers.peer("linear_ppo", f"triton, chunks of {tokens}", "torch", cuda)(partial(in_chunks, tokens))
