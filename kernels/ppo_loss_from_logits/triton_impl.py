"""The gradient of the policy objective over rows of logits in Triton: one program reads its row twice.

The first read gives the row's log-prob and entropy, which decide the objective's derivative. The second one
writes d logits, and comes from the caches as far as the rows that are worked on at one time fit there: it
begins where the first read ended.
"""

import torch
import triton
import triton.language as tl

from ..ppo_loss.triton_impl import policy_terms
from ..tiles_triton import INTEGERS, depth, tiling, unit_rows, unit_target, width
from ..token_logprob.triton_impl import (
    LN2,
    columns,
    finish,
    gradient,
    row_head,
    row_statistics,
    store_target,
    tile,
)

# (widest vocabulary, warps): 32 warps of more than 32 registers are one program per multiprocessor, so that
# an H200 works on 132 rows of 151936 bfloat16, 40 MB, at one time. Chosen for that, not tuned on a device.
WARPS = ((8192, 8), (65536, 16), (1 << 31, 32))


@triton.jit(do_not_specialize=INTEGERS)
def rows_kernel(
    out_NV,
    logp_N,
    entropy_N,
    logits_NV,
    ids_N,
    old_logp_N,
    advantage_N,
    ref_logp_N,
    weight_N,
    temperature_N,
    out_stride,
    logits_stride,
    vocabulary,
    upwards,
    temperature,
    per_row,
    softcap,
    has_ref,
    clip_ratio,
    clip_high,
    dual_clip,
    kl_coeff,
    k1,
    entropy_coeff,
    CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    T: tl.constexpr,
):
    """One row: its log-prob and entropy, then its gradient; zeros where the weight is 0."""
    W: tl.constexpr = width(logits_NV.dtype.element_ty.primitive_bitwidth, ALIGNED)
    R: tl.constexpr = depth(W, CAPPED)
    row = tl.program_id(0).to(tl.int64)
    row_V, out_V = logits_NV + row * logits_stride * W, out_NV + row * out_stride * W
    weight = tl.load(weight_N + row)
    at, first = columns(R, T, W)
    if weight == 0:
        for start in range(0, vocabulary, R * T * W):
            zero = tl.zeros([R, T, W], out_NV.dtype.element_ty)
            tl.store(out_V + start + at, zero, mask=start + first < vocabulary)
        tl.store(logp_N + row, 0.0)
        tl.store(entropy_N + row, 0.0)
    else:
        id, known, scale, target = row_head(
            row_V, ids_N, temperature_N, row, vocabulary, temperature, per_row, softcap, CAPPED
        )
        base, others, weighted = row_statistics(row_V, id, vocabulary, scale, softcap, True, CAPPED, R, T, W)
        logp, entropy, _, highest, total = finish(base, others, weighted, target)
        logp = tl.where(known, logp, float("nan"))
        tl.store(logp_N + row, logp)
        tl.store(entropy_N + row, entropy)
        ref_logp = tl.load(ref_logp_N + row, mask=has_ref != 0, other=0.0)
        old_logp, advantage = tl.load(old_logp_N + row), tl.load(advantage_N + row)
        by_k1 = policy_terms(
            logp,
            old_logp,
            advantage,
            ref_logp,
            0.0,
            clip_ratio,
            clip_high,
            dual_clip,
            kl_coeff,
            True,
            0.0,
            True,
        )[1]
        by_k3 = policy_terms(
            logp,
            old_logp,
            advantage,
            ref_logp,
            0.0,
            clip_ratio,
            clip_high,
            dual_clip,
            kl_coeff,
            False,
            0.0,
            True,
        )[1]
        d_logp = tl.where(k1 != 0, by_k1, by_k3)
        # 1 / temperature; a NaN in logp, of an id outside the vocabulary, reaches grad and the whole row
        inverse = scale * LN2
        grad, grad_entropy = weight * d_logp * inverse, -weight * entropy_coeff * inverse
        # d of a column with t = z - highest: -(grad + grad_entropy * (t * ln(2) - log(total) + entropy)) *
        # 2^t / total
        plain = (-grad - grad_entropy * (entropy - tl.log(total))) / total
        slope = -grad_entropy * LN2 / total
        tiles = tl.cdiv(vocabulary, R * T * W)
        start = tl.where(upwards != 0, 0, tiles - 1) * (R * T * W)
        x = tile(row_V, start + at, start + first, vocabulary, softcap, CAPPED)
        for i in range(1, tiles + 1):
            here, start = (
                start,
                tl.where(upwards != 0, i, tl.where(i < tiles, tiles - 1 - i, tiles)) * (R * T * W),
            )
            following = tile(row_V, start + at, start + first, vocabulary, softcap, CAPPED)
            if out_NV.dtype != logits_NV.dtype:
                # Narrower elements over the same memory: every thread has read before one writes, and tiles
                # go upwards.
                tl.debug_barrier()
            d = gradient(x, scale, highest, plain, slope, softcap, CAPPED)
            tl.store(out_V + here + at, d.to(out_NV.dtype.element_ty), mask=here + first < vocabulary)
            x = following
        store_target(out_V + id, target / scale, known, logp, entropy, grad, grad_entropy, softcap, CAPPED)


def ppo_loss_from_logits(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    old_logp_N: torch.Tensor,
    advantage_N: torch.Tensor,
    ref_logp_N: torch.Tensor | None,
    weight_N: torch.Tensor,
    clip_ratio: float,
    clip_high: float,
    dual_clip: float,
    kl_coeff: float,
    k1: bool,
    entropy_coeff: float,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    out_NV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. Nothing of a row with weight 0 is read."""
    count, vocabulary = logits_NV.shape
    logp_N, entropy_N = (logits_NV.new_empty(count, dtype=torch.float32) for _ in range(2))
    if count == 0:
        return logp_N, entropy_N
    target_NV, logits_NV = unit_target(out_NV), unit_rows(logits_NV)
    launch, w, _ = tiling(WARPS, softcap > 0, target_NV, logits_NV)
    vectors = [
        logp_N if tensor is None else tensor.contiguous()
        for tensor in (ids_N, old_logp_N, advantage_N, ref_logp_N, weight_N, temperature_N)
    ]
    with torch.cuda.device(logits_NV.get_device()):
        rows_kernel[(count,)](
            target_NV,
            logp_N,
            entropy_N,
            logits_NV,
            *vectors,
            target_NV.stride(0) // w,
            logits_NV.stride(0) // w,
            vocabulary,
            int(target_NV.dtype != logits_NV.dtype),
            float(temperature),
            int(temperature_N is not None),
            float(softcap),
            int(ref_logp_N is not None),
            float(clip_ratio),
            float(clip_high),
            float(dual_clip),
            float(kl_coeff),
            int(k1),
            float(entropy_coeff),
            **launch,
        )
    if target_NV is not out_NV:
        out_NV.copy_(target_NV)
    return logp_N, entropy_N
