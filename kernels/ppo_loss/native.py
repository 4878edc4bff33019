"""The policy loss and its gradients in one pass in C++ (csrc/ppo_loss.cpp)."""

from .. import pointers
from ..checks import result_dtype
from .reference import STATISTICS


def ppo_loss(
    logp,
    old_logp,
    advantages,
    ref_logp,
    entropy,
    cu_seqlens,
    mask,
    clip_ratio,
    clip_high,
    dual_clip,
    kl_coeff,
    k1,
    entropy_coeff,
    token_mean,
    normalizer,
    scale,
    shift,
):
    """See the op and reference.py. CPU tensors."""
    dtype, tokens = result_dtype(logp), logp.numel()
    inputs = [
        None if tensor is None else pointers.flat(tensor, dtype)
        for tensor in (logp, old_logp, advantages, ref_logp, entropy)
    ]
    loss, inverse = logp.new_empty((), dtype=dtype), logp.new_empty((), dtype=dtype)
    gradient = logp.new_empty(logp.shape, dtype=dtype)
    entropy_gradient = logp.new_empty(0 if entropy is None else logp.shape, dtype=dtype)
    statistics = logp.new_empty(len(STATISTICS), dtype=dtype)
    keep, row_arguments = pointers.rows(cu_seqlens, mask, tokens)
    pointers.module().ppo_loss_cpu(
        loss.data_ptr(),
        gradient.data_ptr(),
        entropy_gradient.data_ptr(),
        inverse.data_ptr(),
        statistics.data_ptr(),
        *map(pointers.address, inputs),
        *map(pointers.address, (normalizer, scale, shift)),
        *row_arguments,
        pointers.DTYPE_TAG[dtype],
        clip_ratio,
        clip_high,
        dual_clip,
        kl_coeff,
        k1,
        entropy_coeff,
        token_mean,
        pointers.threads(tokens),
    )
    del keep
    return loss, gradient, entropy_gradient, inverse, statistics
