"""Encoders from preferences to PPO-Lag: train, export, resume, score a decoder's texts, evaluate."""

import json

import encoder_kit
import kit
import pytest
import torch
from resume_kit import digest, interrupted

from saferlhf_fast.runtime.checkpoint import manifest

pytestmark = pytest.mark.numeric

TRAIN = {"train__max_length": 64, "train__batch_size": 8, "optim__learning_rate": 1e-3}
PPO = {"ppo__max_steps": 2, "ppo__batch_size": 4, "sampling__max_new_tokens": 8, "max_length": 64}
COST = {
    **TRAIN,
    "train__epochs": 4,
    "train__max_steps": 8,
    "train__eval_fraction": 0.3,
    "checkpoint__interval": 4,
    "baseline": "true",
}
PAIRS = ["what is red of blue"] * 3, ["yes red", "harm red", "the day [SEP]"]
NEAR = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny decoder, two encoders trained as reward and cost model, and data."""
    folder = tmp_path_factory.mktemp("encoders")
    easy = kit.make_easy(folder / "easy")["pairs"]
    encoders = {f: encoder_kit.make_encoder(folder / f, f) for f in ("bert", "roberta")}
    reward = kit.run(
        "reward", folder / "reward", model=encoders["roberta"], data=easy, train__max_steps=2, **TRAIN
    )
    cost = kit.run("cost", folder / "cost", model=encoders["bert"], data=easy, **COST)
    return {
        "folder": folder,
        "pairs": easy,
        **encoders,
        "lm": kit.make_model(folder / "lm"),
        "prompts": kit.make_data(folder / "data", n=12)["prompts"],
        "reward": reward,
        "cost": cost,
    }


def test_it_learns_and_reports_beside_the_baseline(world):
    summary = kit.summary(world["cost"])
    assert summary["eval/accuracy"] > 0.9 and summary["baseline/accuracy"] > 0.9, summary
    compared = summary["comparison"]
    for name in ("accuracy", "accuracy_sign"):
        model, tfidf = compared[name]["model"], compared[name]["tfidf"]
        assert model["mean"] == pytest.approx(summary[f"eval/{name}"], abs=1e-6)
        assert tfidf["mean"] == summary[f"baseline/{name}"]
        assert model["low"] <= model["mean"] <= model["high"]
        assert compared[name]["difference"]["mean"] == pytest.approx(model["mean"] - tfidf["mean"])


def test_a_checkpoint_exports_and_a_run_resumes_to_the_same_scores(world, tmp_path):
    run, expected = world["cost"], encoder_kit.class_scores(world["cost"] / "model", *PAIRS)
    newest = manifest.folder_of(run, 8)
    assert kit.main("checkpoint", "export", newest, "--output", tmp_path / "exported") == 0
    torch.testing.assert_close(encoder_kit.class_scores(tmp_path / "exported", *PAIRS), expected, **NEAR)
    again = interrupted(run, tmp_path / "cost", at=4)
    kit.run("cost", again, model=world["bert"], data=world["pairs"], resume="auto", **COST)
    assert kit.summary(again)["steps"] == 8
    assert digest(again / "model" / "model.safetensors") == digest(run / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"lora__rank": 2}, marks=pytest.mark.slow),
        pytest.param({"ppo__shared_critic": "true", "engine__zero_stage": 3}, marks=pytest.mark.slow),
    ],
    ids=["separate", "shared base", "shared critic, ZeRO-3"],
)
def test_encoders_score_a_decoder_s_texts(world, tmp_path, settings, capsys):
    """The critics start from the actor; evaluate gives transformers' own scores of the texts."""
    models = {kind: world[kind] / "model" for kind in ("reward", "cost")}
    run = kit.run(
        "ppo-lag", tmp_path / "ppo", model=world["lm"], data=world["prompts"], **models, **PPO, **settings
    )
    assert "an encoder" in capsys.readouterr().out
    if settings:
        return
    kit.run(
        "evaluate",
        tmp_path / "evaluation",
        model=run / "model",
        prompts=world["prompts"],
        sampling__max_new_tokens=8,
        max_length=64,
        **models,
    )
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "samples.jsonl").read_text().splitlines()]
    for kind, model in models.items():
        expected = encoder_kit.class_scores(
            model, [row["prompt"] for row in rows], [row["response"] for row in rows]
        )
        torch.testing.assert_close(torch.tensor([row[kind] for row in rows]), expected, **NEAR)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_and_adapters_give_the_weights_of_one_process(world, tmp_path, zero_stage):
    """Trained with ZeRO, an encoder and its head end where they end without; adapters are merged."""
    scores = []
    for stage in (0, zero_stage):
        run = kit.run(
            "reward",
            tmp_path / str(stage),
            model=world["bert"],
            data=world["pairs"],
            train__max_steps=2,
            engine__zero_stage=stage,
            lora__rank=2 if zero_stage == 2 else 0,
            **TRAIN,
        )
        scores.append(encoder_kit.class_scores(run / "model", *PAIRS))
        assert not (run / "model" / "adapter").exists(), "no decoder can have this adapter"
    torch.testing.assert_close(*scores, **NEAR)


def test_refusals(world, tmp_path, capsys):
    """Before anything is trained or written."""

    def refused(stage, **settings):
        words = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        assert kit.main(stage, f"output={tmp_path / 'out'}", *words) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    data = world["pairs"]
    assert "loss: expected sequence with pooling cls" in refused(
        "cost", model=world["bert"], data=data, loss="token"
    )
    assert "loss: expected sequence with pooling mean" in refused(
        "cost", model=world["lm"], data=data, loss="token", pooling="mean"
    )
    assert "pooling: expected last or mean for llama" in refused(
        "cost", model=world["lm"], data=data, pooling="cls"
    )
    assert "pooling: expected cls, as the head of" in refused(
        "cost", model=world["cost"] / "model", data=data, pooling="mean"
    )
    assert "template: expected auto, safe-rlhf or none" in refused(
        "cost", model=world["bert"], data=data, template="tokenizer"
    )
    assert "cost_critic: expected a causal language model" in refused(
        "ppo-lag",
        model=world["lm"],
        data=world["prompts"],
        reward=world["reward"] / "model",
        cost=world["cost"] / "model",
        cost_critic=world["bert"],
        **PPO,
    )
