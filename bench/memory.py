"""Peak memory of one call above its inputs and outputs.

On CUDA it is the allocator's peak (torch.cuda.max_memory_allocated) above the allocated memory before the
call. On a CPU it is the process's peak resident memory (VmHWM, reset through /proc/self/clear_refs) above the
resident memory before the call. So scratch memory of native code or a library counts too, from the moment a
page is touched. The size of outputs is subtracted, except for outputs in the memory of an input. The peak is
measured after warm-up: memory that a library keeps from call to call (packing buffers of a matrix product,
for example) does not count.
"""

import ctypes
import gc

import torch


def _status(name):
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"{name} is not in /proc/self/status")


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _new_bytes(result, inputs):
    """Returns the bytes of the storages in `result` that are not the inputs' own."""

    def storage(tensor):
        return tensor.untyped_storage()

    old = {storage(tensor).data_ptr() for tensor in inputs}
    new = {storage(tensor).data_ptr(): storage(tensor).nbytes() for tensor in _tensors(result)}
    return sum(size for address, size in new.items() if address not in old)


def above(step, inputs, device):
    """Returns the peak extra bytes of `step()`, or None if they cannot be known.

    step: returns its outputs, gradients included.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed earlier must not hide new allocations
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = _status("VmRSS")
            result = step()
            peak = _status("VmHWM")
        except (OSError, AttributeError):
            return None
    return max(peak - before - _new_bytes(result, inputs), 0)
