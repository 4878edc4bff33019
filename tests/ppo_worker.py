"""Run by test_two_processes.py: three PPO-Lag steps on fixed rollouts, in one or more processes."""

import dataclasses
import json
import os
import sys

import torch

from saferlhf_fast import data, engine
from saferlhf_fast.advantage import advantages
from saferlhf_fast.cast import load_cast
from saferlhf_fast.config import PPO, Engine, Optimizer, PPOConfig
from saferlhf_fast.generation import Response
from saferlhf_fast.lagrange import LagrangeMultiplier
from saferlhf_fast.models import load_tokenizer
from saferlhf_fast.rollout import assemble
from saferlhf_fast.score import ask_trained, judge
from saferlhf_fast.steplog import averages
from saferlhf_fast.update import in_one_pass, update, update_in_one_pass

GLOBAL_BATCH = 6


def stored_rollout(step, tokenizer, cfg):
    """This rank's share of a rollout of random tokens, uneven in length, the same for any number of processes."""
    draw = torch.Generator().manual_seed(step)
    rows = []
    for _ in range(GLOBAL_BATCH):
        p, t = torch.randint(3, 7, (2,), generator=draw).tolist()
        ids = torch.randint(4, len(tokenizer), (p + t,), generator=draw).tolist()
        rows.append((ids[:p], ids[p:]))
    mine = [rows[i] for i in data.share(range(GLOBAL_BATCH), engine.rank(), engine.world_size())]
    return assemble([data.PromptExample(p, "", ()) for p, _ in mine], [Response(r, None, True) for _, r in mine], tokenizer,
                    cfg.pass_tokens(), minibatches=cfg.ppo.minibatches)


def main(base, folder, out, stage, ppo):
    cfg = PPOConfig(model=base, reward=f"{folder}/reward/model", cost=f"{folder}/cost/model", data="none", output="none",
                    max_length=64,
                    ppo=PPO(**json.loads(ppo)),
                    optim=Optimizer(learning_rate=1e-3), critic_optim=Optimizer(learning_rate=1e-3),
                    engine=Engine(zero_stage=int(stage), precision="fp32"))
    engine.start(cfg.engine, 0)
    tokenizer = load_tokenizer(base)
    cast = load_cast(cfg, tokenizer, 6, constrained=True)
    multiplier, steps = LagrangeMultiplier(window=8, lr=0.5), []
    prompts = data.SFTExample(tokenizer("what is red", add_special_tokens=False).input_ids, [True] * 3)
    for step in range(3):
        rollout = stored_rollout(step, tokenizer, cfg)
        scored = judge(rollout, cast, cfg)
        multiplier.update(engine.all_gather(scored.cost_B, rollout.order, rollout.size))
        ptx = [prompts] * GLOBAL_BATCH
        if in_one_pass(cfg, cast):
            tally = update_in_one_pass(cast, rollout, scored, multiplier.value, cfg, ptx)
        else:
            scored = dataclasses.replace(scored, **ask_trained(rollout, cast, cfg))
            adv = advantages(rollout.cu_seqlens, scored, multiplier.value, cfg.ppo)
            tally = update(cast, rollout, scored, adv, cfg, ptx)
        steps.append(averages(rollout, scored, tally, multiplier))
    if engine.rank() == 0:
        json.dump(steps, open(out, "w"))
    engine.finish()
    os._exit(0)      # the results are written; how gloo's threads end is not what is tested here


if __name__ == "__main__":
    main(*sys.argv[1:])
