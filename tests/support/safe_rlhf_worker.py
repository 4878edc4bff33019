"""safe-rlhf's own PPO-Lag trainer, two updates on stored responses of a tiny model: python
safe_rlhf_worker.py [patched].

The last line of stdout is a JSON object: {"steps": what each rl_step returned, "calls": calls of ours}.
"""

import json
import os
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"


def main(patched):
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    sys.path[:0] = [str(BENCH), str(BENCH.parent)]
    import step_safe_rlhf
    import torch
    from step_work import BOS, EOS, FIRST, PAD, SHAPES, Work

    step_safe_rlhf.stand_in()
    report = None
    if patched:
        from saferlhf_fast import integrations

        report = integrations.patch("safe_rlhf", quiet=True)
    generator = torch.Generator().manual_seed(3)

    def ids(count):
        return torch.randint(FIRST, SHAPES["tiny"].vocabulary, (count,), generator=generator).tolist()

    work = Work(
        [[BOS, *ids(3 + row)] for row in range(4)], [[*ids(7 - row), EOS] for row in range(4)], "tiny"
    )
    side = step_safe_rlhf.Side(work, {"device": "cpu", "micro": 2, "ptx": False, "prompts": 4})
    trainer, found = side.trainer, []
    prompts = side.batch["input_ids"]
    for _ in range(2):
        parts = []
        trainer.set_eval()
        for at in (0, 2):
            width = max(work.limits[at : at + 2])
            answers = torch.tensor([row + [PAD] * (width - len(row)) for row in work.responses[at : at + 2]])
            sequence = torch.cat([prompts[at : at + 2], answers], 1)
            parts.append(trainer.post_rollout(prompts[at : at + 2], sequence, sequence.ne(PAD)))
        found += side.update(parts)
    print("\n" + json.dumps({"steps": found, "calls": report.calls if report else {}}))


if __name__ == "__main__":
    main(sys.argv[1:] == ["patched"])
