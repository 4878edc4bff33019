"""The demo's settings: one recipe for all seeds.

It was found by trial on the embedded world; docs/experiments.md has the trials.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from ..config.stages import (
    PPO,
    DemoConfig,
    Engine,
    EvaluateConfig,
    Evaluation,
    Logging,
    Multiplier,
    Optimizer,
    PPOConfig,
    PreferenceConfig,
    Sampling,
    SFTConfig,
    Training,
)


class Sizes(NamedTuple):
    """How much of everything.

    Attributes:
        sft: demonstrations.
        sft_steps: optimiser steps of SFT.
        pairs: prompts whose answers are annotated.
        pair_epochs: epochs of the reward and the cost model.
        prompts: training prompts of PPO.
        validation: prompts of the evaluations during PPO.
        test: held-out prompts of the result.
        ppo_steps: steps of PPO.
    """

    sft: int
    sft_steps: int
    pairs: int
    pair_epochs: int
    prompts: int
    validation: int
    test: int
    ppo_steps: int


FULL = Sizes(
    sft=4000, sft_steps=500, pairs=8000, pair_epochs=2, prompts=4000, validation=256, test=512, ppo_steps=100
)
TINY = Sizes(sft=200, sft_steps=4, pairs=80, pair_epochs=1, prompts=100, validation=16, test=16, ppo_steps=2)

ARCHITECTURE = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
MAX_LENGTH = 64
MAX_NEW_TOKENS = 16
TEMPERATURES = (1.0, 1.4)  # at which the SFT policy answers for annotation
WORLD_ANSWERS = 5  # answers by the world itself among the candidates for each prompt's pair


def engine() -> Engine:
    """The engine of every stage."""
    # A model this small gains nothing from bf16, and little from a second thread. Where other processes used
    # the cores too, two threads that wait for each other made it twenty times slower.
    return Engine(precision="fp32", threads=1)


def log(cfg: DemoConfig) -> Logging:
    """The logging of every stage."""
    return Logging(progress=cfg.progress)


def sampling(temperature: float = 1.0, batch_size: int | None = None) -> Sampling:
    """How a policy answers.

    Args:
        temperature: of the sampling distribution.
        batch_size: prompts at a time.
    """
    return Sampling(
        temperature=temperature,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
        max_prompt_length=MAX_LENGTH - MAX_NEW_TOKENS,
    )


def sft(folder: Path, seed: int, cfg: DemoConfig, sizes: Sizes) -> SFTConfig:
    """SFT from random weights; `folder` is that of one seed."""
    return SFTConfig(
        model=str(folder / "base"),
        data=str(folder / "data" / "sft.jsonl"),
        output=str(folder / "sft"),
        seed=seed,
        train=Training(epochs=100, max_steps=sizes.sft_steps, batch_size=64, max_length=MAX_LENGTH),
        optim=Optimizer(learning_rate=2e-3),
        engine=engine(),
        log=log(cfg),
    )


def preference(
    folder: Path, kind: Literal["reward", "cost"], seed: int, cfg: DemoConfig, sizes: Sizes
) -> PreferenceConfig:
    """The reward or the cost model; `folder` is that of one seed."""
    return PreferenceConfig(
        model=str(folder / "sft" / "model"),
        data=str(folder / "data" / "pairs.jsonl"),
        output=str(folder / kind),
        seed=seed,
        train=Training(epochs=sizes.pair_epochs, batch_size=64, max_length=MAX_LENGTH, eval_fraction=0.05),
        optim=Optimizer(learning_rate=1e-3, weight_decay=0.1),
        engine=engine(),
        log=log(cfg),
    )


def ppo(
    folder: Path, stage: Literal["ppo", "ppo-lag"], seed: int, cfg: DemoConfig, sizes: Sizes
) -> PPOConfig:
    """PPO-Lag, or "ppo": the same without the constraint; `folder` is that of one seed."""
    constrained = stage == "ppo-lag"
    return PPOConfig(
        model=str(folder / "sft" / "model"),
        reward=str(folder / "reward" / "model"),
        cost=str(folder / "cost" / "model"),
        data=str(folder / "data" / "prompts.jsonl"),
        output=str(folder / stage),
        seed=seed,
        max_length=MAX_LENGTH,
        ppo=PPO(
            batch_size=64, micro_batch_size=64, prompt_epochs=100, max_steps=sizes.ppo_steps, kl_coeff=0.1
        ),
        multiplier=Multiplier(threshold=-4.0, lr=0.1, max=5.0, window=256) if constrained else Multiplier(),
        sampling=sampling(batch_size=256),
        optim=Optimizer(learning_rate=3e-4, weight_decay=0.01),
        critic_optim=Optimizer(learning_rate=1e-3, schedule="constant"),
        evaluation=Evaluation(
            data=str(folder / "data" / "validation.jsonl"),
            interval=10,
            select=True,
            margin=0.8 if constrained else 0.0,
        ),
        engine=engine(),
        log=log(cfg),
    )


def evaluation(folder: Path, policy: str, seed: int) -> EvaluateConfig:
    """The evaluation of one policy on held-out prompts.

    Args:
        folder: that of one seed.
        policy: the folder in it where the policy is.
        seed: the run's seed.
    """
    return EvaluateConfig(
        model=str(folder / policy / "model"),
        prompts=str(folder / "data" / "test.jsonl"),
        reference=str(folder / "sft" / "model"),
        reward=str(folder / "reward" / "model"),
        cost=str(folder / "cost" / "model"),
        seed=seed,
        max_length=MAX_LENGTH,
        batch_size=128,
        sampling=sampling(),
        engine=engine(),
    )
