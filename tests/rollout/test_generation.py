"""Rollouts through transformers' `generate`: one seed per sequence, rows that leave the batch, limits, ends,
stop strings.
"""

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
def test_samples_and_log_probs_are_those_of_one_sequence_at_a_time(lm, settings):
    prompts = generation_kit.prompts()
    seeds, limits = [100 + i for i in range(7)], [9, 1, 30, 4, 17, 12, 2]
    got = sampled(lm, prompts, seeds, limits, **settings)
    lengths = set()
    for response, prompt, seed, limit in zip(got, prompts, seeds, limits):
        ids, logp, ended = generation_kit.naive(lm, prompt, seed, limit, ENDS, Sampling(**settings))
        assert (response.ids, response.ended) == (ids, ended)
        assert_near_in_another_batch(response.logp, logp)
        lengths.add(len(ids))
    assert len(lengths) > 3


def test_a_sample_depends_on_prompt_and_seed_alone(lm):
    prompts, seeds, limits = generation_kit.prompts(), list(range(7)), [20] * 7
    whole = sampled(lm, prompts, seeds, limits)
    by_two = sampled(lm, prompts, seeds, limits, batch_size=2)
    turned = sampled(lm, prompts[::-1], seeds[::-1], limits)[::-1]
    alone = [sampled(lm, [p], [s], [20])[0] for p, s in zip(prompts, seeds)]
    assert (
        [r.ids for r in whole] == [r.ids for r in by_two] == [r.ids for r in turned] == [r.ids for r in alone]
    )
    assert [r.ids for r in sampled(lm, prompts, [s + 50 for s in seeds], limits)] != [r.ids for r in whole]
    # A longer limit only goes on.
    assert [r.ids[:20] for r in sampled(lm, prompts, seeds, [40] * 7)] == [r.ids for r in whole]


def test_one_prompt_several_seeds(lm):
    prompt = generation_kit.prompts(1)
    made = sampled(lm, prompt * 6, list(range(6)), [12] * 6)
    assert len({tuple(r.ids) for r in made}) == 6


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
def test_log_probs_are_those_that_scoring_gives(lm, settings):
    prompts = generation_kit.prompts()
    made = sampled(lm, prompts, list(range(7)), [10] * 7, **settings)
    sequences = [p + r.ids for p, r in zip(prompts, made)]
    starts = [sum(map(len, sequences[:i])) for i in range(7)]
    rows = torch.tensor(
        [s + t for s, p, r in zip(starts, prompts, made) for t in range(len(p) - 1, len(p) + len(r.ids) - 1)]
    )
    ids = torch.tensor(sum(sequences, []))
    with torch.no_grad():
        hidden = torch.cat([lm.model(torch.tensor([s])).last_hidden_state[0] for s in sequences])
        got = sampling_logprob(
            hidden[rows],
            lm.lm_head.weight,
            None,
            None,
            1.0,
            ids[rows + 1],
            Sampling(**settings),
            context_of(ids, [len(s) for s in sequences], rows),
        )
    assert_near_in_another_batch(got, sum((r.logp for r in made), []))


def test_rows_that_have_ended_leave_the_batch(lm):
    """One long sequence among short ones: the passes after the short ones' ends hold it alone."""
    sizes = []
    handle = lm.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        made = sampled(lm, generation_kit.prompts(8), list(range(8)), [40] + [3] * 7, ends=[])
    finally:
        handle.remove()
    assert [len(r.ids) for r in made] == [40] + [3] * 7 and not any(r.ended for r in made)
    assert sizes == [8] * 3 + [1] * 37


def test_ends(lm):
    """The end token belongs to the response and is the last; at a limit a response has not ended by
    itself.
    """
    made = sampled(lm, generation_kit.prompts(12), list(range(12)), [40] * 12, ends=[2, 5, 9])
    assert 2 < sum(r.ended for r in made) < 12
    for response in made:
        assert not set(response.ids[:-1]) & {2, 5, 9}
        assert response.ended == (response.ids[-1] in (2, 5, 9)) and (
            response.ended or len(response.ids) == 40
        )
        assert len(response.logp) == len(response.ids)


def test_an_end_token_in_the_prompt_ends_nothing(lm):
    prompt = [7, 2, 11]
    assert len(sampled(lm, [prompt], [1], [5], ends=[2])[0].ids) == len(
        generation_kit.naive(lm, prompt, 1, 5, [2], Sampling())[0]
    )


