"""One side of bench_step.py in its own process: `python bench/step_side.py SIDE WORK.json RECIPE`.

Only bench_step.py calls it. Each side has its own process, because the peak belongs to a process: on a CPU it
is the peak resident memory from start to end (VmHWM: Python, libraries and models included), on CUDA torch's
`max_memory_allocated` over the measured steps, models included. The last line of stdout is a JSON object: the
seconds of each step by part, tokens, the peak, and the numbers of the check (score and update on stored
responses). The first `warmup` steps are not counted; if `warmup` is 0, the check is the warm-up.
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
    """Returns the peak in bytes (see above), or None if the kernel does not report it."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import memory

    try:
        return memory._status("VmHWM")
    except OSError:
        return None


def measure(side, work, recipe):
    """Returns what bench_step.Bench.run reads, which also documents `recipe`."""
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
