"""linear_logprob in Triton.

Without a gradient: one kernel in which logits never reach memory, and one that merges its sums.

A program makes the logits of a block of tokens for SPLIT columns of the vocabulary, tile by tile, and folds
each tile from its accumulators into running sums, as token_logprob does with logits that it loads. The sums
of a token's splits are merged by a second kernel, in one fixed order. Tiles and splits depend on dtype,
alignment and GPU alone: a token's bits do not depend on other tokens or their number. With a gradient:
torch's matrix products in chunks around the kernels of token_logprob, whose log-probs may differ from the
fused kernel's in the last bits.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import linear
from ..dispatch import interpreted
from ..token_logprob import triton_impl as rows
from ..token_logprob.triton_impl import FLOOR, INTEGERS, LOG2E, finish, finite, tanh

SPLIT = 1024  # columns of a program
# blocks of tokens that go through the vocabulary together, so that they find its tiles in the L2 cache
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
    """Hidden @ weight.T of the tokens n from first_n and the columns v from first_v on, in float32."""
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
    # Programs that run side by side: GROUP blocks of tokens times neighbouring splits.
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
        mine = v[None, :] == id_n[:, None]
        target_n += tl.sum(tl.where(mine, x, 0.0), 1)
        x = tl.where(mine | (v >= vocabulary)[None, :], float("-inf"), x)
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


def config(dtype, aligned, major):
    """Options of a launch on a GPU of that major compute capability: tiles, W (what row lengths are multiples
    of).
    """
    if dtype == torch.float32:
        return dict(FLOAT32, DESCRIBED=False, W=4 if aligned else 1)
    if not aligned:
        return dict(UNALIGNED, DESCRIBED=False, W=1)
    return dict(CONFIGS.get(major, CONFIGS[None]), DESCRIBED=major in DESCRIPTORS, W=8)


def fused_forward(hidden_NH, weight_VH, ids_N, bias_V, temperature, temperature_N, softcap):
    """(logp_N, entropy_N, lse_N) in float32 of tokens from their hidden states, without logits in memory."""
    (count, width), vocabulary = hidden_NH.shape, weight_VH.shape[0]
    logp_N, entropy_N, lse_N = (hidden_NH.new_empty(count, dtype=torch.float32) for _ in range(3))
    if count == 0:
        return logp_N, entropy_N, lse_N
    if hidden_NH.dtype == torch.bfloat16 and interpreted():
        # the interpreter multiplies bfloat16 bits as integers
        hidden_NH, weight_VH = hidden_NH.float(), weight_VH.float()
    hidden_NH, weight_VH, ids_N = rows.unit_rows(hidden_NH), rows.unit_rows(weight_VH), ids_N.contiguous()
    aligned = width * hidden_NH.element_size() % 16 == 0 and all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(0) >= width
        for tensor in (hidden_NH, weight_VH)
    )
    major = (
        torch.cuda.get_device_capability(hidden_NH.device)[0]
        if hidden_NH.device.type == "cuda"
        else DESCRIPTORS[0]
    )
    how = config(hidden_NH.dtype, aligned, major)
    splits = triton.cdiv(vocabulary, SPLIT)
    sums = [hidden_NH.new_empty((count, splits), dtype=torch.float32) for _ in range(4)]
    hidden, weight, bias_V = hidden_NH, weight_VH, None if bias_V is None else bias_V.contiguous()
    if how["DESCRIBED"]:
        hidden = TensorDescriptor.from_tensor(hidden_NH, [how["N"], how["H"]])
        weight = TensorDescriptor.from_tensor(weight_VH, [how["V"], how["H"]])
    with torch.cuda.device(hidden_NH.get_device()):
        fused_kernel[(triton.cdiv(count, how["N"]) * splits,)](
            *sums,
            hidden,
            weight,
            bias_V,
            ids_N,
            logp_N if temperature_N is None else temperature_N.contiguous(),
            hidden_NH.stride(0) // how["W"],
            weight_VH.stride(0) // how["W"],
            count,
            vocabulary,
            width // how["W"],
            splits,
            float(temperature),
            int(temperature_N is not None),
            float(softcap),
            CAPPED=softcap > 0,
            SPLIT=SPLIT,
            GROUP=GROUP,
            **how,
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
    hidden_NH, weight_VH, ids_N, bias_V, temperature, temperature_N, softcap, entropy, chunk_tokens, gradient
):
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


def linear_logprob_backward(*arguments):
    """See the reference."""
    return linear.logprob_backward(rows.token_logprob_backward, *arguments, narrow=True)
