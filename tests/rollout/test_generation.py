"""Rollouts with `generate` of transformers: seeds per sequence, rows that end early, limits, stop strings."""

import dataclasses
import json

import forked
import generation_kit
import kit
import pytest
import torch
from tolerance import assert_near_in_another_batch

from saferlhf_fast.config.stages import Sampling
from saferlhf_fast.errors import UserError
from saferlhf_fast.models.sampling_distribution import context_of, sampling_logprob
from saferlhf_fast.rollout.engines import open_generator
from saferlhf_fast.rollout.types import Response

pytestmark = pytest.mark.numeric

ENDS = [2]


@pytest.fixture(scope="module")
def lm():
    return generation_kit.llama()


def sampled(lm, prompts, seeds, limits, ends=ENDS, **sampling):
    sampling = Sampling(engine="generate", **sampling)
    generator = open_generator(generation_kit.actor(lm), generation_kit.tokenizer(), ends, sampling)
    return generator.generate(prompts, seeds, limits)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 6},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3},
    ],
)
def test_samples_and_log_probs_equal_those_of_one_sequence_at_a_time(lm, settings):
    prompts = generation_kit.prompts()
    seeds, limits = [100 + i for i in range(7)], [9, 1, 30, 4, 17, 12, 2]
    responses = sampled(lm, prompts, seeds, limits, **settings)
    lengths = set()
    for response, prompt, seed, limit in zip(responses, prompts, seeds, limits):
        ids, logp, ended = generation_kit.naive(lm, prompt, seed, limit, ENDS, Sampling(**settings))
        assert (response.ids, response.ended) == (ids, ended)
        assert_near_in_another_batch(response.logp, logp)
        lengths.add(len(ids))
    assert len(lengths) > 3


def test_a_sample_depends_on_prompt_and_seed_alone(lm):
    prompts, seeds, limits = generation_kit.prompts(), list(range(7)), [20] * 7
    one_batch = sampled(lm, prompts, seeds, limits)
    by_two = sampled(lm, prompts, seeds, limits, batch_size=2)
    in_reverse = sampled(lm, prompts[::-1], seeds[::-1], limits)[::-1]
    one_by_one = [sampled(lm, [p], [s], [20])[0] for p, s in zip(prompts, seeds)]
    assert (
        [r.ids for r in one_batch]
        == [r.ids for r in by_two]
        == [r.ids for r in in_reverse]
        == [r.ids for r in one_by_one]
    )
    assert [r.ids for r in sampled(lm, prompts, [s + 50 for s in seeds], limits)] != [
        r.ids for r in one_batch
    ]
    # A longer limit only adds tokens.
    assert [r.ids[:20] for r in sampled(lm, prompts, seeds, [40] * 7)] == [r.ids for r in one_batch]


def test_several_seeds_of_one_prompt_give_different_samples(lm):
    prompt = generation_kit.prompts(1)
    responses = sampled(lm, prompt * 6, list(range(6)), [12] * 6)
    assert len({tuple(r.ids) for r in responses}) == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 6},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3},
    ],
)
def test_log_probs_of_sampling_equal_those_of_scoring(lm, settings):
    prompts = generation_kit.prompts()
    responses = sampled(lm, prompts, list(range(7)), [10] * 7, **settings)
    sequences = [p + r.ids for p, r in zip(prompts, responses)]
    starts = [sum(map(len, sequences[:i])) for i in range(7)]
    rows = torch.tensor(
        [
            s + t
            for s, p, r in zip(starts, prompts, responses)
            for t in range(len(p) - 1, len(p) + len(r.ids) - 1)
        ]
    )
    ids = torch.tensor(sum(sequences, []))
    with torch.no_grad():
        hidden = torch.cat([lm.model(torch.tensor([s])).last_hidden_state[0] for s in sequences])
        scored = sampling_logprob(
            hidden[rows],
            lm.lm_head.weight,
            None,
            None,
            1.0,
            ids[rows + 1],
            Sampling(**settings),
            context_of(ids, [len(s) for s in sequences], rows),
        )
    assert_near_in_another_batch(scored, sum((r.logp for r in responses), []))


def test_rows_that_have_ended_leave_the_batch(lm):
    """After the ends of seven short sequences the batch has the long one alone."""
    sizes = []
    handle = lm.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        responses = sampled(lm, generation_kit.prompts(8), list(range(8)), [40] + [3] * 7, ends=[])
    finally:
        handle.remove()
    assert [len(r.ids) for r in responses] == [40] + [3] * 7 and not any(r.ended for r in responses)
    assert sizes == [8] * 3 + [1] * 37


