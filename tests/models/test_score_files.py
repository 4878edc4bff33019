"""Score checkpoints: safe-rlhf's layout by hand, export to AutoModelForSequenceClassification, bias,
normaliser, refusals.
"""

import json
from pathlib import Path

import pytest
import torch
from kit import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from saferlhf_fast.errors import UserError
from saferlhf_fast.models.folders import quiet
from saferlhf_fast.models.score_checkpoint import check_score_export, save_score_model
from saferlhf_fast.models.score_model import load_score_model, score_model_from_backbone
from saferlhf_fast.models.tokenizer import load_tokenizer, same_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama") / "lm")


def right_padded(tokenizer, lengths=(8, 5, 2), pad=None):
    """Rows of words that end with the end token -> ids_BL, mask_BL."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), max(lengths)), tokenizer.pad_token_id if pad is None else pad)
    mask = torch.zeros_like(ids)
    for b, n in enumerate(lengths):
        ids[b, :n] = torch.randint(4, 30, (n,), generator=generator)
        ids[b, n - 1] = tokenizer.eos_token_id
        mask[b, :n] = 1
    return ids, mask


def class_scores(folder, ids_BL, mask_BL):
    """Scores as a user of transformers alone gets them; no weight may be missing."""
    from transformers import AutoModelForSequenceClassification

    with quiet():
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(input_ids=ids_BL, attention_mask=mask_BL).logits[:, 0]


def end_scores(model, ids_BL, mask_BL):
    with torch.no_grad():
        return model.end_scores(model.eval()(ids_BL, mask_BL), mask_BL)


def write_ref(folder, llama, bias=0.7, mean=0.4, var=2.25, binary=False, drop=(), **fields):
    """A checkpoint in the reference implementation's layout."""
    make_tokenizer().save_pretrained(folder)
    config = json.loads((Path(llama) / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForScore"],
        "score_dim": 1,
        "score_bias": bias is not None,
        "score_type": "cost",
        "do_normalize": False,
        "normalizer_type": None,
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(f"{llama}/model.safetensors")
    state.pop("lm_head.weight", None)
    torch.manual_seed(5)
    state |= {
        "score_head.weight": torch.randn(1, 32),
        "normalizer.mean": torch.tensor([mean]),
        "normalizer.var": torch.tensor([var]),
        "normalizer.count": torch.tensor([9]),
    }
    if bias is not None:
        state["score_head.bias"] = torch.tensor([bias])
    for name in drop:
        del state[name]
    if binary:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return state


# ---------------------------------------------------------------- export


@pytest.mark.numeric
def test_export_is_exact_through_the_class(llama, tmp_path):
    tokenizer, model = load_tokenizer(llama), score_model_from_backbone(llama)
    save_score_model(
        tmp_path / "rm", model, tokenizer, kind="reward", card={"data": ["pairs.jsonl"], "accuracy": 0.75}
    )
    ids_BL, mask_BL = right_padded(tokenizer)
    assert torch.allclose(
        class_scores(tmp_path / "rm", ids_BL, mask_BL), end_scores(model, ids_BL, mask_BL), atol=1e-6
    )
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
    assert config["problem_type"] == "regression" and config["pad_token_id"] == tokenizer.pad_token_id
    again = load_score_model(tmp_path / "rm", tokenizer=load_tokenizer(tmp_path / "rm"))
    assert again.kind == "reward" and torch.equal(again(ids_BL, mask_BL), model(ids_BL, mask_BL))
    card = (tmp_path / "rm" / "README.md").read_text()
    assert "pairs.jsonl" in card and "0.75" in card and "AutoModelForSequenceClassification" in card


def test_export_of_a_state_dict(llama, tmp_path):
    tokenizer, model = load_tokenizer(llama), score_model_from_backbone(llama)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["score.weight"] = state["score.weight"] + 1
    save_score_model(tmp_path / "rm", model, tokenizer, kind="reward", state_dict=state)
    assert torch.equal(load_score_model(tmp_path / "rm").score.weight, state["score.weight"])


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "mixtral"])
def test_export_of_other_families(family, tmp_path):
    import transformers

    tokenizer = make_tokenizer()
    common = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    config, cls = {
        "gpt2": lambda: (
            transformers.GPT2Config(
                vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=3
            ),
            "GPT2",
        ),
        "gpt_neox": lambda: (transformers.GPTNeoXConfig(**common, intermediate_size=64), "GPTNeoX"),
        "opt": lambda: (transformers.OPTConfig(**common, ffn_dim=64, word_embed_proj_dim=16), "OPT"),
        "mixtral": lambda: (
            transformers.MixtralConfig(
                **common, intermediate_size=64, num_key_value_heads=2, num_local_experts=2
            ),
            "Mixtral",
        ),
    }[family]()
    torch.manual_seed(0)
    names = {"GPT2": "GPT2LMHeadModel"}
    getattr(transformers, names.get(cls, f"{cls}ForCausalLM"))(config).save_pretrained(tmp_path / "lm")
    model = score_model_from_backbone(tmp_path / "lm").eval()
    save_score_model(tmp_path / "rm", model, tokenizer, kind="cost")
    ids_BL, mask_BL = right_padded(tokenizer)
    expected = end_scores(model, ids_BL, mask_BL)
    assert torch.allclose(class_scores(tmp_path / "rm", ids_BL, mask_BL), expected, atol=1e-5)
    assert torch.allclose(end_scores(load_score_model(tmp_path / "rm"), ids_BL, mask_BL), expected, atol=1e-5)


