"""One side of bench_step.py in a process of its own: `python bench/step_side.py SIDE WORK.json RECIPE`, for
bench_step.py only.

A process per side, because the peak is the process's: on a CPU its peak resident memory from start to end
(VmHWM: Python, libraries and models included), on CUDA torch's `max_memory_allocated` over the measured
steps, models included. The last line of stdout is a JSON object: seconds of each step by part, tokens, peak,
the numbers of the check (score and update on stored responses). The first `warmup` steps are not counted;
where that is 0, the check warms up.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The names of sides are stored in result files; a side's file is named after the project that it measures.
MODULES = {
    "ours": "step_saferlhf_fast",
    "unfused": "step_saferlhf_fast",
    "ref": "step_safe_rlhf",
    "trl": "step_trl",
}


def peak(device):
    """Bytes: see above. None where the kernel does not say."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import memory

    try:
        return memory._status("VmHWM")
    except OSError:
        return None


def measure(side, work, recipe):
    """-> what the parent reads. recipe: see bench_step.Bench.run."""
    import torch

    if recipe["threads"]:
        torch.set_num_threads(recipe["threads"])
    start = time.perf_counter()
    trainer = importlib.import_module(MODULES[side]).Side(work, recipe)
    built = time.perf_counter() - start
    checked = trainer.check() if recipe["check"] else {}
    if recipe["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = [trainer.step() for _ in range(recipe["warmup"] + recipe["repeat"])]
    return {
        "steps": steps[recipe["warmup"] :],
        "check": checked,
        "peak": peak(recipe["device"]),
        "built": built,
        "threads": torch.get_num_threads(),
    }


def main(side, path, recipe):
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    peers = HERE.parent / "build" / "peers"
    if peers.is_dir():
        sys.path.append(str(peers))
    recipe = json.loads(recipe)
    if recipe["device"] != "cuda":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    import step_work

    if side == "ref":
        import step_safe_rlhf

        step_safe_rlhf.stand_in()
    result = measure(side, step_work.load_work(path), recipe)
    sys.stdout.flush()
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
