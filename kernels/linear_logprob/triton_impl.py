"""linear_logprob in Triton: without a gradient, logits never reach memory.

Without a gradient there is one kernel that makes sums over parts of the vocabulary, and one that merges them.
A program makes the logits of a block of tokens for SPLIT columns of the vocabulary, tile by tile, and folds
each tile from its accumulators into running sums, as token_logprob does with logits that it loads. The sums
of a token's splits are merged by a second kernel, in one fixed order. Tiles and splits depend on dtype,
alignment and GPU alone: a token's bits do not depend on other tokens or their number. With a gradient
it is torch's matrix products in chunks around the kernels of token_logprob, whose log-probs may differ from
the fused kernel's in the last bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import linear
from ..dispatch import interpreted
from ..functions_triton import tanh
from ..tiles_triton import INTEGERS, unit_rows
from ..token_logprob import triton_impl as rows
from ..token_logprob.triton_impl import FLOOR, LOG2E, finish, finite

SPLIT = 1024  # columns of a program
# blocks of tokens that read the same tiles of the vocabulary at one time, so that these are in the L2 cache
GROUP = 16
# Tiles: tokens x columns x hidden, by major compute capability; None: any other GPU. Not tuned on a device.
CONFIGS = {
    9: dict(N=128, V=256, H=64, num_warps=8, num_stages=4),
    10: dict(N=128, V=128, H=64, num_warps=8, num_stages=4),
    None: dict(N=128, V=128, H=64, num_warps=8, num_stages=3),
}
# sums of products in float32, without tensor cores
FLOAT32 = dict(N=64, V=64, H=32, num_warps=4, num_stages=2)
# half precision, rows that do not begin at 16 bytes
UNALIGNED = dict(N=64, V=64, H=32, num_warps=4, num_stages=2)
DESCRIPTORS = (9, 10)  # where aligned tiles of half precision are brought by the tensor memory accelerator


@triton.jit
def tile_logits(
    hidden,
    weight,
    n,
    v,
    first_n,
    first_v,
    width,
    hidden_stride,
    weight_stride,
    DESCRIBED: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
):
    """[N, V] in float32: hidden @ weight.T of the tokens n (first_n on) and the columns v (first_v on)."""
    width *= W
    logits = tl.zeros([N, V], tl.float32)
    if DESCRIBED:
        for h in range(0, width, H):
            logits = tl.dot(hidden.load([first_n.to(tl.int32), h]), weight.load([first_v, h]).T, logits)
    else:
        at_h = tl.arange(0, H)
        hidden_NH = hidden + n[:, None] * hidden_stride * W + at_h[None, :]
        weight_HV = weight + v.to(tl.int64)[None, :] * weight_stride * W + at_h[:, None]
        for h in range(0, width, H):
            a = tl.load(hidden_NH + h, mask=(h + at_h < width)[None, :], other=0.0)
            b = tl.load(weight_HV + h, mask=(h + at_h < width)[:, None], other=0.0)
            logits = tl.dot(a, b, logits, input_precision="ieee")
    return logits


@triton.jit(do_not_specialize=INTEGERS)
def fused_kernel(
    base_NS,
    others_NS,
    weighted_NS,
    target_NS,
    hidden,
    weight,
    bias_V,
    ids_N,
    temperature_N,
    hidden_stride,
    weight_stride,
    count,
    vocabulary,
    width,
    splits,
    temperature,
    per_row,
    softcap,
    CAPPED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The sums of N tokens over SPLIT columns of the vocabulary: those of token_logprob's row_statistics."""
    # Programs that run at the same time: GROUP blocks of tokens times neighbouring splits.
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(count, N)
    group = program // (GROUP * splits)
    members = tl.minimum(blocks - group * GROUP, GROUP)
    program -= group * GROUP * splits
    first_n, split = (group * GROUP + program % members) * N, (program // members).to(tl.int32)
    n = first_n + tl.arange(0, N)
    inside_n = n < count
    row_n = tl.minimum(n, count - 1)
    scale_n = LOG2E / tl.load(temperature_N + row_n, mask=inside_n & (per_row != 0), other=temperature)
    id_n = tl.load(ids_N + row_n)
    id_n = tl.where((id_n >= 0) & (id_n < vocabulary), id_n, -1).to(tl.int32)
    base_n = tl.full([N], FLOOR, tl.float32)
    total_n = tl.zeros([N], tl.float32)
    weighted_n = tl.zeros([N], tl.float32)
    target_n = tl.zeros([N], tl.float32)
    for first_v in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocabulary), V):
        v = first_v + tl.arange(0, V)
        x = tile_logits(
            hidden,
            weight,
            row_n,
            tl.minimum(v, vocabulary - 1),
            first_n,
            first_v,
            width,
            hidden_stride,
            weight_stride,
            DESCRIBED,
            W,
            N,
            V,
            H,
        )
        if bias_V is not None:
            x += tl.load(bias_V + v, mask=v < vocabulary, other=0.0).to(tl.float32)[None, :]
        if CAPPED:
            x = softcap * tanh(x / softcap)
        is_target = v[None, :] == id_n[:, None]
        target_n += tl.sum(tl.where(is_target, x, 0.0), 1)
        x = tl.where(is_target | (v >= vocabulary)[None, :], float("-inf"), x)
        new_n = tl.maximum(base_n, tl.max(x, 1) * scale_n)
        down_n = base_n - new_n
        t = x * scale_n[:, None] - new_n[:, None]
        e = tl.exp2(t)
        shrink_n = tl.exp2(down_n)
        weighted_n = shrink_n * (weighted_n + down_n * total_n) + tl.sum(e * finite(t), 1)
        total_n = shrink_n * total_n + tl.sum(e, 1)
        base_n = new_n
    at = n * splits + split
    tl.store(base_NS + at, base_n, mask=inside_n)
    tl.store(others_NS + at, total_n, mask=inside_n)
    tl.store(weighted_NS + at, weighted_n, mask=inside_n)
    tl.store(target_NS + at, target_n * scale_n, mask=inside_n)


