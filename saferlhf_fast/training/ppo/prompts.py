"""What a PPO run reads, how often and in which order: prompts, evaluation prompts, supervised examples."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from ...data.batches import global_batches, share, split_by_prompt
from ...data.examples import prompt_examples, sft_examples
from ...rollout.prefetch import RolloutPrefetcher, prefetched_rollouts
from ...rollout.sample import rollouts_now
from ...runtime import console, engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...config.stages import PPOConfig
    from ...data.examples import PromptExample, SFTExample
    from ...data.report import Report
    from ...rollout.roles import Roles
    from ...rollout.types import Rollout


def load_data(
    cfg: "PPOConfig", tokenizer: "PreTrainedTokenizerBase"
) -> "tuple[list[PromptExample], list[PromptExample], list[SFTExample] | None, Report]":
    """Reads all data of a PPO run.

    Args:
        cfg: Settings of the stage.
        tokenizer: The actor's tokenizer.

    Returns:
        (prompts, evaluation prompts, SFT examples for the PTX loss or None, report on the prompts).
    """
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
            "evaluation.data gives ones that are not trained on"
        )
    if cfg.ptx is None or not cfg.trains_on_ptx():
        return prompts, held_out, None, report
    ptx, _ = sft_examples(cfg.ptx, tokenizer, cfg.template, cfg.max_length, cfg.seed)
    return prompts, held_out, ptx, report


def total_steps(n: int, cfg: "PPOConfig") -> int:
    """Number of PPO steps of a run over n prompts.

    Args:
        n: Number of training prompts.
        cfg: Settings of the stage: batch size, epochs and the limit of steps.
    """
    steps = max(1, math.ceil(cfg.ppo.prompt_epochs * n / (cfg.ppo.batch_size * engine.world_size())))
    return min(steps, cfg.ppo.max_steps) if cfg.ppo.max_steps else steps


def prompt_batches(
    prompts: "Sequence[PromptExample]", cfg: "PPOConfig", steps: int
) -> "Iterator[list[PromptExample]]":
    """Yields this rank's prompts of each step.

    Every batch is full, and every prompt comes once before any prompt comes twice.

    Args:
        prompts: All training prompts.
        cfg: Settings of the stage.
        steps: Number of steps.
    """
    size = cfg.ppo.batch_size * engine.world_size()
    order: list[int] = []
    epoch = 0
    for _ in range(steps):
        while len(order) < size:
            order += [i for batch in global_batches(len(prompts), size, cfg.seed, epoch) for i in batch]
            epoch += 1
        batch, order = order[:size], order[size:]
        yield [prompts[i] for i in share(batch, engine.rank(), engine.world_size())]


def rollouts_of(
    roles: "Roles",
    prompts: "Sequence[PromptExample]",
    cfg: "PPOConfig",
    steps: int,
    start: int = 0,
    prefetcher: RolloutPrefetcher | None = None,
) -> "Iterator[tuple[int, Rollout]]":
    """Yields (step, Rollout) of the steps after `start`.

    A rollout is sampled when it is taken or, with `ppo.overlap`, one step ahead.

    Args:
        roles: The policy that samples, and its rollout engine.
        prompts: All training prompts.
        cfg: Settings of the stage.
        steps: The last step.
        start: The step that is already done.
        prefetcher: State of the overlap, which checkpoints store; a new one where None is given.
    """
    batches = enumerate(islice(prompt_batches(prompts, cfg, steps), start, None), start + 1)
    if cfg.ppo.overlap:
        return prefetched_rollouts(roles, batches, cfg, prefetcher or RolloutPrefetcher())
    return rollouts_now(roles, batches, cfg)


def ptx_batches(
    ptx: "Sequence[SFTExample] | None", cfg: "PPOConfig", start: int = 0
) -> "Iterator[list[SFTExample] | None]":
    """Yields the SFT examples of each step's global batch after step `start`, as many as prompts.

    Yields None for each step where `ptx` is None.

    Args:
        ptx: The supervised examples, or None.
        cfg: Settings of the stage.
        start: The step that is already done.
    """
    return islice(_all_ptx_batches(ptx, cfg), start, None)


def _all_ptx_batches(
    ptx: "Sequence[SFTExample] | None", cfg: "PPOConfig"
) -> "Iterator[list[SFTExample] | None]":
    epoch, size = 0, cfg.ppo.batch_size * engine.world_size()
    while True:
        if ptx is None:
            yield None
            continue
        for batch in global_batches(len(ptx), size, cfg.seed + 1, epoch):
            yield [ptx[i] for i in batch]
        epoch += 1
