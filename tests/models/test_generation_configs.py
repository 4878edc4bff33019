"""A model's generation config keeps its meaning: load to save, checkpoints, exports, merged adapters."""

import json
from pathlib import Path

import kit
import pytest
import torch

from saferlhf_fast.config.sections import Lora
from saferlhf_fast.models import load_causal_lm, load_tokenizer, save_causal_lm, save_score_model
from saferlhf_fast.models.export_files import build_from_export_metadata, export_metadata_writer
from saferlhf_fast.models.lora import add_lora
from saferlhf_fast.models.policy import Policy
from saferlhf_fast.models.score_model import score_model_from_backbone

GIVEN = [
    {"temperature": 0.0, "do_sample": False},
    {"temperature": 0.7, "top_p": 0.9, "do_sample": False},  # leftovers beside greedy
    {"temperature": 1e-6},
    {"top_p": 0.9},
    {"do_sample": True, "temperature": 0.6, "top_k": 40, "min_p": 0.05},
    {"eos_token_id": [2, 5, 9], "pad_token_id": 7, "bos_token_id": 1},
    {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
    {"repetition_penalty": 1.05, "max_new_tokens": 17, "suppress_tokens": [4], "a_later_field": [1]},
]


def read(folder):
    """The fields of a folder's generation config, without the version that wrote it."""
    fields = json.loads((Path(folder) / "generation_config.json").read_text())
    return {name: value for name, value in fields.items() if name != "transformers_version"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return kit.make_model(tmp_path_factory.mktemp("generation") / "model")


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(given))
def test_fields_survive_all_ways_of_saving(base, tmp_path, given):
    """Also after a change of another field, which transformers would refuse to save beside leftovers."""
    from transformers import AutoModelForCausalLM

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    expected = {**ids, **given}
    (Path(base) / "generation_config.json").write_text(json.dumps(expected))
    tokenizer, lm = load_tokenizer(base), load_causal_lm(base)
    own = lm.generation_config
    save_causal_lm(tmp_path / "plain", lm, tokenizer)
    assert lm.generation_config is own
    export_metadata_writer(Policy(lm), tokenizer)(tmp_path / "hf")
    again, _ = build_from_export_metadata(tmp_path / "hf", Lora())
    save_causal_lm(tmp_path / "exported", again.lm, tokenizer)
    adapted = add_lora(load_causal_lm(tmp_path / "plain"), Lora(rank=2))
    save_causal_lm(tmp_path / "merged", adapted, tokenizer)
    score = score_model_from_backbone(base, kind="cost")
    save_score_model(tmp_path / "score", score, tokenizer, kind="cost")
    for name in ("plain", "hf", "exported", "merged"):
        assert read(tmp_path / name) == expected, name

    lm.generation_config.max_length = 50
    save_causal_lm(tmp_path / "changed", lm, tokenizer)
    assert read(tmp_path / "changed") == {**expected, "max_length": 50}

    if "do_sample" not in given or not given["do_sample"]:
        prompt = torch.tensor([[1, 9, 20, 11]])

        def answers(folder):
            model, texts = AutoModelForCausalLM.from_pretrained(folder), set()
            for seed in range(3):
                torch.manual_seed(seed)
                texts.add(tuple(model.generate(prompt, max_new_tokens=6)[0].tolist()))
            return texts

        assert answers(base) == answers(tmp_path / "merged") and len(answers(base)) == 1


def test_ids_that_are_missing_are_the_tokenizer_s(base, tmp_path):
    (Path(base) / "generation_config.json").write_text(json.dumps({"top_p": 0.9}))
    save_causal_lm(tmp_path / "out", load_causal_lm(base), load_tokenizer(base))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert read(tmp_path / "out") == {"top_p": 0.9, **ids}


@pytest.mark.parametrize("text, message", [
    ("", "JSON object in UTF-8"), ("{", "JSON object in UTF-8"), ('\ufeff{"top_p": 0.9}', "UTF-8 BOM"),
    ("[]", "got list"), ("null", "got NoneType"),
    ('{"eos_token_id": "2"}', "eos_token_id: expected a token id or a list of them, got '2'"),
    ('{"eos_token_id": [2, null]}', r"eos_token_id: .* got \[2, None\]"),
    ('{"eos_token_id": NaN}', "eos_token_id: .* got nan"),
    ('{"eos_token_id": true}', "eos_token_id: .* got True"),
    ('{"pad_token_id": [3]}', r"pad_token_id: expected a token id, got \[3\]"),
])  # fmt: skip
def test_a_damaged_file_is_refused_and_stays(base, text, message):
    """transformers passes over some of them without a word: the model would have lost its end tokens."""
    from saferlhf_fast.errors import UserError

    file = Path(base) / "generation_config.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"generation_config.json: .*{message}"):
        load_causal_lm(base)
    assert file.read_text(encoding="utf-8") == text


def test_ids_of_an_older_config_are_checked_too(base):
    """Without the file, transformers takes these fields from config.json."""
    from saferlhf_fast.errors import UserError

    (Path(base) / "generation_config.json").unlink(missing_ok=True)
    file = Path(base) / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "eos_token_id": [2, 5]}))
    assert load_causal_lm(base).generation_config.eos_token_id == [2, 5]
    file.write_text(json.dumps({**json.loads(before), "eos_token_id": ["2"]}))
    with pytest.raises(UserError, match="eos_token_id"):
        load_causal_lm(base)
    file.write_text(before)


def test_a_head_smaller_than_the_tokenizer_is_refused(base, tmp_path):
    """The embedding may be as large as the tokenizer where the head is not."""
    from unittest import mock

    from saferlhf_fast.errors import UserError

    tokenizer = load_tokenizer(base)
    with (
        mock.patch("saferlhf_fast.models.causal_lm.logit_count", return_value=len(tokenizer) - 1),
        pytest.raises(UserError, match=f"{len(tokenizer)} tokens.*{len(tokenizer) - 1} rows"),
    ):
        load_causal_lm(base, tokenizer=tokenizer)


def test_rooms_have_their_public_names():
    import saferlhf_fast.data
    import saferlhf_fast.models
    from saferlhf_fast.data import load_sources
    from saferlhf_fast.data.sources import load_sources as defined
    from saferlhf_fast.models.causal_lm import load_causal_lm as loader

    assert load_sources is defined and load_causal_lm is loader
    for room in (saferlhf_fast.models, saferlhf_fast.data):
        assert all(getattr(room, name) is not None for name in room._PUBLIC)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            room.nothing  # noqa: B018
