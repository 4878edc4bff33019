"""The prompts of a PPO run, its evaluation prompts and its supervised examples: what is read, how often, in
which order.
"""

import math
from itertools import islice

from ...data.batches import global_batches, share, split_by_prompt
from ...data.examples import prompt_examples, sft_examples
from ...rollout.prefetch import RolloutPrefetcher, prefetched_rollouts
from ...rollout.sample import rollouts_now
from ...runtime import console, engine


def load_data(cfg, tokenizer):
    """-> prompts, evaluation prompts, PTX examples (or None), report."""
    longest = cfg.sampling.prompt_limit(cfg.max_length)
    prompts, report = prompt_examples(cfg.data, tokenizer, cfg.template, longest, cfg.seed)
    if cfg.evaluation.data is not None:
        held_out, _ = prompt_examples(cfg.evaluation.data, tokenizer, cfg.template, longest, cfg.seed)
    elif cfg.evaluation.fraction:
        prompts, held_out = split_by_prompt(prompts, cfg.evaluation.fraction, cfg.seed)
    else:
        held_out = prompts[:64]
        console.say(
            f"evaluation prompts: the first {len(held_out)} training prompts; evaluation.fraction or "
            f"evaluation.data "
            "gives ones that are not trained on"
        )
    ptx = None
    if cfg.trains_on_ptx():
        ptx, _ = sft_examples(cfg.ptx, tokenizer, cfg.template, cfg.max_length, cfg.seed)
    return prompts, held_out, ptx, report


def total_steps(n, cfg):
    """Steps of a run over n prompts."""
    steps = max(1, math.ceil(cfg.ppo.prompt_epochs * n / (cfg.ppo.batch_size * engine.world_size())))
    return min(steps, cfg.ppo.max_steps) if cfg.ppo.max_steps else steps


def prompt_batches(prompts, cfg, steps):
    """This rank's prompts of each step; every batch is full, and every prompt comes once before any comes
    twice.
    """
    size = cfg.ppo.batch_size * engine.world_size()
    order, epoch = [], 0
    for _ in range(steps):
        while len(order) < size:
            order += [i for batch in global_batches(len(prompts), size, cfg.seed, epoch) for i in batch]
            epoch += 1
        batch, order = order[:size], order[size:]
        yield [prompts[i] for i in share(batch, engine.rank(), engine.world_size())]


def rollouts_of(roles, prompts, cfg, steps, start=0, prefetcher=None):
    """Yields (step, Rollout) of the steps after `start`, sampled when it is asked for, or a step ahead.

    prefetcher: a `prefetch.RolloutPrefetcher`, if the recipe overlaps and the run writes checkpoints.
    """
    batches = enumerate(islice(prompt_batches(prompts, cfg, steps), start, None), start + 1)
    if cfg.ppo.overlap:
        return prefetched_rollouts(roles, batches, cfg, prefetcher or RolloutPrefetcher())
    return rollouts_now(roles, batches, cfg)


def ptx_batches(ptx, cfg, start=0):
    """Yields the global batch of supervised examples of each step after `start`, as many as prompts; None
    without PTX.
    """
    return islice(_all_ptx_batches(ptx, cfg), start, None)


def _all_ptx_batches(ptx, cfg):
    epoch, size = 0, cfg.ppo.batch_size * engine.world_size()
    while True:
        if ptx is None:
            yield None
            continue
        for batch in global_batches(len(ptx), size, cfg.seed + 1, epoch):
            yield [ptx[i] for i in batch]
        epoch += 1