@pytest.mark.numeric
def test_a_family_without_the_class_is_kept_for_our_loader(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = make_tokenizer()
    BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )
    ).save_pretrained(tmp_path / "lm")
    model = score_model_from_backbone(tmp_path / "lm", pooling="last").eval()
    save_score_model(tmp_path / "rm", model, tokenizer, kind="reward")
    ids_BL, mask_BL = right_padded(tokenizer)
    again = load_score_model(tmp_path / "rm")
    assert torch.allclose(end_scores(again, ids_BL, mask_BL), end_scores(model, ids_BL, mask_BL), atol=1e-6)
    assert "load it with saferlhf-fast" in (tmp_path / "rm" / "README.md").read_text()


@pytest.mark.numeric
def test_pad_equal_to_eos_gets_another_pad(tmp_path):
    folder = make_model(tmp_path / "lm", pad_is_eos=True)
    tokenizer, model = load_tokenizer(folder), score_model_from_backbone(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    save_score_model(tmp_path / "rm", model, tokenizer, kind="reward")
    saved = load_tokenizer(tmp_path / "rm")
    assert saved.pad_token_id != saved.eos_token_id and tokenizer.pad_token_id == tokenizer.eos_token_id
    assert same_tokenizer(saved, tokenizer)
    ids_BL, mask_BL = right_padded(saved)
    assert torch.allclose(
        class_scores(tmp_path / "rm", ids_BL, mask_BL), end_scores(model, ids_BL, mask_BL), atol=1e-6
    )


def test_pad_equal_to_eos_without_another_special_token_is_refused(llama, tmp_path):
    tokenizer = make_tokenizer(pad_is_eos=True)
    tokenizer.bos_token = tokenizer.unk_token = None
    model = score_model_from_backbone(llama)
    for call in (
        lambda: check_score_export(model, tokenizer),
        lambda: save_score_model(tmp_path / "rm", model, tokenizer, kind="reward"),
    ):
        with pytest.raises(UserError, match="another special token"):
            call()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the reference implementation's layout


@pytest.mark.numeric
@pytest.mark.parametrize(
    "score_type, normalize", [("cost", False), ("cost", True), ("reward", True), ("critic", True)]
)
@pytest.mark.parametrize("binary", [False, True])
def test_ref_checkpoint_scores_as_its_formula(llama, tmp_path, score_type, normalize, binary):
    state = write_ref(
        tmp_path,
        llama,
        binary=binary,
        score_type=score_type,
        do_normalize=normalize,
        normalizer_type="RunningMeanStd" if normalize else None,
    )
    model = load_score_model(tmp_path, allow_pickle=binary)
    ids_BL, mask_BL = right_padded(load_tokenizer(tmp_path))
    from transformers import AutoModel

    hidden = (
        AutoModel.from_pretrained(llama).eval()(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
    )
    expected = hidden @ state["score_head.weight"][0] + 0.7
    if normalize and score_type == "reward":
        expected = (expected - 0.4) / (2.25**0.5 + 1e-8)
    elif normalize and score_type == "cost":
        expected = expected / (2.25**0.5 + 1e-8)
    last = mask_BL.sum(1) - 1
    assert model.kind == score_type
    assert torch.allclose(
        end_scores(model, ids_BL, mask_BL), expected.gather(1, last[:, None])[:, 0], atol=1e-5
    )


@pytest.mark.numeric
def test_ref_bias_is_refused_or_kept(llama, tmp_path):
    (tmp_path / "ref").mkdir()
    write_ref(tmp_path / "ref", llama, do_normalize=True, normalizer_type="RunningMeanStd")
    model, tokenizer = load_score_model(tmp_path / "ref"), load_tokenizer(tmp_path / "ref")
    ids_BL, mask_BL = right_padded(tokenizer)
    scores = end_scores(model, ids_BL, mask_BL)
    with pytest.raises(UserError, match=r"bias \(\+0.7000\) and a normaliser.*drop_bias"):
        save_score_model(tmp_path / "out", model, tokenizer, kind="cost")
    save_score_model(tmp_path / "kept", model, tokenizer, kind="cost", keep_bias=True)
    kept = load_score_model(tmp_path / "kept")
    assert torch.allclose(end_scores(kept, ids_BL, mask_BL), scores, atol=1e-6)
    assert "only saferlhf-fast" in (tmp_path / "kept" / "README.md").read_text()
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert config["saferlhf_fast"]["score_bias"] == pytest.approx(0.7) and "score_dim" not in config


@pytest.mark.numeric
def test_ref_bias_dropped_prints_the_shift(llama, tmp_path, capsys):
    (tmp_path / "ref").mkdir()
    write_ref(tmp_path / "ref", llama)
    model, tokenizer = load_score_model(tmp_path / "ref"), load_tokenizer(tmp_path / "ref")
    save_score_model(tmp_path / "out", model, tokenizer, kind="cost", drop_bias=True)
    assert "-0.700000" in "".join(capsys.readouterr())
    ids_BL, mask_BL = right_padded(tokenizer)
    shifted = class_scores(tmp_path / "out", ids_BL, mask_BL)
    assert torch.allclose(shifted, end_scores(model, ids_BL, mask_BL) - 0.7, atol=1e-5)
    assert torch.allclose(end_scores(load_score_model(tmp_path / "out"), ids_BL, mask_BL), shifted, atol=1e-6)


# ---------------------------------------------------------------- refusals


def test_a_missing_head_is_never_random(llama, tmp_path):
    with pytest.raises(UserError, match="without a head"):
        load_score_model(llama)
    write_ref(tmp_path, llama, drop=("score_head.weight", "score_head.bias"))
    for new_head in (False, True):
        with pytest.raises(UserError, match="expected the head of a score model"):
            load_score_model(tmp_path, new_head=new_head)


def test_missing_backbone_weights_are_named(llama, tmp_path):
    write_ref(tmp_path, llama, drop=("model.layers.1.mlp.up_proj.weight",))
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight"):
        load_score_model(tmp_path)


def test_an_existing_head_is_kept_with_new_head(llama, tmp_path):
    model = score_model_from_backbone(llama)
    save_score_model(tmp_path / "rm", model, load_tokenizer(llama), kind="reward")
    assert torch.equal(load_score_model(tmp_path / "rm", new_head=True).score.weight, model.score.weight)


def test_a_classifier_with_several_labels_is_refused(llama, tmp_path):
    from transformers import AutoConfig, LlamaForSequenceClassification

    config = AutoConfig.from_pretrained(llama)
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"one score.*\[3, 32\]"):
        load_score_model(tmp_path)


def test_sharded_weights(llama, tmp_path):
    from transformers import AutoConfig, LlamaForSequenceClassification

    config = AutoConfig.from_pretrained(llama)
    config.num_labels = 1
    made = LlamaForSequenceClassification(config)
    made.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(load_score_model(tmp_path).score.weight, made.score.weight)


def test_a_pickle_that_runs_code_is_refused(llama, tmp_path):
    write_ref(tmp_path, llama)
    (tmp_path / "model.safetensors").unlink()

    class Harm:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"score_head.weight": Harm()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_score_model(tmp_path, allow_pickle=True)
