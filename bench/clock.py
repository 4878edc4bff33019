"""The clock: caches are overwritten before a round, and a GPU has finished before its events are read.

It also counts launches.
"""

import statistics
import time

import ceilings
import torch

SMALL = (
    8 << 20
)  # bytes; smaller row ops are measured inside a CPU's caches, because a trainer has such data there too
_buffers = {}  # the buffer that a flush reads, by device


def flush(device, moved):
    """Returns a function that puts other data into the caches before a round that moves `moved` bytes.

    It reads and does not write: modified cache lines would have to be written back, which would slow the
    round.
    """
    if device == "cpu" and moved < SMALL:
        return lambda: None
    return _buffer(device).sum


def _buffer(device):
    size = 1 << 29 if device == "cuda" else ceilings.past_the_caches(device)
    if device not in _buffers or _buffers[device].nbytes != size:
        _buffers[device] = torch.zeros(size // 4, device=device)
    return _buffers[device]


def preparation(device, moved, before=None):
    """Returns what is called ahead of each timed call, and is not timed itself.

    moved: bytes that the call moves, as for `flush`. before: called first, if given.
    """
    empty_cache = flush(device, moved)

    def ready():
        if before is not None:
            before()
        empty_cache()
        ceilings.synchronize(device)

    return ready


def on_device(step, ready, rounds, again=True):
    """Returns the figures of a step on a GPU: "seconds" and "best" by events, and "launches".

    A short step also has "call", the time that Python needs for a call. again: whether the step may be called
    twice without `ready` in between.
    """
    times = []
    for _ in range(rounds):
        ready()
        _buffer("cuda").sum()  # the device reads this buffer while Python launches the step
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    figures = {"seconds": statistics.median(times), "best": min(times)}
    if again and figures["seconds"] < 1e-3:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(100):
            step()
        torch.cuda.synchronize()
        figures["call"] = (time.perf_counter() - begin) / 100
    ready()
    return figures | launches(step)


def launches(step):
    """Returns {"launches": kernels and copies of one call}, or {} if the profiler cannot see them."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
        count = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())
    except Exception:  # no profiler, or no permission: only this figure is missing
        return {}
    return {"launches": count} if count else {}
