"""Run by test_generation.py in two processes: rollouts of a model under ZeRO-3, before and after training.

The settings let DeepSpeed keep no weight longer than its layer runs. By default it keeps all weights of a
model as small as this one, and then ranks that run different numbers of passes would go unnoticed.
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


class LMModule(torch.nn.Module):
    """A module with the attribute `lm`, as generation expects it of a Policy."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids):
        return self.lm(ids).logits


def rollout(generator, counts):
    """The samples of both ranks in order; counts: the number of prompts of each rank."""
    prompts, seeds, limits = generation_kit.prompts(5), list(range(5)), [12, 3, 7, 2, 9]
    start = sum(counts[: engine.rank()])
    own = slice(start, start + counts[engine.rank()])
    responses = generator.generate(prompts[own], seeds[own], limits[own])
    return [r.ids for of_rank in engine.gather_objects(responses) for r in of_rank]


def main(out):
    keep_nothing = dict.fromkeys(
        (
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
        ),
        0,
    )
    cfg = Engine(zero_stage=3, precision="fp32", config={"zero_optimization": keep_nothing})
    engine.start(cfg, 0)
    lm = generation_kit.llama()
    actor = engine.Engine(
        LMModule(lm), Optimizer(learning_rate=0.05, warmup_ratio=0.0, schedule="constant"), cfg, 4
    )
    generators = {
        gather: open_generator(
            actor, generation_kit.tokenizer(), [2], Sampling(engine="generate", gather=gather, batch_size=2)
        )
        for gather in (True, False)
    }
    results = {}
    for gather, generator in generators.items():
        start = time.perf_counter()
        results[gather] = {"before": rollout(generator, (5, 0))}
        results[gather]["seconds"] = time.perf_counter() - start
        results[gather]["sharded"] = all(p.numel() < p.ds_numel for p in actor.module.parameters())
    actor.train()
    for _ in range(2):
        logits = actor(torch.tensor([[5, 6, 7, 8]]))
        actor.backward(torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor([9, 9, 9])))
        actor.step()
    for gather, generator in generators.items():
        generator.refresh()
        results[gather]["after"] = rollout(generator, (2, 3))
    state = actor.state_dict()
    if engine.rank() == 0:
        gathered_lm = generation_kit.llama()
        LMModule(gathered_lm).load_state_dict(state)
        one_process = open_generator(
            generation_kit.actor(gathered_lm), generation_kit.tokenizer(), [2], Sampling(engine="generate")
        )
        responses = one_process.generate(generation_kit.prompts(5), list(range(5)), [12, 3, 7, 2, 9])
        json.dump({**results, "trained": [r.ids for r in responses]}, open(out, "w"))
    engine.finish()
    os._exit(0)  # the results are written; the end of gloo's threads is not tested here


if __name__ == "__main__":
    main(*sys.argv[1:])
