"""`moderation train`, `evaluate` and `classify` on the command line: what they write, resume, and refuse."""

import gzip
import io
import json
import random
import sys
from pathlib import Path

import encoder_kit
import kit
import pytest
import torch
from resume_kit import assert_same, interrupted

from saferlhf_fast.data.harm_taxonomy import PKU
from saferlhf_fast.models.moderator_spec import read_spec
from saferlhf_fast.moderation import Moderator

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytestmark = pytest.mark.numeric
TRAIN = {
    "train__max_length": 64,
    "train__batch_size": 8,
    "train__epochs": 9,
    "optim__learning_rate": 3e-3,
    "log__trackers": "[]",
}


def rows(n=90, seed=0, prompts=45):
    """Rows like those of PKU-SafeRLHF-QA: `harm` once to three times is the severity, `stop` a category."""
    rng, out = random.Random(seed), []
    plain = [w for w in kit.WORDS if w.islower() and w not in ("harm", "stop")]
    for i in range(n):
        severity = rng.choice([0, 0, 1, 2, 3])
        words = [rng.choice(plain) for _ in range(rng.randint(2, 6))] + ["harm"] * severity
        insult = severity > 0 and rng.random() < 0.5
        words += ["stop"] * insult
        flags = {name: False for name in PKU}
        flags["Violence" if not insult else "Insulting Behavior"] = severity > 0
        out.append(
            {
                "prompt": f"what is {plain[(i + seed) % len(plain)]} {seed} {i % prompts}",
                "response": " ".join(words),
                "is_safe": severity == 0,
                "harm_category": flags,
                "severity_level": severity,
            }
        )
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moderation")
    made = {
        "decoder": kit.make_model(folder / "decoder"),
        "encoder": encoder_kit.make_encoder(folder / "encoder", "bert"),
        "data": kit.write_rows(folder / "data.jsonl", rows()),
        "test": kit.write_rows(folder / "test.jsonl", rows(60, seed=1, prompts=30)),
    }
    with kit.no_report():
        run = folder / "run"
        made["run"] = kit.run("moderation", run, model=made["decoder"], data=made["data"], **TRAIN, **HELD)
    return made | {"model": str(made["run"] / "model")}


HELD = {"train__eval_fraction": 0.4, "checkpoint__interval": 20}


def refused(capsys, *words):
    assert kit.main(*words) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_leaves_a_tuned_moderator_and_its_quality(world):
    spec, calibration = read_spec(world["model"])
    assert spec.categories == PKU and spec.label_set == "pku" and not spec.refusal and spec.pooling == "last"
    tuned = json.loads((world["run"] / "thresholds.json").read_text())
    summary = kit.summary(world["run"])
    assert calibration.version == tuned["version"] == summary["threshold_version"] != "untuned"
    assert set(calibration.thresholds) == {"strict", "balanced", "permissive"} and "Copyright" not in str(
        calibration.thresholds
    )
    assert {"National Security", "Environmental Damage"} & set(tuned["untuned"])
    quality = json.loads((world["run"] / "quality.json").read_text())
    assert quality["n"] < summary["held_out"], "half of the held-out rows tune, the other half is measured"
    assert quality["outputs"]["unsafe"]["auroc"] > 0.9 and quality["severity"]["kappa"] > 0.6
    assert set(quality["categories"]["absent"]) >= {"Copyright"} or quality["categories"]["present"] == 2
    assert (world["run"] / "quality.html").stat().st_size > 5000


def test_a_resumed_run_equals_an_uninterrupted_one(world, tmp_path):
    copy = interrupted(world["run"], tmp_path / "copy", at=20)
    with kit.no_report():
        kit.run(
            "moderation", copy, model=world["decoder"], data=world["data"], resume="auto", **TRAIN, **HELD
        )
    steps = kit.summary(copy)["steps"]
    assert steps > 40
    assert_same(world["run"], copy, step=steps - steps % 20)
    assert kit.summary(copy)["threshold_version"] == kit.summary(world["run"])["threshold_version"]


FORMS = {
    "encoder, n-grams, sources": {"features": "ngrams", "buckets": 1024, "source_heads": "true"},
    "frozen encoder": {"train_backbone": "false", "features": "ngrams", "buckets": 1024},
    "ZeRO-3": {"engine__zero_stage": 3},
    "ZeRO-2, adapters": {"engine__zero_stage": 2, "lora__rank": 2},
}


