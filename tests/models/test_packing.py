"""Packed batches: dealing by tokens, attention that never crosses sequences, and what models answer, one
sequence at a time.
"""

import kit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_near, assert_near_in_another_batch

from saferlhf_fast.config.stages import Sampling
from saferlhf_fast.models import attention, row_form, sampling_distribution
from saferlhf_fast.models.packing import (
    end_row,
    pack_into_microbatches,
    pack_sequences,
    padded,
    response_rows,
)
from saferlhf_fast.models.policy import Objective, Policy, sequence_sums, trained_rows
from saferlhf_fast.models.score_model import ScoreModel, score_model_from_backbone

pytestmark = pytest.mark.numeric

SEQUENCES = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [5, 6, 7], [9, 9, 1, 2, 3], [9, 8, 1, 2, 3], [4, 4]]
STARTS = [2, 1, 3, 1, 1]
TINY = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
)
ROPE = dict(TINY, num_key_value_heads=2, head_dim=8)
# name -> (config, packs, goes through the fused head). Sliding windows are shorter than the longest sequence.
ARCHITECTURES = {
    "Llama": (ROPE, True, True),
    "Qwen2": (dict(ROPE, sliding_window=4, use_sliding_window=True, max_window_layers=1), True, True),
    "Qwen3": (dict(ROPE, tie_word_embeddings=True), True, True),
    "Mistral": (dict(ROPE, sliding_window=4), True, True),
    "Gemma2": (
        dict(ROPE, sliding_window=4, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
        True,
        True,
    ),
    "Gemma3Text": (dict(ROPE, sliding_window=4), True, True),
    "GPT2": (dict(vocab_size=40, n_embd=32, n_layer=2, n_head=4), True, True),
    "OPT": (
        dict(
            vocab_size=40,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
        ),
        True,
        True,
    ),
    "GPTNeoX": (TINY, True, True),
    "Cohere": (ROPE, True, True),
    "Granite": (dict(ROPE, logits_scaling=4.0), True, True),
    "GptOss": (dict(ROPE, sliding_window=4, num_local_experts=4, num_experts_per_tok=2), True, True),
    "Bloom": (dict(vocab_size=40, hidden_size=32, n_layer=2, n_head=4), False, True),  # alibi
    # a state runs through
    "Mamba": (dict(vocab_size=40, hidden_size=32, num_hidden_layers=2), False, True),
}


def make_lm(name, config=None, seed=0):
    import transformers

    torch.manual_seed(seed)
    settings = dict(config or ARCHITECTURES[name][0], bos_token_id=1, eos_token_id=2)
    lm = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**settings)
    ).eval()
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return lm


def one_at_a_time(lm, temperature):
    """Log-probs of each response alone, by plain transformers and log-softmax."""
    made = []
    for ids, start in zip(SEQUENCES, STARTS):
        logits = lm(input_ids=torch.tensor([ids])).logits[0].float() / temperature
        made.append(
            torch.log_softmax(logits[start - 1 : -1], -1)
            .gather(-1, torch.tensor(ids[start:])[:, None])
            .squeeze(-1)
        )
    return torch.cat(made)


def responses():
    return pack_sequences(SEQUENCES, [response_rows(s, len(ids)) for ids, s in zip(SEQUENCES, STARTS)], "cpu")


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- dealing


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 120), st.integers(1, 5))
def test_passes_hold_every_sequence_once_and_no_more_than_the_budget(lengths, budget, world):
    dealt = pack_into_microbatches(lengths, budget, world)
    assert len(dealt) == world and len({len(passes) for passes in dealt}) == 1
    assert sorted(i for passes in dealt for each in passes for i in each) == list(range(len(lengths)))
    for each in (each for passes in dealt for each in passes):
        assert sum(lengths[i] for i in each) <= budget or len(each) == 1
        assert [lengths[i] for i in each] == sorted(lengths[i] for i in each)


