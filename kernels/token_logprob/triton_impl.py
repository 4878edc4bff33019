"""Log-prob and entropy of given tokens in Triton: each logit is read once, and once more for backward.

Forward is one program per row. A thread keeps its own running maximum and sums over the logits that it loads,
16 bytes at a time, so that threads meet only at the end of a row and a logit costs one exp2. z is a logit in
units of log2(e) / temperature. The target's own term stays out of the sums: a confident token loses no digit
to a subtraction. A row's bits depend on its values, its id, V and whether rows begin at multiples of 16
bytes; on no other row.
"""

import torch
import triton
import triton.language as tl

from ..functions_triton import log1p, one_minus_p, tanh
from ..tiles_triton import INTEGERS, depth, tiling, unit_rows, unit_target, width

# (widest vocabulary, warps); chosen by registers and occupancy, not tuned on a device
WARPS = ((1 << 31, 8),)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e30)  # a z that is lower counts as -inf
# represents a lower exponent where it is multiplied by 2^-inf or e^-inf, which is 0
LOWEST = tl.constexpr(-300.0)


@triton.jit
def finite(x):
    """The number, but not below LOWEST. Where x is NaN, what it is multiplied by must be NaN too."""
    return tl.maximum(x, LOWEST)


@triton.jit
def columns(R: tl.constexpr, T: tl.constexpr, W: tl.constexpr):
    """Columns of a tile [R, T, W] and the first of each W."""
    first = (tl.arange(0, R)[:, None, None] * T + tl.arange(0, T)[None, :, None]) * W
    return first + tl.arange(0, W)[None, None, :], first


@triton.jit
def tile(row_V, at, first, vocabulary, softcap, CAPPED: tl.constexpr):
    """Logits of the columns `at` in float32, capped; -inf past the end."""
    x = tl.load(row_V + at, mask=first < vocabulary, other=float("-inf")).to(tl.float32)
    if CAPPED:
        x = tl.where(first < vocabulary, softcap * tanh(x / softcap), float("-inf"))
    return x


@triton.jit
def fold(x, scale, base, total, weighted, ENTROPY: tl.constexpr):
    """Adds a tile [R, T, W] to the sums of its T threads, which are those of row_statistics."""
    new = tl.maximum(base, tl.max(tl.max(x, 2), 0) * scale)
    down = base - new
    shrink = tl.exp2(down)
    t = x * scale - new[None, :, None]
    e = tl.exp2(t)
    if ENTROPY:
        weighted = shrink * (weighted + down * total) + tl.sum(tl.sum(e * finite(t), 2), 0)
    return new, shrink * total + tl.sum(tl.sum(e, 2), 0), weighted


@triton.jit
def row_statistics(
    row_V,
    id,
    vocabulary,
    scale,
    softcap,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
):
    """(base, others, weighted) of a row without the column `id`.

    base: the highest z, FLOOR where there is none. others: the sum of 2^(z - base). weighted: the sum of
    2^(z - base) * (z - base).
    """
    at, first = columns(R, T, W)
    base = tl.full([T], FLOOR, tl.float32)
    total = tl.zeros([T], tl.float32)
    weighted = tl.zeros([T], tl.float32)
    # The tile of `id` is the last one taken, so that the others need not look for it.
    tiles = tl.cdiv(vocabulary, R * T * W)
    last = tl.minimum(tl.maximum(id, 0), vocabulary - 1).to(tl.int32) // (R * T * W)
    start = tl.where((last == 0) & (tiles > 1), R * T * W, 0)
    x = tile(row_V, start + at, start + first, vocabulary, softcap, CAPPED)
    for i in range(1, tiles):
        # The next tile is on its way while this one is worked on.
        start = tl.where(i == tiles - 1, last, i + (i >= last).to(tl.int32)) * (R * T * W)
        following = tile(row_V, start + at, start + first, vocabulary, softcap, CAPPED)
        base, total, weighted = fold(x, scale, base, total, weighted, ENTROPY)
        x = following
    x = tl.where(last * (R * T * W) + at == id, float("-inf"), x)
    base, total, weighted = fold(x, scale, base, total, weighted, ENTROPY)
    top = tl.max(base, 0)
    down = base - top
    shrink = tl.exp2(down)
    return top, tl.sum(shrink * total, 0), tl.sum(shrink * (weighted + down * total), 0)