@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=[pytest.mark.slow] if f == "ZeRO-3" else []) for f in FORMS]
)
def test_forms_of_training_end_where_the_plain_one_does(world, tmp_path, form):
    model = world["encoder" if "encoder" in form else "decoder"]
    data = f"[{world['data']},{world['test']}]" if "sources" in form else world["data"]
    settings = {**TRAIN, "train__max_steps": 12, "train__eval_fraction": 0.3}
    with kit.no_report():
        run = kit.run("moderation", tmp_path / "run", model=model, data=data, **settings, **FORMS[form])
        verdicts = Moderator.from_pretrained(run / "model")(["what is"] * 2, ["harm harm harm", "yes"])
        assert all(0 < v.unsafe < 1 for v in verdicts) and verdicts[0].unsafe > verdicts[1].unsafe
        if form == "ZeRO-3":
            plain = kit.run("moderation", tmp_path / "plain", model=model, data=data, **settings)
            other = Moderator.from_pretrained(plain / "model")(["what is"] * 2, ["harm harm harm", "yes"])
            assert [v.unsafe for v in verdicts] == pytest.approx([v.unsafe for v in other], abs=1e-4)
    if "frozen" in form:
        from safetensors.torch import load_file
        from transformers import AutoModel

        before = AutoModel.from_pretrained(model).state_dict()
        after = load_file(run / "model" / "model.safetensors")
        name = "embeddings.word_embeddings.weight"
        assert torch.equal(after[f"bert.{name}"], before[name])
    if "sources" in form:
        spec, _ = read_spec(run / "model")
        assert len(spec.sources) == 2


