"""Every stage on tiny data: the files of its run; how supervised stages learn, stop, save and select."""

import json
import os
import re

import kit
import pytest
import torch
import yaml

from saferlhf_fast.models.model_card import write_card

STAGES = ("sft", "reward", "cost", "dpo", "ppo", "ppo-lag", "evaluate")
SECRET = "not-to-be-written-anywhere"
FAST = {
    "optim__learning_rate": 3e-3,
    "train__batch_size": 8,
    "train__accumulation": 1,
    "train__max_length": 32,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, easy data, and a folder with one short run of every stage."""
    folder = tmp_path_factory.mktemp("stages")
    base = kit.make_model(folder / "model")
    data = {**kit.make_data(folder / "data"), **kit.make_easy(folder / "easy")}
    paths = {"folder": folder, "model": base, **data}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERLHF_TEST_TOKEN", SECRET)
        for stage, key in (("sft", "sft"), ("reward", "pairs"), ("cost", "pairs"), ("dpo", "pairs")):
            kit.run(stage, folder / stage, True, model=base, data=data[key], train__max_steps=2, **FAST)
        scores = {k: folder / k / "model" for k in ("reward", "cost")}
        ppo = {
            "model": base,
            "data": data["prompts"],
            "max_length": 32,
            "ppo__max_steps": 1,
            "ppo__batch_size": 4,
        }
        kit.run("ppo", folder / "ppo", True, reward=scores["reward"], **ppo)
        kit.run("ppo-lag", folder / "ppo-lag", True, **scores, **ppo)
        kit.run(
            "evaluate",
            folder / "evaluate",
            model=folder / "sft" / "model",
            prompts=data["prompts"],
            max_length=32,
            reference=base,
            **scores,
        )
    return paths


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_folder_is_complete_and_holds_no_environment_variable(world, stage):
    folder = world["folder"] / stage
    names = {"config.yaml", "versions.json", "started.json", "summary.json", "finished.json"}
    names |= {"evaluation.json", "samples.jsonl"} if stage == "evaluate" else {"metrics.jsonl", "report.html"}
    files = kit.files(folder)
    assert names <= set(files)
    for name, content in files.items():
        assert SECRET.encode() not in content and os.environ["PATH"].encode() not in content, name
        if name.endswith(".json"):
            json.loads(content, parse_constant=lambda text, name=name: pytest.fail(f"{name} holds {text}"))
    assert not [p.name for p in folder.iterdir() if p.name.endswith((".tmp", ".old"))]


@pytest.mark.numeric
@pytest.mark.parametrize("stage", STAGES[:-1])
def test_the_model_card_names_no_path_and_its_code_runs(world, stage):
    folder = world["folder"] / stage / "model"
    card = (folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    kind = "classification" if stage in ("reward", "cost") else "generation"
    assert (
        head["pipeline_tag"] == f"text-{kind}"
        and head["library_name"] == "transformers"
        and "base_model" not in head
    )
    assert str(world["folder"]) not in card and f"- stage: {stage}" in card and "- model: model" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert 'folder = "path/to/this/folder"' in code
    space = {}
    exec(code.replace("path/to/this/folder", str(folder)), space)
    if kind == "classification":
        assert space["score"].item() == pytest.approx(space["score_B"].item(), abs=1e-5)


@pytest.mark.parametrize(
    "model, base, shown",
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("with space/my model", None, "my model"),
        ("/home/someone/sft-7b", None, "sft-7b"),
        ("runs/sft/mine", None, "mine"),
        ("~/mine", None, "mine"),
    ],
)
def test_a_model_card_names_a_base_only_if_it_is_a_name_on_the_hub(tmp_path, model, base, shown):
    sources = [
        {"path": "/private/a/x.json", "kept": 1},
        {"path": "/private/b/x.json", "kept": 2},
        {"path": "org/set", "kept": 3},
    ]
    write_card(
        tmp_path,
        "policy",
        {"stage": "sft", "model": model, "data": {"sources": sources}, "eval": ["/private/e.json"]},
    )
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1]).get("base_model") == base
    assert f"- model: {shown}\n" in card and "private" not in card and "someone" not in card
    assert card.count("- x.json:\n") == 2 and "- path: org/set\n" in card and '- eval: ["e.json"]' in card


@pytest.mark.numeric
@pytest.mark.parametrize("stage", STAGES[:-1])
def test_the_saved_model_loads_with_the_classes_of_transformers(world, stage):
    """The classes load it without this package, and it is not the model that the run began with."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from saferlhf_fast.models.score_model import load_score_model

    folder = world["folder"] / stage / "model"
    kind = AutoModelForSequenceClassification if stage in ("reward", "cost") else AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(folder)("what is red </s>", return_tensors="pt")
    logits = model(**{k: tokens[k] for k in ("input_ids", "attention_mask")}).logits.detach()
    assert logits.isfinite().all()
    if kind is AutoModelForCausalLM:
        start_logits = kind.from_pretrained(world["model"])(tokens["input_ids"]).logits
        assert not torch.allclose(logits, start_logits, atol=1e-6)
        return
    score_model = load_score_model(folder)
    scores_BL = score_model(tokens["input_ids"], tokens["attention_mask"])
    assert score_model.end_scores(scores_BL, tokens["attention_mask"]).item() == pytest.approx(
        logits.item(), abs=1e-6
    )
    assert score_model.kind == stage


@pytest.mark.numeric
def test_sft_learns_and_evaluates(world, tmp_path):
    from transformers import AutoModelForCausalLM

    out = kit.run(
        "sft",
        tmp_path / "out",
        model=world["model"],
        data=world["sft"],
        train__epochs=100,
        train__max_steps=40,
        train__eval_fraction=0.2,
        train__eval_interval=10,
        train__save_interval=15,
        **FAST,
    )
    loss, summary = kit.losses(out), kit.summary(out)
    assert len(loss) == 40 and loss[0] > 3 and loss[-1] < 0.5 * loss[0]  # 0.40 to 0.41 over 5 seeds
    evals = kit.losses(out, "eval/loss")
    assert len(evals) == 4 and evals[-1] < 0.7 * evals[0]  # 0.59 to 0.62
    assert summary["steps"] == 40 and summary["eval/loss"] == pytest.approx(evals[-1])
    assert (
        summary["held_out"] > 0 and summary["examples"] + summary["held_out"] == summary["data"]["kept"] == 30
    )
    saved = sorted(p.name for p in out.glob("step-*"))
    assert saved == ["step-15", "step-30"]
    load = AutoModelForCausalLM.from_pretrained
    weights = [load(out / name).lm_head.weight for name in (*saved, "model")]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


@pytest.mark.numeric
@pytest.mark.parametrize("loss", ["sequence", "token"])
@pytest.mark.parametrize("stage", ["reward", "cost"])
def test_score_models_learn_separable_pairs(world, tmp_path, stage, loss):
    out = kit.run(
        stage,
        tmp_path / "out",
        model=world["model"],
        data=world["pairs"],
        train__epochs=100,
        train__max_steps=20,
        train__eval_fraction=0.3,
        loss=loss,
        **FAST,
    )
    summary = kit.summary(out)
    # 0.09 to 0.35 over 5 seeds, accuracies 1
    assert kit.losses(out)[-1] < 0.5 * kit.losses(out)[0]
    assert summary["eval/accuracy"] >= 0.9
    assert stage == "reward" or summary["eval/accuracy_sign"] >= 0.9


@pytest.mark.numeric
def test_dpo_learns_and_keeps_its_reference(world, tmp_path):
    out = kit.run(
        "dpo",
        tmp_path / "out",
        model=world["model"],
        data=world["pairs"],
        train__epochs=100,
        train__max_steps=20,
        **FAST,
    )
    loss = kit.losses(out)
    assert loss[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)  # policy = reference
    # 0.59 to 0.64, 1 over 5 seeds
    assert loss[-1] < 0.7 * loss[0] and kit.losses(out, "train/reward_accuracy")[-1] >= 0.9


@pytest.mark.numeric
def test_best_metric_keeps_the_weights_of_the_best_evaluation(world, tmp_path):
    """The learning rate grows until every step is far too large; a second run measures the saved model.

    Over 5 seeds the last loss was 5.2 to 18 times the best.
    """
    common = {
        "data": world["sft"],
        "train__eval_fraction": 0.3,
        "optim__schedule": "constant",
        "optim__warmup_ratio": 0.99,
    }
    out = kit.run(
        "sft",
        tmp_path / "out",
        model=world["model"],
        train__epochs=100,
        train__max_steps=24,
        train__eval_interval=3,
        train__best_metric="eval/loss",
        **common,
        **{**FAST, "optim__learning_rate": 4.0},
    )
    evals, summary = kit.losses(out, "eval/loss"), kit.summary(out)
    assert 2 * min(evals) < evals[-1], "the last evaluation must not be the best one"
    assert summary["eval/loss"] == min(evals) and summary["best_step"] == 3 * (1 + evals.index(min(evals)))
    assert not (out / "best").exists()
    second = kit.run(
        "sft",
        tmp_path / "again",
        model=out / "model",
        train__max_steps=1,
        **common,
        **{**FAST, "optim__learning_rate": 1e-12},
    )
    assert kit.summary(second)["eval/loss"] == pytest.approx(min(evals), rel=1e-5)


@pytest.mark.numeric
@pytest.mark.parametrize("stage", ["sft", "reward", "cost", "dpo"])
def test_lora_trains_adapters_and_saves_a_plain_model(world, tmp_path, stage):
    from safetensors.torch import load_file

    data = world["sft" if stage == "sft" else "pairs"]
    out = kit.run(
        stage,
        tmp_path / "out",
        model=world["model"],
        data=data,
        train__epochs=100,
        train__max_steps=12,
        lora__rank=4,
        **{**FAST, "optim__learning_rate": 1e-2},
    )
    loss = kit.losses(out)
    # 0.84 to 0.90 (sft, dpo), 0.03 to 0.37 (reward, cost) over 5 seeds
    assert loss[-1] < 0.95 * loss[0]
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (world["model"], out / "model"))
    assert not [name for name in after if "lora" in name or "base_layer" in name]
    same = [name for name in before if name in after and torch.equal(before[name], after[name])]
    changed = [name for name in before if name in after and name not in same]
    assert changed and all("_proj" in name for name in changed)
    assert all("_proj" not in name for name in same)


