"""Tokenizers, causal LMs, ScoreModel and LoRA: loading, refusals, padding sides, the new head, merging."""

import copy
import json

import pytest
import torch
from kit import make_model, make_tokenizer, shared

from saferlhf_fast.config.stages import Lora
from saferlhf_fast.errors import UserError
from saferlhf_fast.models.causal_lm import load_causal_lm, save_causal_lm
from saferlhf_fast.models.lora import add_lora
from saferlhf_fast.models.score_checkpoint import save_score_model
from saferlhf_fast.models.score_model import load_score_model, score_model_from_backbone
from saferlhf_fast.models.tokenizer import load_tokenizer, same_tokenizer, spare_special, with_distinct_pad


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama") / "lm")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder, tokenizer = tmp_path_factory.mktemp("gpt2") / "lm", make_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def batch(lengths, pad, left=False, vocab=30, seed=0):
    """Random rows that end with the end token -> ids_BL, mask_BL (bool)."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids, mask = torch.full((len(lengths), longest), pad), torch.zeros(len(lengths), longest, dtype=torch.bool)
    for b, n in enumerate(lengths):
        row = torch.randint(4, vocab, (n,), generator=generator)
        row[-1] = 2
        at = slice(longest - n, longest) if left else slice(0, n)
        ids[b, at], mask[b, at] = row, True
    return ids, mask


# ---------------------------------------------------------------- tokenizers


def test_padding_falls_back_to_a_spare_special_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)
    # <unk> comes out of strange text here, so the begin token stands for padding.
    assert spare_special(make_tokenizer(pad_is_eos=True)) == "<s>"
    assert with_distinct_pad(make_tokenizer(pad_is_eos=True)).pad_token == "<s>"


def test_no_other_special_token_is_refused_for_export():
    tokenizer = make_tokenizer(pad_is_eos=True)
    tokenizer.bos_token = tokenizer.unk_token = None
    bare = copy.deepcopy(tokenizer)
    with pytest.raises(UserError, match="another special token"):
        with_distinct_pad(bare)


@pytest.mark.parametrize(
    "case, message",
    [
        ("missing", "does not exist"),
        ("empty", "has no tokenizer"),
        ("no eos", "end-of-sequence"),
        ("broken", "cannot be loaded"),
    ],
)
def test_tokenizer_refusals(tmp_path, case, message):
    folder = tmp_path / "folder"
    if case != "missing":
        folder.mkdir()
    if case == "no eos":
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(folder)
    if case == "broken":
        (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_same_tokenizer(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    assert same_tokenizer(tokenizer, load_tokenizer(tmp_path))
    other_words, other_template = make_tokenizer(extra=("more",)), make_tokenizer()
    assert not same_tokenizer(make_tokenizer(), other_words)
    assert not same_tokenizer(tokenizer, other_template)
    padded = make_tokenizer(pad_is_eos=True)
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert same_tokenizer(make_tokenizer(pad_is_eos=True), padded)


# ---------------------------------------------------------------- causal language models


def test_causal_lm_round_trip(llama, tmp_path):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    lm = load_causal_lm(llama, tokenizer=tokenizer)
    lm.generation_config.temperature = 0.6  # without do_sample, as some published configs have it
    save_causal_lm(tmp_path / "out", lm, tokenizer, card={"stage": "sft", "data": {"a.jsonl": 7}})
    again = load_causal_lm(tmp_path / "out", tokenizer=tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(lm.state_dict().values(), again.state_dict().values()))
    assert load_tokenizer(tmp_path / "out").chat_template == tokenizer.chat_template
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "generation_config.json", "README.md", "tokenizer.json"} <= names
    assert "a.jsonl: 7" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_save_leaves_the_old_model(llama, tmp_path):
    tokenizer, lm = load_tokenizer(llama), load_causal_lm(llama)
    save_causal_lm(tmp_path / "out", lm, tokenizer)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(AttributeError):
        save_causal_lm(tmp_path / "out", lm, None)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}")
    with pytest.raises(UserError, match="not a model folder"):
        save_causal_lm(tmp_path / "data", lm, tokenizer)


def test_causal_lm_refusals(tmp_path, llama):
    with pytest.raises(UserError, match="does not exist"):
        load_causal_lm(tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no config.json"):
        load_causal_lm(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="no weights"):
        load_causal_lm(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_causal_lm(tmp_path / "bare")
    score = score_model_from_backbone(llama)
    save_score_model(tmp_path / "rm", score, load_tokenizer(llama), kind="reward")
    with pytest.raises(UserError, match="lm_head"):
        load_causal_lm(tmp_path / "rm")


def test_vocabulary_larger_than_the_embedding_names_both_sizes(tmp_path):
    rows = len(make_tokenizer())
    folder = make_model(tmp_path / "small", vocab=rows - 3)
    tokenizer = load_tokenizer(folder)
    for load in (load_causal_lm, lambda *a, **k: load_score_model(*a, new_head=True, **k)):
        with pytest.raises(UserError, match=f"{rows} tokens.*{rows - 3} rows"):
            load(folder, tokenizer=tokenizer)


def test_the_end_token_learns_when_it_is_padding(tmp_path):
    """An embedding has no gradient at its padding_idx, and a score is read at the end token."""
    folder = make_model(tmp_path / "lm", pad_is_eos=True)
    lm, score = load_causal_lm(folder), score_model_from_backbone(folder)
    ids = torch.tensor([[5, 6, 2]])
    lm(ids).logits.sum().backward()
    score(ids, torch.ones_like(ids))[:, -1].sum().backward()
    for model in (lm, score.backbone):
        assert model.get_input_embeddings().weight.grad[2].abs().sum() > 0


# ---------------------------------------------------------------- score model


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_side_changes_no_score(family, request):
    model = score_model_from_backbone(request.getfixturevalue(family)).eval()
    lengths = [9, 4, 1, 6]
    found = []
    for left in (False, True):
        ids_BL, mask_BL = batch(lengths, pad=3, left=left)
        with torch.no_grad():
            scores_BL = model(ids_BL, mask_BL)
        assert scores_BL.dtype == torch.float32 and torch.isfinite(scores_BL).all()
        found.append((model.end_scores(scores_BL, mask_BL), scores_BL[mask_BL]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5) and torch.allclose(
        found[0][1], found[1][1], atol=1e-5
    )
    alone = model(*batch(lengths[:1], pad=3))[0, -1]
    assert torch.allclose(alone, found[0][0][0], atol=1e-5)


@pytest.mark.numeric
def test_padding_with_the_end_token_changes_no_score(llama):
    model = score_model_from_backbone(llama).eval()
    ends = []
    for pad in (3, 2):
        ids_BL, mask_BL = batch([7, 3], pad)
        ends.append(model.end_scores(model(ids_BL, mask_BL), mask_BL))
    assert torch.equal(*ends)


@pytest.mark.numeric
def test_head_is_computed_in_fp32(llama):
    model = score_model_from_backbone(llama, dtype=torch.bfloat16)
    ids_BL, mask_BL = batch([5, 3], 3)
    hidden = model.backbone(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    expected = hidden.float() @ model.score.weight.float()[0]
    assert torch.allclose(model(ids_BL, mask_BL)[mask_BL], expected[mask_BL], atol=1e-6)


@pytest.mark.numeric
def test_new_head_has_the_config_s_spread(tmp_path):
    folder = make_model(tmp_path / "lm", hidden=512)
    torch.manual_seed(3)
    weight = load_score_model(folder, new_head=True).score.weight
    assert abs(weight.std().item() / 0.02 - 1) < 0.1 and abs(weight.mean().item()) < 0.004
    torch.manual_seed(3)
    assert torch.equal(weight, load_score_model(folder, new_head=True).score.weight)


@pytest.mark.numeric
def test_gradient_checkpointing_gives_the_same_gradient(llama):
    plain = score_model_from_backbone(llama)
    saving = copy.deepcopy(plain)
    saving.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    ids_BL, mask_BL = batch([6, 4], 3)
    for model in (plain, saving):
        model.train()
        model.end_scores(model(ids_BL, mask_BL), mask_BL).sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-7)


def test_text_part_of_a_multimodal_model(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=16,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "lm")
    model = score_model_from_backbone(tmp_path / "lm").train()
    model(*batch([5, 3], 3)).sum().backward()
    assert not any("vision" in name for name, _ in model.named_parameters())


# ---------------------------------------------------------------- LoRA


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_of_a_causal_lm_is_merged_on_save(family, request, tmp_path):
    folder = request.getfixturevalue(family)
    tokenizer, lm = load_tokenizer(folder), load_causal_lm(folder)
    wrapped = add_lora(lm, Lora(rank=4, alpha=8.0))
    _shake(wrapped)
    ids_BL, mask_BL = batch([6], 3)
    wrapped.eval()
    expected = wrapped(input_ids=ids_BL).logits
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    save_causal_lm(tmp_path / "out", wrapped, tokenizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in wrapped.state_dict().items())
    again = load_causal_lm(tmp_path / "out", tokenizer=tokenizer).eval()
    assert torch.allclose(again(input_ids=ids_BL).logits, expected, atol=1e-5)
    untouched = load_causal_lm(folder).eval()(input_ids=ids_BL).logits
    assert (untouched - expected).abs().max() > 1e-3


@pytest.mark.numeric
def test_lora_of_a_score_model_trains_the_head_and_is_merged_on_save(llama, tmp_path):
    model = add_lora(score_model_from_backbone(llama), Lora(rank=4))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and all("lora_" in name for name in trained - {"score.weight"})
    _shake(model)
    model.eval()
    ids_BL, mask_BL = batch([6, 3], 3)
    save_score_model(tmp_path / "rm", model, load_tokenizer(llama), kind="reward")
    again = load_score_model(tmp_path / "rm").eval()
    assert torch.allclose(again(ids_BL, mask_BL)[mask_BL], model(ids_BL, mask_BL)[mask_BL], atol=1e-5)


def test_lora_with_unknown_modules_is_refused(llama):
    with pytest.raises(UserError, match="target_modules"):
        add_lora(load_causal_lm(llama), Lora(rank=2, target_modules=["nowhere"]))


def _shake(model):
    """Adapters start at zero effect; give them one."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)


# ---------------------------------------------------------------- a real model


@pytest.mark.numeric
@pytest.mark.skipif(shared() is None, reason="needs models/stories260k under SAFERLHF_DATA")
def test_real_llama(tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = shared() / "models" / "stories260k"
    tokenizer = load_tokenizer(folder)
    load_causal_lm(folder, tokenizer=tokenizer)
    with pytest.raises(UserError, match="without a head"):
        load_score_model(folder)
    model = load_score_model(folder, new_head=True, tokenizer=tokenizer).eval()
    save_score_model(tmp_path / "cost", model, tokenizer, kind="cost")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cost").eval()
    texts = ["Once upon a time" + tokenizer.eos_token, "A dog ran to the park." + tokenizer.eos_token]
    tokenizer.padding_side = "right"
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        ours = model.end_scores(
            model(inputs["input_ids"], inputs["attention_mask"]), inputs["attention_mask"]
        )
        assert torch.allclose(theirs(**inputs).logits[:, 0], ours, atol=1e-6)