def test_evaluation_writes_numbers_that_its_predictions_give(world, tmp_path, capsys):
    out = tmp_path / "quality"
    assert (
        kit.main(
            "moderation", "evaluate", f"model={world['model']}", f"data={world['test']}", f"output={out}"
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "quadratic kappa" in shown and "left out, without a positive" in shown and "control" in shown
    quality = json.loads((out / "quality.json").read_text())
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == quality["n"] == 60 and "response" not in predictions[0]
    source = [json.loads(line) for line in open(world["test"])]
    for prediction, row in zip(predictions, source):
        assert prediction["labels"]["severity>0"] == (not row["is_safe"])
    model = Moderator.from_pretrained(world["model"])
    verdicts = model([r["prompt"] for r in source], [r["response"] for r in source])
    assert [v.severity for v in verdicts] == [p["level"] for p in predictions]
    flagged = [v.flagged for v in verdicts]
    unsafe = [not r["is_safe"] for r in source]
    assert quality["outputs"]["unsafe"]["recall"] == pytest.approx(
        sum(a and b for a, b in zip(flagged, unsafe)) / sum(unsafe)
    )
    again = ["moderation", "evaluate", f"model={world['model']}", f"data={world['test']}", f"output={out}"]
    assert "holds predictions.jsonl; expected a new or empty folder, or overwrite=true" in refused(
        capsys, *again
    )
    assert kit.main(*again, "overwrite=true", "threshold=0.0") == 0
    assert json.loads((out / "quality.json").read_text())["outputs"]["unsafe"]["recall"] == 1.0


def test_classify_continues_where_it_was_killed(world, tmp_path, monkeypatch, capsys):
    """The bytes are those of an uninterrupted run, wherever it was cut."""
    monkeypatch.setattr("saferlhf_fast.moderation.classify.CHUNK", 16)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    words = ["moderation", "classify", f"model={world['model']}", f"input={world['test']}", "--text"]
    assert kit.main(*words, f"output={whole}") == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 60 and [json.loads(a)["response"] for a in lines] == [
        r["response"] for r in rows(60, 1, 30)
    ]
    for rows_left, tail in ((0, 5), (1, 0), (16, 40), (23, 40), (60, 0)):
        cut.write_bytes(b"".join(lines[:rows_left]) + (lines[rows_left][:tail] if tail else b""))
        assert kit.main(*words, f"output={cut}") == 0
        assert cut.read_bytes() == whole.read_bytes(), rows_left

    shorter = kit.write_rows(tmp_path / "shorter.jsonl", rows(30, 1, 30))
    other = tmp_path / "notes.txt"
    other.write_text("no newline at its end")
    capsys.readouterr()
    for changed, message in (
        ([f"output={cut}", "preset=strict"], "was judged with the preset balanced, and this run has strict"),
        ([f"output={cut}", "stream=true"], "was judged with the stream False"),
        ([f"output={cut}", f"input={shorter}"], "and the input has no row there"),
        (
            [f"output={cut}", f"input=[{shorter},{world['test']}]"],
            f"and the input has {world['test']} line 30",
        ),
        ([f"output={other}"], "has other lines than verdicts"),
    ):
        assert message in refused(capsys, *words, *changed)
    assert cut.read_bytes() == whole.read_bytes() and other.read_text() == "no newline at its end"


def test_classify_reads_standard_input_and_answers_every_line(world, monkeypatch, capsys):
    lines = [
        b'{"prompt": "what is red", "response": "harm harm harm", "id": 7}',
        b'{"text": "yes"}',
        b"\xff\xfe not text",
        b"[1]",
        b'{"prompt": "a", "response": 3}',
        b'{"prompt": "a", "response": "\\ud800"}',
        b'{"question": "a"}',
        b"",
        b'{"prompt": "a", "response": "no maybe red green blue"}',
    ]
    stdin = io.TextIOWrapper(io.BytesIO(b"\n".join(lines)))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert kit.main("moderation", "classify", f"model={world['model']}", "--stream", "every=2") == 0
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (
        len(out) == 8 and out[0]["id"] == 7 and [("error" in row) for row in out] == [0, 0, 1, 1, 1, 1, 1, 0]
    )
    assert "byte 0xff" in out[2]["error"] and "response: expected text, got int" in out[4]["error"]
    assert [part["tokens"] for part in out[7]["prefixes"]] == [2, 4, 6]
    assert out[7]["prefixes"][-1]["unsafe"] == pytest.approx(out[7]["unsafe"], abs=1e-6)


def test_evaluation_rows_that_are_training_rows_are_refused_or_left_out(world, tmp_path, capsys):
    mixed = kit.write_rows(tmp_path / "mixed.jsonl", rows()[:5] + rows(30, seed=2))
    base = [
        "moderation",
        "train",
        f"model={world['decoder']}",
        f"data={world['data']}",
        f"output={tmp_path / 'o'}",
    ]
    for file, message in ((world["data"], "90 of 90 rows are also"), (mixed, "5 of 35 rows are also")):
        assert message in refused(capsys, *base, f"train.eval_data={file}")
    assert "none is left" in refused(capsys, *base, f"train.eval_data={world['data']}", "overlap=drop")
    assert not (tmp_path / "o").exists()
    with kit.no_report():
        words = [f"train.eval_data={mixed}", "overlap=drop", "train.max_steps=1", "log.trackers=[]"]
        assert kit.main(*base, *words) == 0
    assert "5 of 35 rows" in capsys.readouterr().err or kit.summary(tmp_path / "o")["held_out"] == 30
    assert kit.summary(tmp_path / "o")["held_out"] == 30


def test_what_cannot_be_used_is_named_in_one_line(world, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    damaged = tmp_path / "damaged.jsonl.gz"
    packed = bytearray(gzip.compress(Path(world["test"]).read_bytes()))
    packed[20:40] = bytes(20)
    damaged.write_bytes(packed)
    unlabelled = kit.write_rows(
        tmp_path / "u.jsonl", [{**rows(1)[0], "is_safe": None, "harm_category": None, "severity_level": None}]
    )
    model, decoder = f"model={world['model']}", f"model={world['decoder']}"
    cases = {
        ("train", decoder, f"data={empty}", f"output={tmp_path / 'x'}"): "empty",
        ("train", decoder, f"data={unlabelled}", f"output={tmp_path / 'x'}"): "label",
        (
            "train",
            decoder,
            f"data={world['data']}",
            f"output={tmp_path / 'x'}",
            "label_set=openai",
        ): "label_set: expected openai",
        (
            "train",
            decoder,
            f"data={world['data']}",
            f"output={tmp_path / 'x'}",
            "train_backbone=false",
            "lora.rank=2",
        ): "train_backbone: expected true",
        ("evaluate", model, f"data={empty}"): "empty",
        ("evaluate", decoder, f"data={world['test']}"): "expected a moderator",
        ("evaluate", model, f"data={world['test']}", "preset=mild"): "preset",
        ("classify", model, f"input={empty}"): "empty",
        ("classify", model, "input=nowhere.jsonl"): "does not exist",
        ("classify", model, f"input={damaged}"): "damaged.jsonl.gz: cannot be read: ",
        ("classify", model, f"input={world['test']}", f"output={world['test']}"): "is an input too",
        ("classify", decoder, f"input={world['test']}"): "expected a moderator",
        ("judge", model): "moderation: expected train, evaluate, classify, serve after it, got judge",
        (): "moderation: expected train, evaluate, classify, serve after it, got nothing",
    }
    for words, message in cases.items():
        line = refused(capsys, "moderation", *words)
        assert message in line and "Traceback" not in line, (words, line)
    assert not (tmp_path / "x").exists() and len(open(world["test"]).readlines()) == 60
    other = tmp_path / "other.jsonl"
    other.write_text('{"threshold_version": "abc"}\n')
    words = ("moderation", "classify", model, f"input={world['test']}", f"output={other}")
    assert "was judged with the thresholds abc" in refused(capsys, *words)
    assert other.read_text() == '{"threshold_version": "abc"}\n'


def test_a_checkpoint_s_model_can_be_exported(world, tmp_path):
    from saferlhf_fast.runtime.checkpoint import manifest

    folder = manifest.listed(world["run"])[-1][1]
    assert kit.main("checkpoint", "export", folder, "--output", tmp_path / "export") == 0
    exported, _ = read_spec(tmp_path / "export")
    assert exported == read_spec(world["model"])[0]
    verdict = Moderator.from_pretrained(tmp_path / "export")("what is red", "harm harm harm")[0]
    assert verdict.threshold_version == "untuned" and verdict.unsafe > 0.5