@pytest.mark.numeric
def test_gradient_checkpointing_changes_no_loss(world, tmp_path):
    runs = [
        kit.run(
            "sft",
            tmp_path / str(on),
            model=world["model"],
            data=world["sft"],
            train__max_steps=3,
            train__gradient_checkpointing=on,
            **FAST,
        )
        for on in (False, True)
    ]
    assert kit.losses(runs[0]) == pytest.approx(kit.losses(runs[1]), rel=1e-6)


@pytest.mark.numeric
@pytest.mark.parametrize("stage", ["sft", "cost"])
def test_bf16_on_a_cpu_stays_close_to_fp32(world, tmp_path, stage):
    data = world["sft" if stage == "sft" else "pairs"]
    runs = [
        kit.run(
            stage,
            tmp_path / precision,
            model=world["model"],
            data=data,
            train__max_steps=3,
            engine__precision=precision,
            **FAST,
        )
        for precision in ("fp32", "bf16")
    ]
    fp32, bf16 = (kit.losses(out) for out in runs)
    # they differed by at most 0.0045 over 5 seeds
    assert bf16 == pytest.approx(fp32, rel=0.02) and bf16 != fp32


@pytest.mark.numeric
def test_accumulation_equals_one_larger_batch(world, tmp_path):
    common = {"model": world["model"], "data": world["sft"], "train__max_steps": 3}
    runs = [
        kit.run(
            "sft",
            tmp_path / f"{size}",
            **common,
            **{**FAST, "train__batch_size": size, "train__accumulation": 12 // size},
        )
        for size in (3, 12)
    ]
    for name in ("train/loss", "train/grad_norm"):
        assert kit.losses(runs[0], name) == pytest.approx(kit.losses(runs[1], name), rel=2e-5)


# ---------------------------------------------------------------- the tokens that are learned


@pytest.mark.numeric
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_every_assistant_turn_is_learned(tmp_path, pad_is_eos):
    """The loss of the first step is the mean over both answers and their end tokens.

    If the end token is also the padding token, the second turn must still read the end of the first one.
    """
    from transformers import AutoModelForCausalLM

    base = kit.make_model(tmp_path / "model", pad_is_eos=pad_is_eos)
    turns = [("what is red", "yes red"), ("stop the day", "no")]
    messages = [
        {"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)
    ]
    data = kit.write_rows(tmp_path / "chat.jsonl", [{"messages": messages}])
    out = kit.run("sft", tmp_path / "out", model=base, data=data, train__max_steps=1, **FAST)
    tokenizer = kit.make_tokenizer(pad_is_eos)
    pieces = [
        ("BEGINNING OF CONVERSATION: USER: what is red ASSISTANT:", False),
        ("yes red </s>", True),
        ("USER: stop the day ASSISTANT:", False),
        ("no </s>", True),
    ]
    encoded = [(tokenizer(text)["input_ids"], answer) for text, answer in pieces]
    ids = torch.tensor([i for piece, _ in encoded for i in piece])
    learned = torch.tensor([answer for piece, answer in encoded for _ in piece])
    logp = AutoModelForCausalLM.from_pretrained(base)(ids[None]).logits[0, :-1].log_softmax(-1)
    nll = -logp.gather(1, ids[1:, None])[:, 0]
    assert learned.sum() == 5
    assert kit.losses(out) == pytest.approx([nll[learned[1:]].mean().item()], rel=1e-5)


@pytest.mark.numeric
def test_dpo_counts_every_token_from_the_first_of_the_response_to_the_end(tmp_path):
    """One pair of unequal lengths and a reference with other weights, against sums of log-softmax."""
    from transformers import AutoModelForCausalLM

    from saferlhf_fast.data.examples import PairExample
    from saferlhf_fast.models.policy import Policy
    from saferlhf_fast.training.dpo import batch_loss

    lms = [
        AutoModelForCausalLM.from_pretrained(kit.make_model(tmp_path / str(seed), seed=seed))
        for seed in (1, 2)
    ]
    prompt, chosen, rejected = [5, 6, 7], [8, 9, 2], [10, 2]
    example = PairExample(prompt + chosen, prompt + rejected, len(prompt), "")

    def logp(lm, response):
        rows = lm(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return sum(rows[len(prompt) - 1 + t, token] for t, token in enumerate(response))

    delta = [logp(lms[0], r) - logp(lms[1], r) for r in (chosen, rejected)]
    margin = 0.3 * (delta[0] - delta[1])
    with torch.no_grad():
        loss, stats = batch_loss(Policy(lms[0]), Policy(lms[1]), [example], 0.3)
    assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(margin).item(), rel=1e-5)
    assert stats["reward_margin"].item() == pytest.approx(margin.item(), rel=1e-5)


@pytest.mark.numeric
def test_token_wise_loss_equals_the_formula(world):
    """The loss begins at the first difference of the responses; the shorter one repeats its last score."""
    from saferlhf_fast.data.examples import PairExample
    from saferlhf_fast.models.score_model import score_model_from_backbone
    from saferlhf_fast.training.losses import reward_loss
    from saferlhf_fast.training.preference import pair_loss

    model = score_model_from_backbone(world["model"])
    a, b = [5, 6, 8, 9, 2], [5, 6, 8, 2]
    with torch.no_grad():
        sa, sb = (model(torch.tensor([ids]), torch.ones(1, len(ids)))[0] for ids in (a, b))
        loss, _ = pair_loss(model, [PairExample(a, b, 2, "")], "reward", 0.01, True)
    expected = reward_loss(sa[[3, 4]], sb[[3, 3]], regularization=0.01)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
