"""The clock: caches are overwritten before a round, a GPU has finished before its events are read, launches
are counted.
"""

import statistics
import time

import ceilings
import torch

SMALL = 8 << 20  # bytes: below it a CPU's row ops are measured in its caches, where a trainer has them
_buffers = {}  # by device: what a flush reads


def flush(device, moved):
    """A function that puts other data into the caches before a round that moves so many bytes.

    It reads and does not write: lines that still have to be written back would slow what comes next.
    """
    if device == "cpu" and moved < SMALL:
        return lambda: None
    return _buffer(device).sum


def _buffer(device):
    size = 1 << 29 if device == "cuda" else ceilings.past_the_caches(device)
    if device not in _buffers or _buffers[device].nbytes != size:
        _buffers[device] = torch.zeros(size // 4, device=device)
    return _buffers[device]


def on_device(step, ready, rounds, again=True):
    """{"seconds", "best"} of a step on a GPU by events, {"call"} (what Python needs for a call) of a short
    one, {"launches"}.

    again: whether the step may be called twice without `ready` in between.
    """
    times = []
    for _ in range(rounds):
        ready()
        _buffer("cuda").sum()  # the device still reads it while Python launches
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
    """{"launches": kernels and copies that one call puts on the device}, or {} where the profiler cannot see
    them.
    """
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
        count = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())
    except Exception:  # no profiling on this machine, or no profiler: a figure less, not a bench less
        return {}
    return {"launches": count} if count else {}
