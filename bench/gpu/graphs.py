"""CUDA graphs of a call. A capture that fails leaves the process in its previous state."""

import torch


def capture(call):
    """Returns (the result of call(), a CUDAGraph of it, the tensors that a replay fills)."""
    usual, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        for _ in range(2):  # objects of the first call, such as a counter, are created outside the capture
            first = call()
    usual.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            second = call()
    except Exception:
        # torch leaves the capture's stream as the current one, and its generator still waits for the end of
        # the capture: the next random number anywhere in this process would raise an error.
        torch.cuda.set_stream(usual)
        device = torch.cuda.current_device()
        torch.cuda.default_generators[device].graphsafe_set_state(
            torch.Generator(f"cuda:{device}").manual_seed(0)
        )
        raise
    return first, graph, second