@triton.jit(do_not_specialize=INTEGERS)
def merge_kernel(
    logp_N,
    entropy_N,
    lse_N,
    base_NS,
    others_NS,
    weighted_NS,
    target_NS,
    ids_N,
    vocabulary,
    splits,
    SPLIT: tl.constexpr,
    S: tl.constexpr,
):
    """Merges the sums of all splits of a token in one order; one program per token."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, S)
    at = row * splits + s
    base_S = tl.load(base_NS + at, mask=s < splits, other=FLOOR)
    others_S = tl.load(others_NS + at, mask=s < splits, other=0.0)
    weighted_S = tl.load(weighted_NS + at, mask=s < splits, other=0.0)
    id = tl.load(ids_N + row)
    known = (id >= 0) & (id < vocabulary)
    base = tl.max(base_S, 0)
    down_S = base_S - base
    shrink_S = tl.exp2(down_S)
    others = tl.sum(shrink_S * others_S, 0)
    weighted = tl.sum(shrink_S * (weighted_S + down_S * others_S), 0)
    target = tl.load(
        target_NS + row * splits + tl.where(known, id, 0) // SPLIT, mask=known, other=float("-inf")
    )
    logp, entropy, lse, _, _ = finish(base, others, weighted, target)
    tl.store(logp_N + row, tl.where(known, logp, float("nan")))
    tl.store(entropy_N + row, entropy)
    tl.store(lse_N + row, lse)


def config(dtype: torch.dtype, aligned: bool, major: int) -> dict[str, Any]:
    """Options of a launch: tiles, and W, a number of which row lengths are multiples.

    Args:
        dtype: Of hidden states and weight.
        aligned: Whether all rows begin and end at 16 bytes.
        major: Major compute capability of the GPU.
    """
    if dtype == torch.float32:
        return dict(FLOAT32, DESCRIBED=False, W=4 if aligned else 1)
    if not aligned:
        return dict(UNALIGNED, DESCRIBED=False, W=1)
    return dict(CONFIGS.get(major, CONFIGS[None]), DESCRIBED=major in DESCRIPTORS, W=8)


def _launch_config(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> dict[str, Any]:
    """The config for these matrices on their device; the interpreter stands for the first of DESCRIPTORS."""
    width = hidden_NH.shape[1]
    aligned = width * hidden_NH.element_size() % 16 == 0 and all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(0) >= width
        for tensor in (hidden_NH, weight_VH)
    )
    on_gpu = hidden_NH.device.type == "cuda"
    major = torch.cuda.get_device_capability(hidden_NH.device)[0] if on_gpu else DESCRIPTORS[0]
    return config(hidden_NH.dtype, aligned, major)


def fused_forward(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob, entropy and log-sum-exp of tokens from their hidden states, without logits in memory.

    Args:
        hidden_NH: Float32, bfloat16 or float16.
        weight_VH: Of the same dtype.
        ids_N: Integers; one outside the vocabulary gives NaN.
        bias_V: Of the same dtype, or None.
        temperature: One for all tokens.
        temperature_N: One for each token, or None.
        softcap: 0 for none.

    Returns:
        logp_N, entropy_N, lse_N, float32, in nats.
    """
    (count, width), vocabulary = hidden_NH.shape, weight_VH.shape[0]
    logp_N, entropy_N, lse_N = (hidden_NH.new_empty(count, dtype=torch.float32) for _ in range(3))
    if count == 0:
        return logp_N, entropy_N, lse_N
    if hidden_NH.dtype == torch.bfloat16 and interpreted():
        # the interpreter multiplies bfloat16 bits as integers
        hidden_NH, weight_VH = hidden_NH.float(), weight_VH.float()
    hidden_NH, weight_VH, ids_N = unit_rows(hidden_NH), unit_rows(weight_VH), ids_N.contiguous()
    launch = _launch_config(hidden_NH, weight_VH)
    splits = triton.cdiv(vocabulary, SPLIT)
    sums = [hidden_NH.new_empty((count, splits), dtype=torch.float32) for _ in range(4)]
    hidden, weight = hidden_NH, weight_VH
    if launch["DESCRIBED"]:
        hidden = TensorDescriptor.from_tensor(hidden_NH, [launch["N"], launch["H"]])
        weight = TensorDescriptor.from_tensor(weight_VH, [launch["V"], launch["H"]])
    with torch.cuda.device(hidden_NH.get_device()):
        fused_kernel[(triton.cdiv(count, launch["N"]) * splits,)](
            *sums,
            hidden,
            weight,
            None if bias_V is None else bias_V.contiguous(),
            ids_N,
            logp_N if temperature_N is None else temperature_N.contiguous(),
            hidden_NH.stride(0) // launch["W"],
            weight_VH.stride(0) // launch["W"],
            count,
            vocabulary,
            width // launch["W"],
            splits,
            float(temperature),
            int(temperature_N is not None),
            float(softcap),
            CAPPED=softcap > 0,
            SPLIT=SPLIT,
            GROUP=GROUP,
            **launch,
        )
        merge_kernel[(count,)](
            logp_N,
            entropy_N,
            lse_N,
            *sums,
            ids_N,
            vocabulary,
            splits,
            SPLIT=SPLIT,
            S=triton.next_power_of_2(splits),
            num_warps=1,
        )
    return logp_N, entropy_N, lse_N


def linear_logprob(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
    chunk_tokens: int | None,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference."""
    if gradient:
        return linear.logprob(
            rows.token_logprob,
            hidden_NH,
            weight_VH,
            ids_N,
            bias_V,
            temperature,
            temperature_N,
            softcap,
            entropy,
            chunk_tokens,
            narrow=True,
        )
    logp_N, entropy_N, lse_N = fused_forward(
        hidden_NH, weight_VH, ids_N, bias_V, temperature, temperature_N, softcap
    )
    return logp_N, entropy_N if entropy else entropy_N.new_empty(0), lse_N


def linear_logprob_backward(*arguments: Any) -> linear.HeadGradients:
    """See the reference; arguments: its own."""
    return linear.logprob_backward(rows.token_logprob_backward, *arguments, narrow=True)