def test_a_response_ends_with_an_end_token_or_at_its_limit(lm):
    """The end token is the last of the response; a response that reaches its limit has `ended` False."""
    responses = sampled(lm, generation_kit.prompts(12), list(range(12)), [40] * 12, ends=[2, 5, 9])
    assert 2 < sum(r.ended for r in responses) < 12
    for response in responses:
        assert not set(response.ids[:-1]) & {2, 5, 9}
        assert response.ended == (response.ids[-1] in (2, 5, 9)) and (
            response.ended or len(response.ids) == 40
        )
        assert len(response.logp) == len(response.ids)


def test_an_end_token_in_the_prompt_does_not_end_the_response(lm):
    prompt = [7, 2, 11]
    assert len(sampled(lm, [prompt], [1], [5], ends=[2])[0].ids) == len(
        generation_kit.naive(lm, prompt, 1, 5, [2], Sampling())[0]
    )


def test_stop_strings_cut_after_the_token_that_completes_them(lm):
    tokenizer = generation_kit.tokenizer()
    prompts, seeds = generation_kit.prompts(12), list(range(12))
    unstopped = sampled(lm, prompts, seeds, [30] * 12, ends=[])
    texts = [tokenizer.decode(r.ids) for r in unstopped]
    two_tokens = tokenizer.decode(unstopped[0].ids[3:5])  # a text of two tokens
    one_token = tokenizer.decode(unstopped[1].ids[:1])
    assert len(two_tokens.split()) == 2 and one_token
    responses = sampled(lm, prompts, seeds, [30] * 12, ends=[], stop=[two_tokens, one_token])
    for response, full, text in zip(responses, unstopped, texts):
        if two_tokens not in text and one_token not in text:
            assert response.ids == full.ids and not response.ended
            # other rows have left the batch before this one
            assert_near_in_another_batch(response.logp, full.logp)
            continue
        assert response.ended and response.ids == full.ids[: len(response.ids)]
        assert_near_in_another_batch(response.logp, full.logp[: len(response.ids)])
        decoded = tokenizer.decode(response.ids)
        assert two_tokens in decoded or one_token in decoded
        assert not any(s in tokenizer.decode(response.ids[:-1]) for s in (two_tokens, one_token))
    assert len(responses[0].ids) == 5 or one_token in tokenizer.decode(responses[0].ids)
    assert len(responses[1].ids) == 1


@pytest.mark.parametrize("engine", ["generate", "continuous"])
def test_an_end_mark_of_several_tokens_ends_when_it_is_complete(lm, engine):
    """Its single tokens end nothing; it counts as an end of its own, beside end tokens and stop strings."""
    tokenizer = generation_kit.tokenizer()
    prompts, seeds, limits = generation_kit.prompts(4), list(range(4)), [20] * 4
    free = sampled(lm, prompts, seeds, limits, ends=[])
    mark = tokenizer.decode(free[0].ids[6:9])
    assert len(mark.split()) == 3 and mark not in tokenizer.decode(free[0].ids[:8])
    generator = open_generator(
        generation_kit.actor(lm), tokenizer, [2, mark], Sampling(engine=engine, stop=["nothing"])
    )
    made = generator.generate(prompts, seeds, limits)
    assert made[0].ids == free[0].ids[:9] and made[0].ended and len(made[0].logp) == 9
    for response, before in zip(made[1:], free[1:]):
        assert response.ids == before.ids[: len(response.ids)]
        assert response.ended == (2 in response.ids or mark in tokenizer.decode(response.ids))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "qwen2"])
def test_samples_of_other_architectures_equal_naive_sampling(architecture):
    """GPT-2: absolute positions; Gemma 2: sliding windows and soft-capped attention; Qwen2: tied heads."""
    import transformers

    torch.manual_seed(0)
    if architecture == "gpt2":
        lm = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128)
        )
    elif architecture == "gemma2":
        lm = transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                vocab_size=61,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                sliding_window=6,
            )
        )
    else:
        lm = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                vocab_size=61,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
        )
    lm = lm.eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else None
    prompts, seeds, limits = generation_kit.prompts(6), list(range(6)), [14, 2, 9, 20, 3, 6]
    for response, prompt, seed, limit in zip(sampled(lm, prompts, seeds, limits), prompts, seeds, limits):
        ids, logp, ended = generation_kit.naive(lm, prompt, seed, limit, ENDS, Sampling())
        assert response.ids == ids
        assert_near_in_another_batch(response.logp, logp)


