"""One PPO-Lag step on a small random Llama, and its parts: rollout, scoring, advantages, update.

The weights are random, since only the trainer is timed: 32 prompts of 24 tokens, 48 new tokens each.
"""

import dataclasses
import itertools

import pytest
import torch

PROMPTS, PROMPT_LENGTH, NEW_TOKENS, VOCABULARY = 32, 24, 48, 4096


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """Returns roles, config, prompts and one rollout with its scores."""
    import plan_memory
    from transformers import LlamaConfig, LlamaForCausalLM

    from saferlhf_fast.config.stages import PPO, PPOConfig, Sampling
    from saferlhf_fast.data.examples import PromptExample
    from saferlhf_fast.models.causal_lm import save_causal_lm
    from saferlhf_fast.models.score_checkpoint import save_score_model
    from saferlhf_fast.models.score_model import load_score_model
    from saferlhf_fast.rollout.sample import sample
    from saferlhf_fast.rollout.scoring import old_logprobs_and_values, score_rollout
    from saferlhf_fast.runtime import engine
    from saferlhf_fast.training.ppo.advantage import advantages
    from saferlhf_fast.training.ppo.load_roles import load_roles

    folder = tmp_path_factory.mktemp("step")
    tokenizer = plan_memory.tokenizer_of(VOCABULARY)
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    save_causal_lm(folder / "actor", lm, tokenizer)
    for kind in ("reward", "cost"):
        scorer = load_score_model(str(folder / "actor"), new_head=True)
        save_score_model(folder / kind, scorer, tokenizer, kind=kind)
    cfg = PPOConfig(
        model=str(folder / "actor"),
        reward=str(folder / "reward"),
        cost=str(folder / "cost"),
        data="none",
        output="none",
        max_length=PROMPT_LENGTH + NEW_TOKENS,
        ppo=PPO(micro_batch_size=16),
        sampling=Sampling(max_new_tokens=NEW_TOKENS),
    )
    engine.start(cfg.engine, 0)
    roles = load_roles(cfg, tokenizer, 1000, constrained=True)
    draw = torch.Generator().manual_seed(1)
    prompts = [
        PromptExample(torch.randint(5, VOCABULARY, (PROMPT_LENGTH,), generator=draw).tolist(), "", ())
        for _ in range(PROMPTS)
    ]
    from types import SimpleNamespace

    state = SimpleNamespace(
        roles=roles, cfg=cfg, prompts=prompts, multipliers={"cost": torch.tensor(1.0, device=engine.device())}
    )
    state.rollout = sample(roles, prompts, cfg, 0)
    state.scored = score_rollout(state.rollout, roles, cfg)
    state.with_old_logprobs = dataclasses.replace(
        state.scored, **old_logprobs_and_values(state.rollout, roles, cfg)
    )
    state.adv = advantages(state.rollout.cu_seqlens, state.with_old_logprobs, state.multipliers, cfg.ppo)
    return state


PARTS = (
    "rollout",
    "score_rollout",
    "old_logprobs_and_values",
    "advantages",
    "update",
    "update_in_one_pass",
    "whole",
)


@pytest.mark.parametrize("part", PARTS)
def test_step(step, benchmark, part):
    from saferlhf_fast.rollout.sample import sample
    from saferlhf_fast.rollout.scoring import old_logprobs_and_values, score_rollout
    from saferlhf_fast.runtime import engine
    from saferlhf_fast.training.ppo.advantage import advantages
    from saferlhf_fast.training.ppo.update import update, update_in_one_pass

    roles, cfg, rollout, multipliers = step.roles, step.cfg, step.rollout, step.multipliers

    def whole():
        fresh = sample(roles, step.prompts, cfg, 0)
        return update_in_one_pass(roles, fresh, score_rollout(fresh, roles, cfg), multipliers, cfg)

    run = {
        "rollout": lambda: sample(roles, step.prompts, cfg, 0),
        "score_rollout": lambda: score_rollout(rollout, roles, cfg),
        "old_logprobs_and_values": lambda: old_logprobs_and_values(rollout, roles, cfg),
        "advantages": lambda: advantages(rollout.cu_seqlens, step.with_old_logprobs, multipliers, cfg.ppo),
        "update": lambda: update(roles, rollout, step.with_old_logprobs, step.adv, cfg),
        "update_in_one_pass": lambda: update_in_one_pass(roles, rollout, step.scored, multipliers, cfg),
        "whole": whole,
    }[part]

    def waited():
        run()
        if engine.device().type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"ppo_lag_step {PROMPTS}x{PROMPT_LENGTH}+{NEW_TOKENS}"
    benchmark.extra_info.update(tokens=sum(rollout.lengths), device=str(engine.device()))
    benchmark.pedantic(waited, rounds=5, warmup_rounds=1, iterations=1)
    assert all(torch.isfinite(p).all() for p in itertools.islice(step.roles.actor.module.parameters(), 3))
