"""Encoders as score models: pooling, heads of their own classes, pairs of texts, export, refusals.

Six families, tiny and random, with tokenizers of their kinds (encoder_kit). What is expected comes from
transformers alone: `AutoModelForSequenceClassification` on `tokenizer(prompt, response)`.
"""

import json
from pathlib import Path

import encoder_kit
import kit
import pytest
import torch

from saferlhf_fast.data.examples import retokenize_split
from saferlhf_fast.data.pair_template import PairTemplate
from saferlhf_fast.errors import UserError
from saferlhf_fast.models.export_files import build_from_export_metadata, export_metadata_writer
from saferlhf_fast.models.packing import end_row, pack_sequences
from saferlhf_fast.models.score_checkpoint import save_score_model
from saferlhf_fast.models.score_model import ScoreModel, load_score_model, score_model_from_backbone
from saferlhf_fast.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.numeric

PROMPTS = ["what is red", "yes", "what is the colour of one two three, please?", "USER: " + "go stop " * 9]
RESPONSES = ["no blue", "the number of the day is two! stop go help", "maybe", "red [SEP] green </s> blue"]
NEAR = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function: family, settings -> the folder of an encoder, made once."""
    made = {}
    root = tmp_path_factory.mktemp("encoders")

    def of(family, **settings):
        key = (family, json.dumps(settings, sort_keys=True))
        if key not in made:
            made[key] = encoder_kit.make_encoder(root / str(len(made)), family, **settings)
        return made[key]

    return of


def split_of(tokenizer, prompts=PROMPTS, responses=RESPONSES, **settings):
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return retokenize_split(messages, responses, PairTemplate(tokenizer), **settings)


def scores_of(model, tokenizer, each_alone=False):
    """Scores of the pairs, packed together or each in a pass of its own."""
    marks = PairTemplate(tokenizer).marks_second
    split = split_of(tokenizer)
    rows = [(head + tail, len(head) if marks else None) for head, tail in split]
    passes = [[row] for row in rows] if each_alone else [rows]
    with torch.no_grad():
        return torch.cat(
            [
                model(
                    pack_sequences(
                        [ids for ids, _ in some],
                        [end_row(len(ids)) for ids, _ in some],
                        torch.device("cpu"),
                        [second for _, second in some],
                    )
                )
                for some in passes
            ]
        )


@pytest.mark.parametrize("family", encoder_kit.FAMILIES)
def test_ids_and_token_types_are_the_tokenizer_s_own(folder, family):
    tokenizer = load_tokenizer(folder(family), pairs=True)
    own = tokenizer(PROMPTS, RESPONSES)
    split = split_of(tokenizer)
    assert [head + tail for head, tail in split] == own["input_ids"]
    marks = PairTemplate(tokenizer).marks_second
    assert marks == (family in ("bert", "minilm", "deberta-v3"))
    if marks:
        assert [[0] * len(head) + [1] * len(tail) for head, tail in split] == own["token_type_ids"]


@pytest.mark.parametrize("family", encoder_kit.FAMILIES)
@pytest.mark.parametrize("head", [False, True], ids=["new head", "published classifier"])
def test_the_export_scores_as_transformers_own_class(folder, tmp_path, family, head):
    """A new head, and a classifier that transformers saved: packed, alone, padded and through the class."""
    path = folder(family, head=head)
    tokenizer = load_tokenizer(path, pairs=True)
    model = load_score_model(path, new_head=not head, tokenizer=tokenizer).eval()
    if head:
        expected = encoder_kit.class_scores(path, PROMPTS, RESPONSES)
        torch.testing.assert_close(scores_of(model, tokenizer), expected, **NEAR)
    save_score_model(tmp_path / "cm", model, tokenizer, kind="cost")
    expected = encoder_kit.class_scores(tmp_path / "cm", PROMPTS, RESPONSES)
    assert expected.std() > 0.01, "scores that are all alike would show nothing"
    again = load_score_model(tmp_path / "cm").eval()
    assert (again.kind, again.pooling, again.pairs) == ("cost", "cls", True)
    assert again.packs == (family != "deberta-v3"), "its attention is code of its own"
    for scores in (scores_of(again, tokenizer), scores_of(again, tokenizer, each_alone=True)):
        torch.testing.assert_close(scores, expected, **NEAR)
    for side in ("left", "right"):
        rows = tokenizer(PROMPTS, RESPONSES, return_tensors="pt", padding=True, padding_side=side)
        with torch.no_grad():
            scores_BL = again(
                rows["input_ids"], rows["attention_mask"], token_type_ids=rows.get("token_type_ids")
            )
        torch.testing.assert_close(again.end_scores(scores_BL, rows["attention_mask"]), expected, **NEAR)


OTHERS = {
    "Albert": {"embedding_size": 16},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "Electra": {"embedding_size": 16},
    "MPNet": {},
    "SqueezeBert": {"embedding_size": 32},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_with_heads_of_other_forms(tmp_path, name):
    """A pooler that is a linear layer, one that is always called, none; activations; other positions."""
    import transformers

    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"intermediate_size": 64, "max_position_embeddings": 66, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**common, **OTHERS[name]}, num_labels=1)
    published = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    published.save_pretrained(tmp_path / "rm")
    rows = [list(range(5, 5 + n)) for n in (9, 4, 12)]
    with torch.no_grad():
        expected = torch.cat([published(input_ids=torch.tensor([ids])).logits.view(-1) for ids in rows])
    model = load_score_model(tmp_path / "rm").eval()
    packed = pack_sequences(rows, [end_row(len(ids)) for ids in rows], torch.device("cpu"))
    torch.testing.assert_close(model(packed).detach(), expected, **NEAR)
    save_score_model(tmp_path / "again", model, encoder_kit.encoder_tokenizer("bert"), kind="reward")
    again = type(published).from_pretrained(tmp_path / "again")
    for weight, saved in zip(published.state_dict().values(), again.state_dict().values()):
        assert torch.equal(weight, saved)


def test_classes_that_compute_more_are_refused(tmp_path):
    """Longformer's class gives the first token attention to all; EuroBERT's may average scores."""
    import transformers

    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"intermediate_size": 64, "max_position_embeddings": 66, "num_labels": 1}
    for name, own, message in (
        ("Longformer", {"attention_window": 8}, "computes its score from the state of cls alone"),
        (
            "EuroBert",
            {"num_key_value_heads": 4, "pad_token_id": 0},
            "classifier_pooling: expected cls, bos, mean, got late",
        ),
    ):
        config = getattr(transformers, f"{name}Config")(**common, **own)
        getattr(transformers, f"{name}ForSequenceClassification")(config).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=message):
            load_score_model(tmp_path / name)


def own_encoder(folder, name, model="Model", **settings):
    """Writes a tiny random encoder of a class of transformers -> the folder."""
    import transformers

    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"intermediate_size": 64, "max_position_embeddings": 66, "initializer_range": 0.2}
    torch.manual_seed(0)
    if name == "Funnel":
        common = {"vocab_size": 64, "d_model": 32, "n_head": 4}
    config = getattr(transformers, f"{name}Config")(**{**common, **settings})
    getattr(transformers, name + model)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
@pytest.mark.parametrize(
    "name, settings",
    [
        ("Camembert", {"pad_token_id": 7}),  # counts positions from its padding id, not the tokenizer's
        ("XLMRoberta", {"pad_token_id": 1}),
        ("Bert", {"pad_token_id": 7}),
        ("NomicBert", {}),  # keeps q, k and v in one weight
    ],
)
def test_a_saved_model_has_the_scores_that_it_had(tmp_path, name, settings, pooling):
    import transformers

    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    path = own_encoder(tmp_path / "base", name, **settings)
    model = score_model_from_backbone(path, kind="cost", pooling=pooling).eval()
    for weight in model.score.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.2)
    rows = [list(range(8, 8 + n)) for n in (9, 4, 12)]
    packed = pack_sequences(rows, [end_row(len(ids)) for ids in rows], torch.device("cpu"))
    expected = model(packed).detach()
    assert expected.std() > 0.01
    save_score_model(tmp_path / "cm", model, encoder_kit.encoder_tokenizer("bert"), kind="cost")
    again = load_score_model(tmp_path / "cm").eval()
    torch.testing.assert_close(again(packed).detach(), expected, **NEAR)
    if pooling == "cls":
        published = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "cm").eval()
        with torch.no_grad():
            alone = torch.cat([published(input_ids=torch.tensor([ids])).logits.view(-1) for ids in rows])
        torch.testing.assert_close(alone, expected, **NEAR)


@pytest.mark.parametrize(
    "name, model, settings, message",
    [
        ("Longformer", "Model", {"attention_window": 8}, "computes its score from the state of cls alone"),
        ("Luke", "Model", {"entity_vocab_size": 8, "entity_emb_size": 8}, "from the state of cls alone"),
        ("Canine", "Model", {}, "expected a backbone with one embedding of tokens, got CanineModel"),
        (
            "Funnel",
            "ForSequenceClassification",
            {"d_head": 8, "d_inner": 64, "block_sizes": [1, 1], "num_labels": 1},
            "from the state of cls alone",
        ),
    ],
)
def test_encoders_that_read_more_than_tokens_are_refused_when_they_are_loaded(
    tmp_path, name, model, settings, message
):
    path = own_encoder(tmp_path / name, name, model, **settings)
    with pytest.raises(UserError, match=message) as caught:
        load_score_model(path) if "num_labels" in settings else score_model_from_backbone(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta"])
def test_pooling_by_setting(folder, tmp_path, family, pooling):
    """The head reads the state that the setting names; where the class cannot, transformers finds no head."""
    path = folder(family)
    tokenizer = load_tokenizer(path, pairs=True)
    torch.manual_seed(1)
    model = load_score_model(path, new_head=True, pooling=pooling).eval()
    own = pooling == "cls" or (family, pooling) == ("modernbert", "mean")
    rows = tokenizer(PROMPTS, RESPONSES, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden_BLH = model.backbone(**rows).last_hidden_state
    real_BL = rows["attention_mask"].bool()
    states_BH = torch.stack(
        [
            {"last": row[real][-1], "cls": row[0], "mean": row[real].mean(0)}[pooling]
            for row, real in zip(hidden_BLH, real_BL)
        ]
    )
    with torch.no_grad():
        torch.testing.assert_close(scores_of(model, tokenizer), model.score(states_BH), **NEAR)
    save_score_model(tmp_path / "rm", model, tokenizer, kind="reward")
    again = load_score_model(tmp_path / "rm").eval()
    assert (again.pooling, again.pairs) == (pooling, True)
    torch.testing.assert_close(scores_of(again, tokenizer), scores_of(model, tokenizer), **NEAR)
    card = (tmp_path / "rm" / "README.md").read_text()
    assert ("load it with saferlhf-fast" in card) != own
    if own:
        expected = encoder_kit.class_scores(tmp_path / "rm", PROMPTS, RESPONSES)
        torch.testing.assert_close(scores_of(again, tokenizer), expected, **NEAR)
    with pytest.raises(UserError, match=f"pooling: expected {pooling}"):
        load_score_model(tmp_path / "rm", pooling="mean" if pooling != "mean" else "cls")
    # what an export of a checkpoint is built from
    export_metadata_writer(model, tokenizer)(tmp_path / "hf")
    from saferlhf_fast.config.sections import Lora

    built, _ = build_from_export_metadata(tmp_path / "hf", Lora())
    built.load_state_dict(model.state_dict())
    assert (built.pooling, built.pairs) == (pooling, True)
    torch.testing.assert_close(scores_of(built.eval(), tokenizer), scores_of(model, tokenizer), **NEAR)


def test_a_decoder_may_pool_the_mean_and_not_the_first_token(tmp_path):
    path = kit.make_model(tmp_path / "lm")
    tokenizer = load_tokenizer(path)
    model = score_model_from_backbone(path, pooling="mean").eval()
    ids = [[5, 6, 7], [8, 9], [4, 5, 6, 7, 8]]
    packed = pack_sequences(ids, [end_row(len(row)) for row in ids], torch.device("cpu"))
    alone = [model.backbone(torch.tensor([row])).last_hidden_state[0].mean(0) for row in ids]
    torch.testing.assert_close(model(packed), model.score(torch.stack(alone)), **NEAR)
    save_score_model(tmp_path / "rm", model, tokenizer, kind="reward")
    again = load_score_model(tmp_path / "rm").eval()
    assert (again.pooling, again.pairs) == ("mean", False)
    torch.testing.assert_close(again(packed), model(packed), **NEAR)
    from transformers import AutoModelForSequenceClassification

    _, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", num_labels=1, output_loading_info=True
    )
    assert "score.weight" in info["missing_keys"], "transformers would read the head at the last token"
    with pytest.raises(UserError, match="pooling: expected last or mean for llama"):
        load_score_model(path, new_head=True, pooling="cls")
    with pytest.raises(UserError, match="pooling: expected last, as a critic needs, got mean"):
        again.add_head()


def test_score_models_from_before_the_setting_are_read_at_the_last_token(folder, tmp_path):
    """Also encoders, which read prompt and response as one text then."""
    from saferlhf_fast.models.encoders import reads_pairs

    tokenizer = load_tokenizer(folder("bert"), pairs=True)
    model = score_model_from_backbone(folder("bert"), pooling="last").eval()
    save_score_model(tmp_path / "old", model, tokenizer, kind="cost")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["saferlhf_fast"] = {"kind": "cost"}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    old = load_score_model(tmp_path / "old").eval()
    assert (old.pooling, old.pairs, reads_pairs(tmp_path / "old")) == ("last", False, False)
    torch.testing.assert_close(scores_of(old, tokenizer), scores_of(model, tokenizer), **NEAR)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v3"])
def test_too_long_pairs_lose_the_beginning_of_the_prompt_first(folder, family):
    tokenizer = load_tokenizer(folder(family), pairs=True)
    template = PairTemplate(tokenizer)
    ((head, tail),) = split_of(tokenizer, ["one two three four five " * 6], ["yes no"])
    begin, end = tokenizer("", "")["input_ids"][:1], tail[-1:]
    limit = len(tail) + 9
    ((short, kept),) = split_of(tokenizer, ["one two three four five " * 6], ["yes no"], max_length=limit)
    assert kept == tail and short[:1] == begin and short[1:] == head[len(head) - 8 :]
    ((least, cut),) = split_of(tokenizer, ["one two"], ["yes no " * 20], max_length=12)
    assert len(least) + len(cut) <= 12 and cut[-1:] == end and least[:1] == begin
    assert least[-template.tag_length :] == head[-template.tag_length :]


def test_a_prompt_of_several_turns_has_roles(folder):
    template = PairTemplate(load_tokenizer(folder("bert"), pairs=True))
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Stop")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert template.prompt_of(messages) == "SYSTEM: Be brief.\nUSER: Hi\nASSISTANT: Yes?\nUSER: Stop"
    assert template.prompt_of(messages[1:2]) == "Hi"
    tagged = PairTemplate(template.tokenizer, "safe-rlhf").prompt_of(messages[1:])
    assert tagged == "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:Yes? USER: Stop ASSISTANT:"


def test_refusals(folder, tmp_path):
    """One line that names the field, what was expected and what there is."""
    tokenizer = load_tokenizer(folder("bert"), pairs=True)
    with pytest.raises(UserError, match="template: expected auto, safe-rlhf or none for an encoder"):
        PairTemplate(tokenizer, "tokenizer")
    with pytest.raises(UserError, match="expected a tokenizer that puts a separator between the two texts"):
        PairTemplate(kit.make_tokenizer())
    with pytest.raises(UserError, match="end-of-sequence token"):
        load_tokenizer(folder("bert"))
    with pytest.raises(UserError, match="got a plain BertForMaskedLM without a head"):
        load_score_model(folder("bert"))
    with pytest.raises(UserError, match="pooling: expected one of last, cls, mean, got 'first'"):
        ScoreModel(load_score_model(folder("bert"), new_head=True).backbone, pooling="first")
    many = encoder_kit.make_encoder(tmp_path / "many", "bert", head=True)
    config = json.loads((Path(many) / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (Path(many) / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="expected a head with one score, got one of 3 labels"):
        load_score_model(many, new_head=True)
    headless = tmp_path / "headless"
    score_model_from_backbone(folder("bert")).backbone.save_pretrained(headless)
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(
        json.dumps({**config, "num_labels": 1, "architectures": ["BertForSequenceClassification"]})
    )
    with pytest.raises(UserError, match="lacks weights of a score model"):
        load_score_model(headless, new_head=True)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_an_encoder_is_no_policy(folder, tmp_path, family):
    """transformers has a causal class for these, which sees the tokens that it has to predict."""
    from saferlhf_fast.models.causal_lm import load_causal_lm

    with pytest.raises(
        UserError, match="expected a causal language model, got the encoder .*, whose tokens see"
    ):
        load_causal_lm(folder(family))
    path = encoder_kit.make_encoder(tmp_path / "decoder", family, is_decoder=True)
    lm = load_causal_lm(path).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        before, after = (
            lm(input_ids=x).logits[:, :4] for x in (ids, ids.index_fill(1, torch.tensor([6]), 9))
        )
    assert torch.equal(before, after)
