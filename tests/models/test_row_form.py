"""Which architectures run packed, padded or by length, and that each gives what a sequence alone gives.

A few that stand for a kind; test_architecture_sweep.py has all of transformers. Sequences are beyond every
window, chunk, index and original context.
"""

import copy

import architectures
import pytest
import torch
from tolerance import assert_near_in_another_batch

from saferlhf_fast.errors import UserError
from saferlhf_fast.models import attention, row_form, shrunken
from saferlhf_fast.models.packing import pack_sequences
from saferlhf_fast.models.policy import Policy
from saferlhf_fast.models.score_model import ScoreModel

pytestmark = pytest.mark.numeric

LONGROPE = {
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 32,
    },
}
DYNAMIC = {
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}
BY_LAYER = {
    "max_position_embeddings": 32,
    "rope_parameters": {
        "full_attention": DYNAMIC["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
MSCALE = {
    "sliding_window": 512,
    "rope_parameters": LONGROPE["rope_parameters"] | {"short_mscale": 1.1, "long_mscale": 1.3},
}
CAUSAL = {
    "longrope": ("phi3", LONGROPE, "packed"),
    "longrope with scales of its own": ("phimoe", LONGROPE | MSCALE, "packed"),
    "dynamic NTK": ("llama", DYNAMIC, "packed"),
    "dynamic NTK of one kind of layer": ("gemma3_text", BY_LAYER, "packed"),
    "dynamic NTK of complex numbers": ("llama4_text", DYNAMIC, "padded"),
    "a window": ("mistral", {}, "packed"),
    "a window that is only a mask": ("phimoe", {}, "padded"),
    "a window as wide as the context": ("phimoe", {"sliding_window": 512}, "packed"),
    "chunks": ("llama4_text", {}, "padded"),
    "an index of keys": ("glm_moe_dsa", {}, "by length"),
    "alibi": ("bloom", {}, "padded"),
    "a state": ("mamba", {}, "padded"),
    "positions from 2": ("roberta", {"is_decoder": True}, "packed"),
}
ENCODERS = {
    "roberta": "packed",
    "mpnet": "padded",
    "bert": "packed",
    "deberta": "padded",
    "fnet": "by length",
}


def kept_apart(model, expected, rows, want):
    """The form that a model has, and its answer in this form and without packing."""
    packed = pack_sequences(rows, [range(len(r) - want) for r in rows], torch.device("cpu"))
    found = architectures.form_name(model.form)
    for form in (model.form, model.form.unpacked()):
        model.form = form
        with torch.no_grad():
            assert_near_in_another_batch(model(packed), expected, architectures.form_name(form))
    return found


@pytest.mark.parametrize("name", CAUSAL)
def test_log_probs_are_those_of_each_sequence_alone(name):
    from transformers import AutoModelForCausalLM

    kind, changes, form = CAUSAL[name]
    lm = architectures.build(AutoModelForCausalLM, kind, **changes)
    rows = architectures.sequences(96)
    expected = architectures.logp_alone(lm, rows)
    assert kept_apart(Policy(lm).eval(), expected, rows, 1) == form


@pytest.mark.parametrize("kind", ENCODERS)
def test_token_scores_are_those_of_each_text_alone(kind):
    """Packed, and in rows with padding on either side that holds other ids than the padding token's."""
    from transformers import AutoModel

    backbone = architectures.build(AutoModel, kind, pad_token_id=1)
    rows = [row[:20] for row in architectures.sequences(96)]
    rows[0][5] = 1  # the padding token as a word: the backbone's own counting leaves it out
    hidden = architectures.hidden_alone(backbone, rows)
    model = ScoreModel(backbone).eval()
    with torch.no_grad():
        expected = model.score(hidden)
        assert kept_apart(model, expected, rows, 0) == ENCODERS[kind]
        for left in (False, True):
            ids = torch.full((len(rows), 24), 7)
            mask = torch.zeros(len(rows), 24, dtype=torch.long)
            for i, row in enumerate(rows):
                place = slice(24 - len(row), 24) if left else slice(len(row))
                ids[i, place], mask[i, place] = torch.tensor(row), 1
            if left and kind in ("mpnet", "deberta"):
                continue  # distances between padding and words: their own numbers change with the padding
            assert_near_in_another_batch(model(ids, mask)[mask.bool()], expected, f"left={left}")


def test_factors_of_rotary_embeddings_forget_the_longest_sequence():
    """A short sequence after a long one, a copy, and rows of generation have their own factors."""
    from transformers import AutoModelForCausalLM

    lm = architectures.build(AutoModelForCausalLM, "llama", **DYNAMIC)
    rows = architectures.sequences(96, (40, 7, 64))
    alone = dict(
        zip((1, 0, 2), architectures.logp_alone(lm, [rows[i] for i in (1, 0, 2)]).split([6, 39, 63]))
    )
    policy = copy.deepcopy(Policy(lm).eval())
    for i in (2, 0, 1):
        with torch.no_grad():
            got = policy(pack_sequences([rows[i]], [range(len(rows[i]) - 1)], torch.device("cpu")))
        assert_near_in_another_batch(got, alone[i])


def test_a_score_does_not_depend_on_what_was_scored_before(tmp_path):
    """BigBird's block-sparse attention ends for good at the first short pass, if it is left to it."""
    from transformers import AutoModel

    sizes = {"max_position_embeddings": 512, "block_size": 16, "num_random_blocks": 3}
    backbone = architectures.build(AutoModel, "big_bird", attention_type="block_sparse", **sizes)
    backbone.set_attention_type("block_sparse")  # `build` has run a short pass
    model = ScoreModel(backbone).eval()
    draw = torch.Generator().manual_seed(0)
    long_BL = torch.randint(3, 96, (1, 320), generator=draw)  # beyond (5 + 2·3)·16 tokens
    short_BL = long_BL[:, :24]
    with torch.no_grad():
        first, _, again = (model(ids, torch.ones_like(ids)) for ids in (long_BL, short_BL, long_BL))
    torch.testing.assert_close(again, first)
    backbone.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).attention_type == "original_full"


def test_our_attention_is_not_put_where_its_name_changes_a_number():
    from transformers import AutoModelForCausalLM

    lm = architectures.build(AutoModelForCausalLM, "glm_moe_dsa")
    ids = torch.tensor(architectures.sequences(96, (64,)))
    with torch.no_grad():
        before = lm(ids).logits
        assert not attention.install(lm.base_model)
        assert torch.equal(lm(ids).logits, before)


def test_a_model_without_a_copy_is_padded_where_it_names_a_length(monkeypatch):
    """It is packed where it names none and a few tokens agree, unless it asks for its attention's name."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(row_form, "shrunken", lambda *_: iter(()))
    for kind, packs in (("mistral", False), ("llama", True), ("glm_moe_dsa", False)):
        monkeypatch.setattr(row_form, "FORMS", {})
        lm = architectures.build(AutoModelForCausalLM, kind)
        form = row_form.form_of(lm.base_model)
        assert form.packs is packs and bool(form.why) is not packs
    lm = architectures.build(AutoModelForCausalLM, "phi3", **LONGROPE)
    assert shrunken.changes_with_length(lm.config)["rope_parameters"] == 32


def test_rows_by_length_are_refused_where_each_rank_would_make_other_passes(monkeypatch):
    """ZeRO-3 on several ranks: a pass gathers weights, so all ranks need the same number of them."""
    from transformers import AutoModel

    from saferlhf_fast.runtime import engine

    model = ScoreModel(architectures.build(AutoModel, "fnet")).eval()
    packed = pack_sequences([[3, 4, 5], [6, 7]], [range(3), range(2)], torch.device("cpu"))
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    assert len(model(packed)) == 5
    for parameter in model.parameters():
        parameter.ds_id = 0
    with pytest.raises(UserError, match="engine.zero_stage: expected 0, 1 or 2 for a FNetModel .* got 3"):
        model(packed)


def test_a_probe_does_not_depend_on_the_size_of_the_model():
    """Of a configuration of 7B parameters with a window of 4096: nothing of its size is built."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig()
    state = torch.get_rng_state()
    model = next(shrunken.shrunken(MistralForCausalLM, config))
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in model.parameters()) < 5e6 and model.config.sliding_window == 16
    assert config.sliding_window == 4096 and config.num_hidden_layers == 32
    with torch.device("meta"):
        large = MistralForCausalLM(config)
    assert row_form.architecture_form(large.base_model).packs
