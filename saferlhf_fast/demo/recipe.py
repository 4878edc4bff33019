"""The demo's settings: one recipe for all seeds, found by trial on the embedded world (docs/experiments.md
has the trials).
"""

from collections import namedtuple

from ..config.stages import (
    PPO,
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

Sizes = namedtuple("Sizes", "sft sft_steps pairs pair_epochs prompts validation test ppo_steps")
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
OWN = 5  # answers of the world's own in each prompt's pool


def engine(cfg):
    # A model this small gains nothing from bf16, and little from a second thread: on cores that others use
    # too, two threads that wait for each other made it twenty times slower.
    return Engine(precision="fp32", threads=1)


def log(cfg):
    return Logging(progress=cfg.progress)


def sampling(temperature=1.0, batch_size=None):
    return Sampling(
        temperature=temperature,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
        max_prompt_length=MAX_LENGTH - MAX_NEW_TOKENS,
    )


def sft(folder, seed, cfg, sizes):
    return SFTConfig(
        model=str(folder / "base"),
        data=str(folder / "data" / "sft.jsonl"),
        output=str(folder / "sft"),
        seed=seed,
        train=Training(epochs=100, max_steps=sizes.sft_steps, batch_size=64, max_length=MAX_LENGTH),
        optim=Optimizer(learning_rate=2e-3),
        engine=engine(cfg),
        log=log(cfg),
    )


def preference(folder, kind, seed, cfg, sizes):
    return PreferenceConfig(
        model=str(folder / "sft" / "model"),
        data=str(folder / "data" / "pairs.jsonl"),
        output=str(folder / kind),
        seed=seed,
        train=Training(epochs=sizes.pair_epochs, batch_size=64, max_length=MAX_LENGTH, eval_fraction=0.05),
        optim=Optimizer(learning_rate=1e-3, weight_decay=0.1),
        engine=engine(cfg),
        log=log(cfg),
    )


def ppo(folder, stage, seed, cfg, sizes):
    """stage: "ppo", which knows no constraint, or "ppo-lag"."""
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
        engine=engine(cfg),
        log=log(cfg),
    )


def evaluation(folder, where, seed, cfg):
    return EvaluateConfig(
        model=str(folder / where / "model"),
        prompts=str(folder / "data" / "test.jsonl"),
        reference=str(folder / "sft" / "model"),
        reward=str(folder / "reward" / "model"),
        cost=str(folder / "cost" / "model"),
        seed=seed,
        max_length=MAX_LENGTH,
        batch_size=128,
        sampling=sampling(),
        engine=engine(cfg),
    )
