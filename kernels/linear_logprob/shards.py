"""A vocabulary split over the ranks of a process group: the log-sum-exps of all shards merged into one."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _resolve(group: str) -> "dist.ProcessGroup":
    name: Any = group  # some versions of torch have a type of its own for it
    return dist.distributed_c10d._resolve_process_group(name)


def local_ids(ids_N: torch.Tensor, size: int, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids within this rank's shard.

    Args:
        ids_N: Ids of the whole vocabulary.
        size: Rows of the weight in each shard.
        group: Name of the process group.

    Returns:
        The ids relative to the shard's first row, -1 for those of other shards; and which are of this shard.
    """
    local_N = ids_N - dist.get_rank(_resolve(group)) * size
    inside_N = (local_N >= 0) & (local_N < size)
    return torch.where(inside_N, local_N, -1), inside_N


def add_up(tensor: torch.Tensor, group: str) -> None:
    """Sums the tensor over the ranks, in place."""
    dist.all_reduce(tensor, group=_resolve(group))


def merged(
    local: Callable[[torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    ids_N: torch.Tensor,
    size: int,
    entropy: bool,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies and log-sum-exps of the whole vocabulary, by one all-gather.

    The target's logit is logp + lse of the rank that owns it, so a confident token's log-prob is right to
    float32's rounding of a logit here, not relative to 1 - p. An id that no rank owns gives NaN.

    Args:
        local: (ids, entropy) -> (logp_N, entropy_N or [0], lse_N) of this rank's shard.
        ids_N: Ids of the whole vocabulary.
        size: Rows of the weight in each shard.
        entropy: Whether the entropy is wanted.
        group: Name of the process group.

    Returns:
        logp_N, entropy_N ([0] if not wanted), lse_N, the same on all ranks.
    """
    _, inside_N = local_ids(ids_N, size, group)
    local_N = torch.where(inside_N, ids_N - dist.get_rank(_resolve(group)) * size, 0)
    logp_N, entropy_N, lse_N = local(local_N, entropy)
    # A shard whose logits are -inf throughout has no distribution of its own: it adds nothing.
    mean_N = torch.where(lse_N == -torch.inf, 0, lse_N - entropy_N) if entropy else torch.zeros_like(lse_N)
    target_N = torch.where(inside_N, torch.where(lse_N == -torch.inf, -torch.inf, logp_N + lse_N), 0)
    shard = torch.stack([lse_N, target_N, mean_N, inside_N.to(lse_N.dtype)])
    all_shards = shard.new_empty(dist.get_world_size(_resolve(group)) * shard.numel())
    dist.all_gather_into_tensor(all_shards, shard.reshape(-1), group=_resolve(group))
    lse_RN, target_RN, mean_RN, inside_RN = all_shards.reshape(-1, *shard.shape).unbind(1)
    lse_N = torch.logsumexp(lse_RN, dim=0)
    logp_N = torch.where(inside_RN.sum(0) == 1, (target_RN.sum(0) - lse_N).clamp(max=0), torch.nan)
    if entropy:
        # The weights sum to 1: taken over lse - mean, their rounding is relative to the entropy, not to lse.
        entropy_N = (torch.softmax(lse_RN, dim=0) * (lse_N - mean_RN)).sum(0).clamp(min=0)
    return logp_N, entropy_N, lse_N