@triton.jit
def finish(base, others, weighted, target):
    """(logp, entropy, lse, highest, total) from row_statistics and the target's z.

    The first three are in nats. highest: the highest z of all. total: the sum of 2^(z - highest) over all.
    """
    gap = (base - target + tl.log2(others)) * LN2
    logp = 0.0 - (tl.where(gap < 0, 0.0, gap) + log1p(tl.exp(-tl.abs(gap))))
    # No logit above FLOOR, or an infinite one: there is no distribution.
    logp = tl.where((base <= FLOOR) & (target <= FLOOR) | (target == float("inf")), float("nan"), logp)
    highest = tl.maximum(base, target)
    down, target_down = base - highest, target - highest
    without_target = others * tl.exp2(down)
    total = without_target + tl.exp2(target_down)
    # Where the target is highest its term is 1 and the others' sum may be tiny.
    log_total = tl.where(target >= base, log1p(without_target), tl.log(total))
    entropy = (
        log_total
        - LN2
        * ((weighted + down * others) * tl.exp2(down) + tl.exp2(target_down) * finite(target_down))
        / total
    )
    return logp, tl.where(entropy < 0, 0.0, entropy), highest * LN2 + log_total, highest, total


@triton.jit
def row_head(
    row_V, ids_N, temperature_N, row, vocabulary, temperature, per_row, softcap, CAPPED: tl.constexpr
):
    """(id, whether it is in the vocabulary, log2(e) / temperature, the target's z or -inf) of a row.

    Where per_row is 0 temperature_N is not read, and `temperature` is that of all rows.
    """
    id = tl.load(ids_N + row)
    known = (id >= 0) & (id < vocabulary)
    scale = LOG2E / tl.load(temperature_N + row, mask=per_row != 0, other=temperature)
    return (
        id,
        known,
        scale,
        tile(row_V, id, tl.where(known, 0, vocabulary), vocabulary, softcap, CAPPED) * scale,
    )


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    logp_N,
    entropy_N,
    lse_N,
    logits_NV,
    ids_N,
    temperature_N,
    logits_stride,
    vocabulary,
    temperature,
    per_row,
    softcap,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    T: tl.constexpr,
):
    """A row of logits is read once; one program per row."""
    W: tl.constexpr = width(logits_NV.dtype.element_ty.primitive_bitwidth, ALIGNED)
    R: tl.constexpr = depth(W, CAPPED)
    row = tl.program_id(0).to(tl.int64)
    row_V = logits_NV + row * logits_stride * W
    id, known, scale, target = row_head(
        row_V, ids_N, temperature_N, row, vocabulary, temperature, per_row, softcap, CAPPED
    )
    base, others, weighted = row_statistics(row_V, id, vocabulary, scale, softcap, ENTROPY, CAPPED, R, T, W)
    logp, entropy, lse, _, _ = finish(base, others, weighted, target)
    tl.store(logp_N + row, tl.where(known, logp, float("nan")))
    tl.store(lse_N + row, lse)
    if ENTROPY:
        tl.store(entropy_N + row, entropy)


@triton.jit
def gradient(x, scale, shift, plain, slope, softcap, CAPPED: tl.constexpr):
    """The gradient of all logits of a row but the target's, from the capped logits x.

    With t = x * scale - shift it is 2^t * (plain + slope * t), through the softcap.
    """
    t = x * scale - shift
    d = tl.exp2(t) * (plain + slope * finite(t))
    return through(d, x, softcap) if CAPPED else d


@triton.jit
def through(d, x, softcap):
    """The derivative by a logit, from the derivative by the capped logit x."""
    u = x / softcap
    return d * (1 - u * u)


@triton.jit
def store_target(out, x, owned, logp, entropy, grad, grad_entropy, softcap, CAPPED: tl.constexpr):
    """Where `owned`, writes the target's gradient over what the tiles have left there.

    It comes from the log-prob itself, since 1 - p would lose every digit at p near 1. x: its capped logit.
    """
    d = grad * one_minus_p(logp) - grad_entropy * tl.exp(logp) * (finite(logp) + entropy)
    if CAPPED:
        d = through(d, x, softcap)
    tl.debug_barrier()
    tl.store(out, d.to(out.dtype.element_ty), mask=owned)


