"""Run by test_generation.py in two processes: rollouts of a model under ZeRO-3, before and after a step of
training.

DeepSpeed is told to keep no weight longer than its layer runs: by default it keeps all of a model as small as
this one, and ranks that do not keep step with each other go unnoticed.
"""

import json
import os
import sys
import time

import generation_kit
import torch

from saferlhf_fast.config.stages import Engine, Optimizer, Sampling
from saferlhf_fast.rollout.engines import open_generator
from saferlhf_fast.runtime import engine


class Holder(torch.nn.Module):
    """What a Policy is to generation."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids):
        return self.lm(ids).logits


def rollout(generator, counts):
    """The samples of both ranks, in order; this rank has as many prompts as counts says."""
    prompts, seeds, limits = generation_kit.prompts(5), list(range(5)), [12, 3, 7, 2, 9]
    start = sum(counts[: engine.rank()])
    mine = slice(start, start + counts[engine.rank()])
    made = generator.generate(prompts[mine], seeds[mine], limits[mine])
    return [r.ids for part in engine.gather_objects(made) for r in part]


def main(out):
    nothing = dict.fromkeys(
        (
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
        ),
        0,
    )
    cfg = Engine(zero_stage=3, precision="fp32", config={"zero_optimization": nothing})
    engine.start(cfg, 0)
    lm = generation_kit.llama()
    actor = engine.Engine(
        Holder(lm), Optimizer(learning_rate=0.05, warmup_ratio=0.0, schedule="constant"), cfg, 4
    )
    generators = {
        gather: open_generator(
            actor, generation_kit.tokenizer(), [2], Sampling(engine="generate", gather=gather, batch_size=2)
        )
        for gather in (True, False)
    }
    found = {}
    for gather, generator in generators.items():
        begun = time.perf_counter()
        found[gather] = {"before": rollout(generator, (5, 0))}
        found[gather]["seconds"] = time.perf_counter() - begun
        found[gather]["sharded"] = all(p.numel() < p.ds_numel for p in actor.module.parameters())
    actor.train()
    for _ in range(2):
        logits = actor(torch.tensor([[5, 6, 7, 8]]))
        actor.backward(torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor([9, 9, 9])))
        actor.step()
    for gather, generator in generators.items():
        generator.refresh()
        found[gather]["after"] = rollout(generator, (2, 3))
    state = actor.state_dict()
    if engine.rank() == 0:
        plain = generation_kit.llama()
        Holder(plain).load_state_dict(state)
        alone = open_generator(
            generation_kit.actor(plain), generation_kit.tokenizer(), [2], Sampling(engine="generate")
        )
        made = alone.generate(generation_kit.prompts(5), list(range(5)), [12, 3, 7, 2, 9])
        json.dump({**found, "trained": [r.ids for r in made]}, open(out, "w"))
    engine.finish()
    os._exit(0)  # the results are written; how gloo's threads end is not what is tested here


if __name__ == "__main__":
    main(*sys.argv[1:])
