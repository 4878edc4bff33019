"""The ceilings of this machine, and floors computed from them.

Ceilings are the copy and read bandwidth and the rates of matrix products on random data. They are measured in
the run that uses them, twice (at its start and its end); the better value counts. A floor is the longer of
two times: the bytes that must move over the bandwidth, and the necessary operations over the product rate. No
implementation with the same data flow can be faster than the floor while its data are in memory; with data in
caches it can be.
"""

import time
from pathlib import Path

import shapes
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_name():
    """Returns the name of the device for results files; a CPU's name includes its number of threads."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")
    return f"{model}, {torch.get_num_threads()} thread(s)"


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def best(function, device, rounds):
    """Returns the seconds of the fastest of `rounds` calls, after two warm-up calls."""
    times = []
    for _ in range(rounds + 2):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def cache_bytes(device):
    """Returns the bytes of the last-level cache, or 0 if the machine does not report it."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 0


def past_the_caches(device):
    """Returns the bytes of a buffer that does not fit into the caches.

    It is 1.1 x the last-level cache, between 64 MiB and 1 GiB; 2 GiB on a GPU.
    """
    if shapes.TINY:
        return 1 << 20
    if shapes.QUICK:
        return 1 << 26
    return 1 << 31 if device == "cuda" else min(max(int(1.1 * cache_bytes(device)), 1 << 26), 1 << 30)


def _bandwidths(device):
    source = torch.randn(past_the_caches(device) // 4 // 4096, 4096, device=device)
    target, vector = torch.empty_like(source), torch.randn(4096, device=device)
    copy = best(lambda: target.copy_(source), device, 8)
    read = min(
        best(function, device, 6)
        for function in (lambda: source.sum(1), lambda: source.sum(), lambda: source @ vector)
    )
    return {"copy_gb_s": 2 * source.nbytes / copy / 1e9, "read_gb_s": source.nbytes / read / 1e9}


def _product(device, dtype, sizes):
    def rate(size):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / best(lambda: left @ right, device, 6) / 1e12

    return max(rate(size) for size in sizes)


def measure(device):
    """Returns copy_gb_s (reads and writes), read_gb_s, float32_tflop_s and, on CUDA, bfloat16_tflop_s."""
    rates = _bandwidths(device)
    sizes = (64,) if shapes.TINY else (4096, 8192) if device == "cuda" else (1024, 2048)
    rates["float32_tflop_s"] = _product(device, torch.float32, sizes)
    if device == "cuda":
        rates["bfloat16_tflop_s"] = _product(device, torch.bfloat16, sizes)
    return rates


def better(first, second):
    """Returns the higher value of each figure of two measurements."""
    return {name: max(first[name], second[name]) for name in first}


def floor(row, ceilings):
    """Returns the least seconds of a row's work, or None.

    row: a result's extra_info (reads, writes, flops, dtype).
    """
    reads, writes = row.get("reads", 0), row.get("writes", 0)
    if not ceilings or not (reads or writes or row.get("flops")):
        return None
    rate = ceilings["copy_gb_s"] if writes else max(ceilings["read_gb_s"], ceilings["copy_gb_s"])
    seconds = (reads + writes) / rate / 1e9
    if row.get("flops"):
        products = ceilings.get(f"{row['dtype']}_tflop_s")
        return max(seconds, row["flops"] / products / 1e12) if products else None
    return seconds
