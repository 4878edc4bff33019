"""Launches each kernel once, for a profiler or a memory checker. `small`: on small odd shapes."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import shapes  # noqa: E402
import torch  # noqa: E402
from gpu import checks  # noqa: E402

import saferlhf_fast as ops  # noqa: E402


def large():
    """Launches the main kernels on the targets' shapes with random data."""
    with torch.no_grad():
        logits, ids, _ = shapes.logits(shapes.LOGITS["cuda"][0], "cuda")
        ops.token_logprob(logits, ids, return_entropy=True, impl="triton")
    batch = shapes.batch(ids, torch.full((len(ids),), -12.0, device="cuda"))
    leaf = logits.detach().requires_grad_()
    ops.ppo_loss_from_logits(
        leaf * 1,
        ids,
        batch.old_logp_N,
        batch.advantage_N,
        clip_ratio=0.2,
        cu_seqlens=batch.cu_seqlens,
        impl="triton",
    )
    hidden, weight, ids, _ = shapes.linear(shapes.LINEAR["cuda"][0], "cuda")
    with torch.no_grad():
        ops.linear_logprob(hidden, weight, ids, impl="triton")
    rows = (
        checks.rows(*shapes.ROWS["cuda"][0], False, "ppo_lag_advantage"),
        checks.rows(*shapes.ROWS["cuda"][0], False, "gae"),
    )
    for case in rows:
        for impl in checks.implementations(case.op):
            case.call(None, impl)


def small():
    """Launches one small case of each op with each implementation."""
    count, vocabulary = checks.COUNTS[-1], checks.VOCABULARIES[1]
    cases = [checks.rows(7, 63, False, op) for op in ("gae", "ppo_lag_advantage", "ppo_loss", "value_loss")]
    cases += [
        checks.logprob(count, vocabulary, False),
        checks.policy(count, vocabulary),
        checks.head(count, vocabulary, "linear_logprob"),
        checks.head(count, vocabulary, "linear_ppo_loss"),
    ]
    for case in cases:
        for impl in checks.implementations(case.op):
            case.call(None, impl)
            torch.cuda.synchronize()
            print(case.op, impl, flush=True)


if __name__ == "__main__":
    small() if "small" in sys.argv else large()
    torch.cuda.synchronize()
