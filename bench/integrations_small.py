"""Compares TRL's own functions with their replacements on small inputs, where a call's overhead decides.

    OMP_NUM_THREADS=1 python bench/integrations_small.py

Needs TRL. Prints the table of docs/integrations.md: microseconds of forward and backward, the
smallest of many calls, for 1,000 to 1,000,000 logits. Original and replacement take turns in one process.
"""

import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import trl.trainer.utils as utils

from saferlhf_fast import integrations

SHAPES = ((1, 8, 125), (2, 8, 250), (2, 16, 500), (2, 16, 1000), (4, 16, 2000), (4, 32, 2500), (4, 32, 8000))
NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
SECONDS = 0.6  # for each pair


def _call(function: Callable[..., torch.Tensor], logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Seconds of one forward and backward."""
    begin = time.perf_counter()
    outputs = function(logits, ids) if "entropy_from" not in function.__name__ else function(logits)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, logits, [torch.ones_like(output) for output in outputs])
    return time.perf_counter() - begin


def main() -> None:
    """Measures and prints the table."""
    # Copies of the functions that call one another, not the replacements.
    own = {**vars(utils)}
    for name in NAMES:
        function = getattr(utils, name)
        own[name] = types.FunctionType(function.__code__, own, name, function.__defaults__)
    print(
        f"| logits | dtype | {' | '.join(f'`{name}`' for name in NAMES)} |\n|---:|---|{'---:|' * len(NAMES)}"
    )
    with integrations.patch("trl", quiet=True):
        for shape in SHAPES:
            for kind in (torch.float32, torch.bfloat16):
                cells = []
                for name in NAMES:
                    logits = torch.randn(shape).to(kind).requires_grad_()
                    ids, best = torch.randint(shape[-1], shape[:-1]), [float("inf")] * 2
                    end = time.perf_counter() + SECONDS
                    while time.perf_counter() < end:
                        for at, function in enumerate((own[name], getattr(utils, name))):
                            best[at] = min(best[at], _call(function, logits, ids))
                    original, patched = (1e6 * seconds for seconds in best)
                    cells.append(f"{original:.0f} → {patched:.0f} µs, {original / patched:.2f}x")
                size = f"{logits.numel():,}"
                print(f"| {size} | {str(kind)[6:]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