def test_stop_strings_cut_after_the_token_that_completes_them(lm):
    tokenizer = generation_kit.tokenizer()
    prompts, seeds = generation_kit.prompts(12), list(range(12))
    free = sampled(lm, prompts, seeds, [30] * 12, ends=[])
    words = [tokenizer.decode(r.ids) for r in free]
    two = tokenizer.decode(free[0].ids[3:5])  # a text over two tokens
    one = tokenizer.decode(free[1].ids[:1])
    assert len(two.split()) == 2 and one
    made = sampled(lm, prompts, seeds, [30] * 12, ends=[], stop=[two, one])
    for response, before, text in zip(made, free, words):
        if two not in text and one not in text:
            assert response.ids == before.ids and not response.ended
            # others have left the batch meanwhile
            assert_near_in_another_batch(response.logp, before.logp)
            continue
        assert response.ended and response.ids == before.ids[: len(response.ids)]
        assert_near_in_another_batch(response.logp, before.logp[: len(response.ids)])
        said = tokenizer.decode(response.ids)
        assert two in said or one in said
        assert not any(s in tokenizer.decode(response.ids[:-1]) for s in (two, one))
    assert len(made[0].ids) == 5 or one in tokenizer.decode(made[0].ids)
    assert len(made[1].ids) == 1


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
def test_other_architectures(architecture):
    """Absolute positions; sliding windows and soft-capped attention; tied heads."""
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


def test_a_model_without_a_cache_of_keys_is_one_call(lm):
    """Recurrent models bring caches of their own kind, from which no rows are taken out."""
    import transformers

    torch.manual_seed(0)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=32
        )
    ).eval()
    prompt = generation_kit.prompts(1)[0]
    made = sampled(mamba, [prompt] * 3, [0, 1, 2], [9, 2, 5], ends=[])
    for response, seed, limit in zip(made, range(3), (9, 2, 5)):
        assert response.ids == generation_kit.naive(mamba, prompt, seed, limit, [], Sampling())[0]


def test_adapters_answer(lm):
    """A model inside peft: its adapters take part."""
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        generation_kit.llama(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts, seeds = generation_kit.prompts(3), [4, 5, 6]
    made = sampled(wrapped, prompts, seeds, [8] * 3)
    assert [r.ids for r in made] == [
        generation_kit.naive(wrapped, p, s, 8, ENDS, Sampling())[0] for p, s in zip(prompts, seeds)
    ]
    assert [r.ids for r in made] != [r.ids for r in sampled(lm, prompts, seeds, [8] * 3)]


def test_the_model_s_own_generation_settings_change_nothing(lm):
    prompts, seeds = generation_kit.prompts(4), list(range(4))
    plain = sampled(lm, prompts, seeds, [8] * 4)
    own = lm.generation_config
    lm.generation_config = type(own)(
        repetition_penalty=9.0, min_p=0.9, num_beams=2, eos_token_id=plain[0].ids[0]
    )
    mine = lm.generation_config
    try:
        assert sampled(lm, prompts, seeds, [8] * 4) == plain and lm.generation_config is mine
    finally:
        lm.generation_config = own


def test_a_diverged_model_is_not_the_end_of_the_process():
    lm = generation_kit.llama()
    lm.lm_head.weight.data.fill_(torch.nan)
    made = sampled(lm, generation_kit.prompts(2), [0, 1], [3, 3], ends=[])
    assert all(len(r.ids) == 3 and max(r.ids) < 61 for r in made) and str(made[0].logp[0]) == "nan"


def test_no_prompts(lm):
    assert sampled(lm, [], [], []) == []


def test_gathered_twin_shares_memory_and_has_no_hooks(lm):
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


def test_engines_by_name(lm):
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


def test_zero_3_in_two_processes(tmp_path):
    """Ranks with other prompts, other lengths and one without any: the samples of one process with whole
    weights.
    """
    out = tmp_path / "out.json"
    done = forked.run([kit.SUPPORT / "generation_worker.py", out], processes=2, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    prompts, seeds, limits = generation_kit.prompts(5), list(range(5)), [12, 3, 7, 2, 9]
    expected = [r.ids for r in sampled(generation_kit.llama(), prompts, seeds, limits)]
    for gather in ("true", "false"):
        # The first rollout left the weights sharded, and the second sees those of the step between.
        assert (
            found[gather]["before"] == expected and found[gather]["sharded"] and found[gather]["seconds"] < 60
        )
        assert found[gather]["after"] == found["trained"] != expected
