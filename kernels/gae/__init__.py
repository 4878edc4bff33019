"""gae: advantages and returns of one stream of rewards.

Targets, not losses: no gradient flows back through them.
"""

import torch

from .. import checks, direct
from ..dispatch import choose

_lib = torch.library.Library("saferlhf_fast", "FRAGMENT")
_lib.define(
    "gae(Tensor rewards, Tensor values, Tensor? cu_seqlens, Tensor? mask, float gamma, float lam, "
    "bool carry, str impl) -> (Tensor, Tensor)"
)


def _run(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    gamma: float,
    lam: float,
    carry: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    function, _ = choose("gae", (rewards,), impl)
    return function(rewards, values, cu_seqlens, mask, gamma, lam, carry)


def _fake(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    gamma: float,
    lam: float,
    carry: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = checks.result_dtype(rewards)
    return (rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype))


_lib.impl("gae", _run, "CompositeExplicitAutograd")
torch.library.register_fake("saferlhf_fast::gae", _fake, lib=_lib)
_call = direct.op("gae", _run)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    masked: str = "zero",
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation, each row by itself.

    Means the same as, for one row of T tokens::

        for t in reversed(range(T)):                                     # V = values; V[T] = A[T] = 0
            A[t] = rewards[t] + gamma * V[t + 1] - V[t] + gamma * lam * A[t + 1]
        returns = A + V

    Masked entries are never read. No gradient flows back.

    Args:
        rewards: Packed [N] with `cu_seqlens` or padded [B, T] with `mask`, one run of valid tokens per row;
            with neither, [N] is one sequence and [B, T] has no padding.
        values: Shaped as rewards. values[t] is read at the position that predicts token t.
        gamma: Discount, in 0..1.
        lam: Decay of the sum of differences, in 0..1.
        cu_seqlens: Offsets of packed rows, int32 [B+1], or None.
        mask: Valid tokens of padded rows, bool [B, T], or None.
        masked: What a masked token between valid ones does. "zero": its reward and value count as 0
            (safe-rlhf). "carry": it is skipped, the next value and the running sum go through it (verl). Rows
            with one run are the same in both.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        (advantages, returns), shaped as rewards, 0 where masked; float64 for float64 rewards, else float32.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit; gamma or lam outside 0..1.
        NotImplementedError: `impl` cannot run here.

    Source:
        Schulman et al. 2016, arXiv 1506.02438, eq. 16.
    """
    checks.same_tokens("gae", ("rewards", "values"), (rewards, values))
    checks.one_of("gae", "masked", masked, ("zero", "carry"))
    gamma, lam = checks.fraction("gae", "gamma", gamma), checks.fraction("gae", "lam", lam)
    checks.implementation("gae", impl)
    cu_seqlens, mask, _ = checks.rows("gae", "rewards", rewards.shape, rewards.device, cu_seqlens, mask)
    return _call(
        checks.detached(rewards),
        checks.detached(values),
        cu_seqlens,
        mask,
        gamma,
        lam,
        masked == "carry",
        impl,
    )