def test_a_model_without_a_cache_of_keys_samples_the_same_tokens(lm):
    """Recurrent models have other caches, from which rows cannot be removed."""
    import transformers

    torch.manual_seed(0)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=32
        )
    ).eval()
    prompt = generation_kit.prompts(1)[0]
    responses = sampled(mamba, [prompt] * 3, [0, 1, 2], [9, 2, 5], ends=[])
    for response, seed, limit in zip(responses, range(3), (9, 2, 5)):
        assert response.ids == generation_kit.naive(mamba, prompt, seed, limit, [], Sampling())[0]


def test_adapters_take_part_in_sampling(lm):
    """The model is wrapped by peft."""
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        generation_kit.llama(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts, seeds = generation_kit.prompts(3), [4, 5, 6]
    responses = sampled(wrapped, prompts, seeds, [8] * 3)
    assert [r.ids for r in responses] == [
        generation_kit.naive(wrapped, p, s, 8, ENDS, Sampling())[0] for p, s in zip(prompts, seeds)
    ]
    assert [r.ids for r in responses] != [r.ids for r in sampled(lm, prompts, seeds, [8] * 3)]


def test_the_model_s_own_generation_settings_change_nothing(lm):
    prompts, seeds = generation_kit.prompts(4), list(range(4))
    plain = sampled(lm, prompts, seeds, [8] * 4)
    original = lm.generation_config
    lm.generation_config = type(original)(
        repetition_penalty=9.0, min_p=0.9, num_beams=2, eos_token_id=plain[0].ids[0]
    )
    changed = lm.generation_config
    try:
        assert sampled(lm, prompts, seeds, [8] * 4) == plain and lm.generation_config is changed
    finally:
        lm.generation_config = original


def test_a_model_with_nan_weights_does_not_end_the_process():
    lm = generation_kit.llama()
    lm.lm_head.weight.data.fill_(torch.nan)
    responses = sampled(lm, generation_kit.prompts(2), [0, 1], [3, 3], ends=[])
    assert all(len(r.ids) == 3 and max(r.ids) < 61 for r in responses) and str(responses[0].logp[0]) == "nan"


def test_no_prompts_give_no_responses(lm):
    assert sampled(lm, [], [], []) == []


def test_the_weight_sharing_copy_shares_memory_and_has_no_hooks(lm):
    from saferlhf_fast.rollout.engines.gathered_weights import weight_sharing_copy

    calls = []
    handle = lm.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        copy = weight_sharing_copy(lm)
        assert [p.data_ptr() for p in copy.parameters()] == [p.data_ptr() for p in lm.parameters()]
        assert not any(p.requires_grad for p in copy.parameters()) and all(
            p.requires_grad for p in lm.parameters()
        )
        ids = torch.tensor([[5, 6, 7]])
        expected = lm(ids).logits
        calls.clear()
        torch.testing.assert_close(copy(ids).logits, expected, rtol=0, atol=0)
        assert not calls
    finally:
        handle.remove()


def test_auto_chooses_an_engine_and_an_unknown_name_is_refused(lm):
    actor, tokenizer = generation_kit.actor(lm), generation_kit.tokenizer()
    from saferlhf_fast.rollout.engines.hf_generate import Generate

    auto = open_generator(actor, tokenizer, ENDS, Sampling())
    assert isinstance(auto, Generate) or torch.cuda.is_available()
    assert dataclasses.is_dataclass(Response)
    with pytest.raises(UserError):
        from saferlhf_fast.config import load

        load.build(
            "ppo", {"model": "a", "reward": "b", "data": "c", "output": "d", "sampling": {"engine": "sglang"}}
        )


def test_zero_3_in_two_processes_samples_the_tokens_of_one_process(tmp_path):
    """The ranks have different prompts and lengths, and one has no prompt."""
    out = tmp_path / "out.json"
    completed = forked.run([kit.SUPPORT / "generation_worker.py", out], processes=2, timeout=200)
    assert completed.returncode == 0, completed.stderr[-3000:]
    results = json.loads(out.read_text())
    prompts, seeds, limits = generation_kit.prompts(5), list(range(5)), [12, 3, 7, 2, 9]
    expected = [r.ids for r in sampled(generation_kit.llama(), prompts, seeds, limits)]
    for gather in ("true", "false"):
        # After the first rollout the weights are sharded; the second one uses the trained weights.
        assert (
            results[gather]["before"] == expected
            and results[gather]["sharded"]
            and results[gather]["seconds"] < 60
        )
        assert results[gather]["after"] == results["trained"] != expected
