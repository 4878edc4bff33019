"""The processes of a run: which this is, how many there are, and what they tell one another.

All of it works in one process.
"""

import functools
import os

import torch


def rank():
    """Index of this process, 0 .. world_size() − 1."""
    return int(os.environ.get("RANK", "0"))


def world_size():
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device():
    """The device of this process: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def all_reduce(tensor):
    """Sum over ranks, in place; returns the tensor."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def all_gather(values_B, order, count):
    """[B_local] of each rank -> [count] in the global batch's order, on all ranks, without a read of the
    device.

    order: host integers, the place of each in the global batch. The order matters: a window over the last
    episodes must hold the same ones for any number of ranks.
    """
    out = torch.zeros(count, dtype=values_B.dtype, device=values_B.device)
    out[torch.tensor(order, dtype=torch.long).to(values_B.device, non_blocking=True)] = values_B
    return all_reduce(out)


def gather_objects(obj):
    """One picklable object of each rank -> list in rank order (all ranks)."""
    if world_size() == 1:
        return [obj]
    out = [None] * world_size()
    torch.distributed.all_gather_object(out, obj)
    return out


def barrier():
    """Waits for all ranks."""
    if world_size() > 1:
        torch.distributed.barrier()


def any_rank(flags):
    """[bool] -> for each whether it is true on some rank. Between hosts, so that no device waits."""
    if world_size() == 1:
        return list(flags)
    flags_N = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(flags_N, op=torch.distributed.ReduceOp.MAX, group=_host_group())
    return flags_N.bool().tolist()


@functools.cache
def _host_group():
    """A group for tensors of the host; None, the default one, where that is such a group already."""
    return torch.distributed.new_group(backend="gloo") if torch.cuda.is_available() else None


def not_finite(named):
    """{name: tensor or None} -> names of those that are not finite on some rank: one reduction, one read of
    the device.
    """
    named = {name: tensor for name, tensor in named.items() if tensor is not None}
    bad = torch.stack(
        [(~torch.isfinite(tensor)).any().to(device(), torch.float32) for tensor in named.values()]
    )
    return [name for name, flag in zip(named, all_reduce(bad).tolist()) if flag]