def test_ranks_carry_about_the_same():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 512, (256,), generator=draw).tolist()
    loads = [
        sum(lengths[i] for each in passes for i in each)
        for passes in pack_into_microbatches(lengths, 8192, 8)
    ]
    assert max(loads) / min(loads) < 1.02
    passes = len(pack_into_microbatches(lengths, 8192, 8)[0])
    assert passes == -(-sum(lengths) // (8 * 8192))  # as few passes as the tokens allow
    with pytest.raises(ValueError, match="at least one token, got 0"):
        pack_into_microbatches(lengths, 0)


def test_packed_says_where_everything_lies():
    packed = responses()
    assert packed.ids_M.tolist() == [i for ids in SEQUENCES for i in ids]
    assert packed.positions_M.tolist() == [p for ids in SEQUENCES for p in range(len(ids))]
    assert packed.counts == (7, 2, 2, 4, 1) and packed.cu_seqlens.tolist() == [0, 7, 9, 11, 15, 16]
    assert packed.layout.cu_seqlens.tolist() == [0, 9, 12, 17, 22, 24] and packed.layout.runs == [
        (1, 9),
        (1, 3),
        (2, 5),
        (1, 2),
    ]
    assert packed.targets_N.tolist() == [i for ids, s in zip(SEQUENCES, STARTS) for i in ids[s:]]
    ends = pack_sequences(SEQUENCES, [end_row(len(ids)) for ids in SEQUENCES], "cpu")
    assert (
        ends.ids_M[ends.rows_N].tolist() == [ids[-1] for ids in SEQUENCES]
        and ends.targets_N.tolist() == [-1] * 5
    )
    assert sequence_sums(torch.arange(16.0), packed).tolist() == [21, 15, 19, 50, 15]
    assert trained_rows([True, False, True, True, False]) == [1, 2]
    rows = padded(packed)
    assert rows.ids_SL.shape == (5, 9) and rows.mask_SL.sum(1).tolist() == [9, 3, 5, 5, 2]
    assert torch.equal(rows.ids_SL.flatten()[rows.flat_M], packed.ids_M)
    with pytest.raises(ValueError, match="expected positions in 0 … 1, got -1"):
        pack_sequences([[1, 2]], [response_rows(0, 2)], "cpu")


# ---------------------------------------------------------------- attention and models


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_is_one_sequence_at_a_time(name):
    """Log-probs and all gradients, packed and padded; generation still works with our attention in place."""
    _, packs, fused = ARCHITECTURES[name]
    lm = make_lm(name)
    expected_N = one_at_a_time(lm, 0.7)
    weight_N = torch.linspace(-1, 1, len(expected_N))
    expected = gradients(lm, (expected_N * weight_N).sum())
    greedy = lm.generate(torch.tensor([SEQUENCES[0]]), max_new_tokens=4, do_sample=False)
    for packing in (True, False):
        policy = Policy(lm, packing)
        assert policy.packs is (packs and packing) and (policy.logit_form is not None) is fused
        logp_N = policy(responses(), Sampling(temperature=0.7))
        assert_near_in_another_batch(logp_N, expected_N)
        assert_near_in_another_batch(gradients(lm, (logp_N * weight_N).sum()), expected)
    assert torch.equal(lm.generate(torch.tensor([SEQUENCES[0]]), max_new_tokens=4, do_sample=False), greedy)


def test_no_sequence_sees_another():
    """A token changed in one sequence changes no bit of the others' log-probs; no gradient flows across."""
    policy = Policy(make_lm("Llama"))
    before = policy(responses())
    other = [list(ids) for ids in SEQUENCES]
    other[1] = [30, 31, 32]
    after = policy(
        pack_sequences(other, [response_rows(s, len(ids)) for ids, s in zip(SEQUENCES, STARTS)], "cpu")
    )
    changed = (before != after).tolist()
    assert changed == [False] * 7 + [True] * 2 + [False] * 7


def test_no_dense_mask_is_ever_made(monkeypatch):
    """What attention gets for M tokens is a mask of one element, which it does not read; nothing of size M by
    M is made.
    """
    seen = []
    plain = attention._sdpa

    def spy(module, query, key, value, mask, **kwargs):
        seen.append((tuple(query.shape), None if mask is None else tuple(mask.shape)))
        return plain(module, query, key, value, mask, **kwargs)

    lm = make_lm("Llama")
    policy = Policy(lm)
    monkeypatch.setattr(attention, "_sdpa", spy)
    monkeypatch.setitem(attention.NAMES, "sdpa", "saferlhf_fast_spied")
    lm.set_attn_implementation("sdpa")
    assert attention.install(lm)
    whole, plain_mask = [], attention.dummy_mask

    def seen_mask(device):
        whole.append(plain_mask(device))
        return whole[-1]

    monkeypatch.setattr(attention, "dummy_mask", seen_mask)
    policy(responses())
    assert [tuple(mask.shape) for mask in whole] == [(1, 1, 1, 1)]
    assert seen == 2 * [
        ((1, 4, 9, 8), None),
        ((1, 4, 3, 8), None),
        ((2, 4, 5, 8), None),
        ((1, 4, 2, 8), None),
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_score_models_answer_the_asked_positions(tmp_path, checkpointing):
    model = score_model_from_backbone(kit.make_model(tmp_path / "m"))
    if checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    asked = [range(len(ids)) if i % 2 else end_row(len(ids)) for i, ids in enumerate(SEQUENCES)]
    packed = pack_sequences(SEQUENCES, asked, "cpu")
    alone = [model(torch.tensor([ids]), torch.ones(1, len(ids)))[0] for ids in SEQUENCES]
    expected_N = torch.cat([a if i % 2 else a[-1:] for i, a in enumerate(alone)])
    scores_N = model(packed)
    assert_near_in_another_batch(scores_N, expected_N)
    expected, got = (gradients(model, (s * torch.arange(len(s))).sum()) for s in (expected_N, scores_N))
    assert_near_in_another_batch(got, expected)


def test_encoders_score_packed_too():
    """Attention in both directions, within a sequence."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    settings = dict(
        TINY, max_position_embeddings=32, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
    )
    model = ScoreModel(BertModel(BertConfig(**settings), add_pooling_layer=False))
    packed = pack_sequences(SEQUENCES, [end_row(len(ids)) for ids in SEQUENCES], "cpu")
    expected = torch.stack([model(torch.tensor([ids]), torch.ones(1, len(ids)))[0, -1] for ids in SEQUENCES])
    assert_near_in_another_batch(model(packed), expected)


# ---------------------------------------------------------------- the head


def test_heads_that_are_no_plain_layer_go_through_their_own_logits():
    """A scale nobody knows, and adapters on the head."""
    import peft

    scaled = make_lm("Llama")
    plain_forward = scaled.forward

    def forward(*args, **kwargs):
        out = plain_forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    scaled.forward = forward
    adapted = peft.get_peft_model(
        make_lm("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    for lm in (scaled, adapted):
        expected_N = one_at_a_time(lm, 1.0)
        policy = Policy(lm)
        assert policy.logit_form is None
        assert_near_in_another_batch(policy(responses()), expected_N)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma2", "Cohere"])
def test_the_fused_objective_is_the_loss_of_the_log_probs(name):
    """Untied, tied, softcapped and scaled heads: loss, statistics and gradients of both forms."""
    from saferlhf_fast import ppo_loss

    lm = make_lm(name)
    policy, packed, cool = Policy(lm), responses(), Sampling(temperature=0.8)
    draw = torch.Generator().manual_seed(1)
    old_N = policy(packed, cool).detach() + 0.3 * torch.randn(16, generator=draw)
    advantages_N = torch.randn(16, generator=draw)
    settings = {"clip_ratio": 0.2, "reduction": "sequence-mean", "normalizer": 7}
    loss, stats = ppo_loss(
        policy(packed, cool), old_N, advantages_N, cu_seqlens=packed.cu_seqlens, **settings
    )
    expected = gradients(lm, loss)
    fused, fused_stats = policy(packed, cool, Objective(old_N, advantages_N, settings))
    assert (
        fused.item() == pytest.approx(loss.item(), rel=1e-5)
        and stats["clip_fraction"] == fused_stats["clip_fraction"] > 0
    )
    assert_near_in_another_batch(gradients(lm, fused), expected)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "Mamba"])
@pytest.mark.parametrize(
    "shape", [{"top_p": 0.7}, {"top_k": 5, "temperature": 0.6}, {"repetition_penalty": 1.4, "top_p": 0.9}]
)
def test_what_is_scored_is_what_is_sampled(name, shape):
    """Top-p, top-k and penalties shape the log-probs too: against `sampling_logits` on plain logits, one
    sequence at a time.
    """
    lm, sampling = make_lm(name), Sampling(**shape)
    expected = []
    for ids, start in zip(SEQUENCES, STARTS):
        for t in range(start, len(ids)):
            logits = lm(input_ids=torch.tensor([ids[:t]])).logits[0, -1:].float()
            target = torch.tensor([ids[t]])
            scores = sampling_distribution.sampling_logits(logits, sampling, torch.tensor([ids[:t]]), target)
            expected.append(scores.log_softmax(-1)[0, ids[t]])
    logp_N = Policy(lm)(responses(), sampling)
    assert_near_in_another_batch(logp_N, torch.stack(expected))
    loss, _ = Policy(lm)(
        responses(), sampling, Objective(logp_N.detach(), torch.ones(16), {"clip_ratio": 0.2})
    )
    assert loss.item() == pytest.approx(-1.0, rel=1e-5)


def test_a_wrapped_model_is_still_itself(tmp_path):
    """The opened head changes neither copies nor files; a copy uses its own weights."""
    import copy

    lm = make_lm("Llama")
    names = sorted(lm.state_dict())
    policy = Policy(lm)
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        twin.lm.lm_head.weight.zero_()
    assert_near(twin(responses()), -torch.tensor(40.0).log().expand(16))
    assert policy(responses()).std() > 0.1
    lm.save_pretrained(tmp_path / "saved")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again.lm_head) is torch.nn.Linear and again.config._attn_implementation == "sdpa"
    assert sorted(again.state_dict()) == names
    row_form.FORMS.clear()
    assert Policy(again).packs
