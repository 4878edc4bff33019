"""The processes of a run: the rank of this one, how many there are, and how they exchange values.

Every function works in a run of one process too.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")


def rank() -> int:
    """Index of this process, 0 .. world_size() − 1."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks, in place.

    Args:
        tensor: Any shape and dtype; the same shape on all ranks.

    Returns:
        The same tensor.
    """
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def all_gather(values_B: torch.Tensor, order: Sequence[int], count: int) -> torch.Tensor:
    """Collects the values of all ranks in the order of the global batch, without waiting for the device.

    The order matters: a window over the last episodes must hold the same episodes for any number of ranks.

    Args:
        values_B: This rank's values, [B].
        order: For each value, its index in the global batch; host integers.
        count: Size of the global batch.

    Returns:
        [count], the same on all ranks.
    """
    out = torch.zeros(count, dtype=values_B.dtype, device=values_B.device)
    out[torch.tensor(order, dtype=torch.long).to(values_B.device, non_blocking=True)] = values_B
    return all_reduce(out)


def gather_objects(obj: T) -> list[T]:
    """Collects one picklable object of each rank; all ranks get the list, in rank order."""
    if world_size() == 1:
        return [obj]
    out: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(out, obj)
    return out


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        torch.distributed.barrier()


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether it is true on some rank.

    The ranks exchange the flags through host memory, so that no rank waits for its device.

    Args:
        flags: As many on every rank.
    """
    if world_size() == 1:
        return list(flags)
    flags_N = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(flags_N, op=torch.distributed.ReduceOp.MAX, group=_host_group())
    return cast(list[bool], flags_N.bool().tolist())


@functools.cache
def _host_group() -> torch.distributed.ProcessGroup | None:
    """A group for tensors in host memory; None for the default group, where that one takes host tensors."""
    return torch.distributed.new_group(backend="gloo") if torch.cuda.is_available() else None


def not_finite(named: Mapping[str, torch.Tensor | None]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity on some rank.

    It takes one reduction over the ranks and one read of the device.

    Args:
        named: Tensors of any shape by name; a None is left out. The same names on all ranks.
    """
    present = {name: tensor for name, tensor in named.items() if tensor is not None}
    bad = torch.stack(
        [(~torch.isfinite(tensor)).any().to(device(), torch.float32) for tensor in present.values()]
    )
    return [name for name, flag in zip(present, all_reduce(bad).tolist()) if flag]