@triton.jit(do_not_specialize=INTEGERS)
def backward_kernel(
    out_NV,
    logits_NV,
    ids_N,
    logp_N,
    entropy_N,
    lse_N,
    grad_logp_N,
    grad_entropy_N,
    temperature_N,
    out_stride,
    logits_stride,
    vocabulary,
    parts,
    tiles,
    temperature,
    per_row,
    softcap,
    has_logp,
    has_entropy,
    CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    T: tl.constexpr,
):
    """The gradient of `tiles` tiles of a row; `parts` programs share a row."""
    W: tl.constexpr = width(logits_NV.dtype.element_ty.primitive_bitwidth, ALIGNED)
    R: tl.constexpr = depth(W, CAPPED)
    row = (tl.program_id(0) // parts).to(tl.int64)
    begin = (tl.program_id(0) % parts) * tiles
    row_V, out_V = logits_NV + row * logits_stride * W, out_NV + row * out_stride * W
    id, known, scale, target = row_head(
        row_V, ids_N, temperature_N, row, vocabulary, temperature, per_row, softcap, CAPPED
    )
    logp, shift, inverse = tl.load(logp_N + row), tl.load(lse_N + row) * LOG2E, scale * LN2
    grad = tl.load(grad_logp_N + row, mask=has_logp != 0, other=0.0).to(tl.float32) * inverse
    grad_entropy = tl.load(grad_entropy_N + row, mask=has_entropy != 0, other=0.0).to(tl.float32) * inverse
    entropy = tl.load(entropy_N + row, mask=has_entropy != 0, other=0.0)
    # An id outside the vocabulary has made logp NaN, and its whole row must say so.
    plain = tl.where(logp != logp, logp, -grad - grad_entropy * entropy)
    at, first = columns(R, T, W)
    for i in range(begin, begin + tiles):
        start = i * (R * T * W)
        x = tile(row_V, start + at, start + first, vocabulary, softcap, CAPPED)
        if out_NV.dtype != logits_NV.dtype:
            # Narrower elements over the same memory: every thread has read before one writes, and tiles go
            # upwards.
            tl.debug_barrier()
        d = gradient(x, scale, shift, plain, -grad_entropy * LN2, softcap, CAPPED)
        tl.store(out_V + start + at, d.to(out_NV.dtype.element_ty), mask=start + first < vocabulary)
    owned = known & (id // (R * T * W) >= begin) & (id // (R * T * W) < begin + tiles)
    store_target(out_V + id, target / scale, owned, logp, entropy, grad, grad_entropy, softcap, CAPPED)


def token_logprob(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference; float32, bfloat16 or float16 in, float32 out."""
    count, vocabulary = logits_NV.shape
    logits_NV, ids_N = unit_rows(logits_NV), ids_N.contiguous()
    logp_N, lse_N = (logits_NV.new_empty(count, dtype=torch.float32) for _ in range(2))
    entropy_N = logits_NV.new_empty(count if entropy else 0, dtype=torch.float32)
    if count:
        launch, w, _ = tiling(WARPS, softcap > 0, logits_NV, logits_NV)
        with torch.cuda.device(logits_NV.get_device()):
            forward_kernel[(count,)](
                logp_N,
                entropy_N,
                lse_N,
                logits_NV,
                ids_N,
                logp_N if temperature_N is None else temperature_N.contiguous(),
                logits_NV.stride(0) // w,
                vocabulary,
                float(temperature),
                int(temperature_N is not None),
                float(softcap),
                ENTROPY=entropy,
                **launch,
            )
    return logp_N, entropy_N, lse_N


def token_logprob_backward(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    logp_N: torch.Tensor,
    entropy_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_logp_N: torch.Tensor | None,
    grad_entropy_N: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    out_NV: torch.Tensor,
) -> torch.Tensor:
    """See the reference."""
    count, vocabulary = logits_NV.shape
    if count == 0 or vocabulary == 0:
        return out_NV
    target_NV = unit_target(out_NV)
    logits_NV, ids_N = unit_rows(logits_NV), ids_N.contiguous()
    launch, w, tiles = tiling(WARPS, softcap > 0, target_NV, logits_NV)
    # Over its own logits in a narrower type a program takes a whole row, else each tile has its own program.
    alone = target_NV.data_ptr() == logits_NV.data_ptr() and target_NV.dtype != logits_NV.dtype
    parts = 1 if alone else tiles
    has_logp, has_entropy, per_row = (
        int(tensor is not None) for tensor in (grad_logp_N, grad_entropy_N, temperature_N)
    )
    vectors = [
        logp_N if tensor is None else tensor.contiguous()
        for tensor in (grad_logp_N, grad_entropy_N, temperature_N)
    ]
    with torch.cuda.device(logits_NV.get_device()):
        backward_kernel[(count * parts,)](
            target_NV,
            logits_NV,
            ids_N,
            logp_N,
            entropy_N,
            lse_N,
            *vectors,
            target_NV.stride(0) // w,
            logits_NV.stride(0) // w,
            vocabulary,
            parts,
            tiles // parts,
            float(temperature),
            per_row,
            float(softcap),
            has_logp,
            has_entropy,
            **launch,
        )
    if target_NV is not out_NV:
        out_NV.copy_(target_NV)
    return out_NV
