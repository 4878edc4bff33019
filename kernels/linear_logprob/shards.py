"""A vocabulary split over the ranks of a process group: each rank's own log-sum-exps merged into everyone's."""

import torch
import torch.distributed as dist


def _resolve(group):
    return dist.distributed_c10d._resolve_process_group(group)


def mine(ids_N, size, group):
    """(ids inside this rank's shard of `size` rows or -1, whether they are)."""
    local_N = ids_N - dist.get_rank(_resolve(group)) * size
    inside_N = (local_N >= 0) & (local_N < size)
    return torch.where(inside_N, local_N, -1), inside_N


def add_up(tensor, group):
    """tensor, summed over the ranks in place."""
    dist.all_reduce(tensor, group=_resolve(group))


def merged(local, ids_N, size, entropy, group):
    """(logp_N, entropy_N or [0], lse_N) of the whole vocabulary, from local(ids, entropy) of each shard; one
    all-gather.

    The target's logit is logp + lse of the rank that owns it, so a confident token's log-prob is right to
    float32's rounding of a logit here, not relative to 1 - p. An id that no rank owns gives NaN.
    """
    _, inside_N = mine(ids_N, size, group)
    local_N = torch.where(inside_N, ids_N - dist.get_rank(_resolve(group)) * size, 0)
    logp_N, entropy_N, lse_N = local(local_N, entropy)
    # A shard whose logits are -inf throughout has no distribution of its own: it adds nothing.
    mean_N = torch.where(lse_N == -torch.inf, 0, lse_N - entropy_N) if entropy else torch.zeros_like(lse_N)
    target_N = torch.where(inside_N, torch.where(lse_N == -torch.inf, -torch.inf, logp_N + lse_N), 0)
    here = torch.stack([lse_N, target_N, mean_N, inside_N.to(lse_N.dtype)])
    everyone = here.new_empty(dist.get_world_size(_resolve(group)) * here.numel())
    dist.all_gather_into_tensor(everyone, here.reshape(-1), group=_resolve(group))
    lse_RN, target_RN, mean_RN, inside_RN = everyone.reshape(-1, *here.shape).unbind(1)
    lse_N = torch.logsumexp(lse_RN, dim=0)
    logp_N = torch.where(inside_RN.sum(0) == 1, (target_RN.sum(0) - lse_N).clamp(max=0), torch.nan)
    if entropy:
        # The weights sum to 1: taken over lse - mean, their rounding is relative to the entropy, not to lse.
        entropy_N = (torch.softmax(lse_RN, dim=0) * (lse_N - mean_RN)).sum(0).clamp(min=0)
    return logp_N, entropy_N, lse_N
