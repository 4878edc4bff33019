"""value_loss: the clipped value loss of one critic, or of both in one call.

The gradient is made in the forward pass.
"""

from typing import Any

import torch

from .. import checks, direct
from ..dispatch import choose
from ..first_order import Gradients, first_order_only, refuse_tangents, track_inputs
from ..losses import REDUCTIONS, scaled
from .reference import STATISTICS

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    "value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor? cu_seqlens, Tensor? mask, "
    "float clip_value, bool token_mean, Tensor? normalizer, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _run(values: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    *arguments, impl = inputs
    function, _ = choose("value_loss", (values,), impl)
    return function(values, *arguments)


def _fake(values: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    critics = values.shape[0]
    shapes = ((critics,), values.shape, (), (critics, len(STATISTICS)))
    return tuple(values.new_empty(shape, dtype=checks.result_dtype(values)) for shape in shapes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[1:3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else every output's would be filled with zeros: a second d values


@first_order_only("value_loss")
def _backward(ctx: Any, upstream_C: torch.Tensor | None, *_: None) -> Gradients:
    if upstream_C is None:
        return (None,) * 9
    gradient, inverse = ctx.saved_tensors
    upstream = upstream_C.reshape(-1, *[1] * (gradient.dim() - 1))
    return (scaled(gradient, inverse, upstream, ctx.dtype), *[None] * 8)


_lib.impl("value_loss", _run, "CompositeExplicitAutograd")
torch.library.register_fake("saferlhf_fast::value_loss", _fake, lib=_lib)
torch.library.register_autograd("saferlhf_fast::value_loss", _backward, setup_context=_setup, lib=_lib)
_call = direct.op("value_loss", _run, _setup, _backward)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    *,
    clip_value: float,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduction: str = "sequence-mean",
    normalizer: float | torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Half the mean of the larger of two squares, of one critic or of both.

    Means the same as::

        clipped = old_values + (values - old_values).clamp(-clip_value, clip_value)
        loss = 0.5 * mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2))

    Masked entries are never read.

    Args:
        values: Packed [N] with `cu_seqlens` or padded [B, T] with `mask` for one critic; [2, N] or [2, B, T]
            for both, the reward's first. With neither, [N] is one sequence, and [B, T] (also [2, T]) one
            critic without padding.
        old_values: Shaped as values; of the critic that scored the batch.
        returns: Shaped as values.
        clip_value: How far a value may move from the old one, in the values' units; infinity for no clip.
        cu_seqlens: Offsets of packed rows, int32 [B+1], or None.
        mask: Valid tokens of padded rows, bool [B, T], or None.
        reduction: As in `ppo_loss`.
        normalizer: As in `ppo_loss`.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        (loss, stats): loss [], or [2] for both critics; float64 for float64 values, else float32. The
        gradient goes to values only and is exactly 0 where masked. stats are 0-d, over this call's valid
        tokens: clip_fraction (share of values further than clip_value from the old), clipped (share where the
        clipped square is the larger one), value, return (means), error (mean square against the returns),
        sequences (with a token), tokens; with two critics each of the first five twice, as reward_* and
        cost_*.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
        NotImplementedError: `impl` cannot run here.

    Source:
        The clipped value loss of OpenAI baselines' PPO2; safe-rlhf's critic_loss_fn.
    """
    checks.same_tokens("value_loss", ("values", "old_values", "returns"), (values, old_values, returns))
    refuse_tangents("value_loss", values)
    checks.one_of("value_loss", "reduction", reduction, REDUCTIONS)
    clip_value = checks.not_negative("value_loss", "clip_value", clip_value)
    checks.implementation("value_loss", impl)
    for name, given in (("mask", mask), ("cu_seqlens", cu_seqlens)):
        if given is not None:
            checks.tensor_argument("value_loss", name, given)
    single = (
        values.dim() == (1 if cu_seqlens is not None else 2 if mask is None else mask.dim())
        or values.dim() == 1
    )
    if not single and (values.dim() not in (2, 3) or values.shape[0] != 2):
        raise ValueError(
            f"value_loss: values: expected one critic or two in front, got shape {tuple(values.shape)}"
        )
    if clip_value == float("inf"):
        old_values = values  # unbounded, old + (new - old) need not be new: far apart it is not even close
    if single:
        values, old_values, returns = values[None], old_values[None], returns[None]
    cu_seqlens, mask, _ = checks.rows(
        "value_loss", "values", values.shape[1:], values.device, cu_seqlens, mask
    )
    loss_C, _, _, statistics = _call(
        values,
        *map(checks.detached, (old_values, returns)),
        cu_seqlens,
        mask,
        clip_value,
        reduction == "token-mean",
        checks.normalizer("value_loss", normalizer, values),
        impl,
    )
    track_inputs(loss_C, values)
    if single:
        return loss_C[0], dict(zip(STATISTICS, statistics[0].unbind()))
    stats = {}
    for prefix, row in zip(("reward_", "cost_"), statistics.unbind()):
        for name, value in zip(STATISTICS, row.unbind()):
            stats[name if name in ("sequences", "tokens") else prefix + name] = value
    return loss_C, stats
