"""Rollouts with continuous batching on the CPU give the same samples as `generate`."""

import generation_kit
import pytest
import torch
from tolerance import assert_near_in_another_batch

from saferlhf_fast.config.stages import Sampling
from saferlhf_fast.errors import UserError
from saferlhf_fast.models import attention
from saferlhf_fast.rollout.engines import continuous, open_generator

pytestmark = pytest.mark.numeric

ENDS = [2]
ALL = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def lm():
    return generation_kit.llama()


def sampled(lm, engine, prompts, seeds, limits, ends=ENDS, **sampling):
    generator = open_generator(
        generation_kit.actor(lm), generation_kit.tokenizer(), ends, Sampling(engine=engine, **sampling)
    )
    responses = generator.generate(prompts, seeds, limits)
    generator.refresh()
    generator.close()
    return responses


def assert_same(responses, expected):
    assert [(r.ids, r.ended) for r in responses] == [(r.ids, r.ended) for r in expected]
    for a, b in zip(responses, expected):
        assert_near_in_another_batch(a.logp, b.logp)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"repetition_penalty": 1.4}, ALL])
def test_samples_equal_those_of_generate(lm, settings):
    prompts, seeds, limits = generation_kit.prompts(), [50 + i for i in range(7)], [9, 1, 30, 4, 17, 12, 2]
    responses = sampled(lm, "continuous", prompts, seeds, limits, **settings)
    assert_same(responses, sampled(lm, "generate", prompts, seeds, limits, **settings))
    assert len({len(r.ids) for r in responses}) > 3


def test_the_batch_size_changes_no_sample_of_repeated_prompts(lm):
    prompts, seeds, limits = generation_kit.prompts(2) * 3, list(range(6)), [12] * 6
    one_batch = sampled(lm, "continuous", prompts, seeds, limits)
    assert_same(sampled(lm, "continuous", prompts, seeds, limits, batch_size=4), one_batch)
    assert len({tuple(r.ids) for r in one_batch}) == 6


def test_end_tokens_and_stop_strings_end_responses_as_in_generate(lm):
    tokenizer = generation_kit.tokenizer()
    prompts, seeds, limits = generation_kit.prompts(8), list(range(8)), [25] * 8
    unstopped = sampled(lm, "generate", prompts, seeds, limits, ends=[])
    stop = [tokenizer.decode(unstopped[0].ids[3:5]), tokenizer.decode(unstopped[1].ids[:1])]
    ends = [2, unstopped[2].ids[4]]
    responses = sampled(lm, "continuous", prompts, seeds, limits, ends=ends, stop=stop)
    assert_same(responses, sampled(lm, "generate", prompts, seeds, limits, ends=ends, stop=stop))
    assert len(responses[1].ids) == 1 and 1 < sum(r.ended for r in responses) <= 8


def test_a_sequence_that_lost_its_cache_continues_with_the_same_tokens(lm, monkeypatch):
    """The cache has room for two of five sequences; the others wait or restart with their tokens."""
    prompts, seeds, limits = generation_kit.prompts(5), list(range(5)), [60, 50, 40, 60, 30]
    settings = continuous.settings

    def small(*args):
        config = settings(*args)
        if hasattr(config, "page_size"):
            config.page_size = 8
        else:
            config.block_size = 8
        config.num_blocks = 18
        config.allow_block_sharing = False
        return config

    monkeypatch.setattr(continuous, "settings", small)
    restarts = []
    from transformers.generation.continuous_batching.requests import RequestState

    restart = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState,
        "create_equivalent_initial_request",
        lambda self: restarts.append(len(self.generated_tokens)) or restart(self),
    )
    responses = sampled(lm, "continuous", prompts, seeds, limits, ends=[], repetition_penalty=1.2)
    assert_same(responses, sampled(lm, "generate", prompts, seeds, limits, ends=[], repetition_penalty=1.2))
    assert any(restarts)


def test_attention_for_packed_sequences_is_replaced_while_sampling_and_restored(lm):
    prompts, seeds, limits = generation_kit.prompts(3), [1, 2, 3], [6] * 3
    expected = sampled(lm, "continuous", prompts, seeds, limits)
    packed_lm = generation_kit.llama()
    assert attention.install(packed_lm)
    implementation = packed_lm.config._attn_implementation
    assert_same(sampled(packed_lm, "continuous", prompts, seeds, limits), expected)
    assert packed_lm.config._attn_implementation == implementation != lm.config._attn_implementation


def test_sliding_windows_and_softcaps_give_the_samples_of_generate():
    import transformers

    torch.manual_seed(0)
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
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else None
    prompts, seeds, limits = generation_kit.prompts(4), list(range(4)), [14, 3, 9, 6]
    assert_same(
        sampled(lm, "continuous", prompts, seeds, limits), sampled(lm, "generate", prompts, seeds, limits)
    )


def test_adapters_take_part_in_sampling(lm):
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        generation_kit.llama(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts, seeds, limits = generation_kit.prompts(3), [4, 5, 6], [8] * 3
    responses = sampled(wrapped, "continuous", prompts, seeds, limits)
    assert_same(responses, sampled(wrapped, "generate", prompts, seeds, limits))
    assert [r.ids for r in responses] != [r.ids for r in sampled(lm, "generate", prompts, seeds, limits)]


def test_every_rollout_uses_the_current_weights():
    lm = generation_kit.llama()
    prompts, seeds, limits = generation_kit.prompts(3), [4, 5, 6], [8] * 3
    generator = open_generator(
        generation_kit.actor(lm), generation_kit.tokenizer(), ENDS, Sampling(engine="continuous")
    )
    before = generator.generate(prompts, seeds, limits)
    with torch.no_grad():
        lm.lm_head.weight += 0.5 * torch.randn(
            lm.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    after = generator.generate(prompts, seeds, limits)
    assert_same(after, sampled(lm, "generate", prompts, seeds, limits))
    assert [r.ids for r in before] != [r.ids for r in after]


def test_an_error_in_the_sampling_thread_is_raised_in_the_caller(lm, monkeypatch):
    def broken(*_):
        raise ValueError("no such luck")

    monkeypatch.setattr(continuous.Sampler, "__call__", broken)
    with pytest.raises(RuntimeError, match="continuous batching: no such luck"):
        sampled(lm, "continuous", generation_kit.prompts(2), [0, 1], [4, 4])
    assert lm.config._attn_implementation == "sdpa"


def test_recurrent_models_and_sharded_weights_are_refused():
    import transformers

    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=32
        )
    )
    with pytest.raises(
        UserError, match="continuous cannot run a MambaForCausalLM .*expected sampling.engine=generate"
    ):
        sampled(mamba, "continuous", [[5]], [0], [1])
    sharded = generation_kit.actor(generation_kit.llama(), sharded=True)
    with pytest.raises(UserError, match="expected sampling.gather=true"):
        open_generator(sharded, None, ENDS, Sampling(engine="continuous", gather=False))


def test_no_prompts_give_no_responses(lm):
    assert sampled(lm, "continuous", [], [], []) == []
