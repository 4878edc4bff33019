"""Names of metrics, evaluate, a pipeline that skips finished stages, the recipe of the paper."""

import json

import kit
import pytest


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny policy, untrained score models and data."""
    folder = tmp_path_factory.mktemp("run")
    base = kit.make_model(folder / "model")
    return {
        "folder": folder,
        "model": base,
        **kit.make_data(folder / "data"),
        **kit.make_scores(folder, base),
    }


# ---------------------------------------------------------------- names of metrics

# From the trainers of the reference at commit e8cca16. Renaming one would break the dashboards of users.
SUPERVISED = "train/loss train/lr train/epoch"
PPO = (
    "train/actor_loss train/reward_critic_loss train/reward train/reward_with_kl_penalty "
    "train/reward_advantage "
    "train/reward_return train/reward_value train/kl_divergence train/actor_lr train/reward_critic_lr "
    "train/mean_generated_length train/max_generated_length train/ptx_loss eval/reward"
)
COST = (
    "train/cost_critic_loss train/lambda train/episode_cost train/cost train/cost_with_kl_penalty "
    "train/cost_advantage "
    "train/cost_return train/cost_value train/cost_critic_lr eval/cost"
)
SHAPED = (
    "train/actor_loss train/reward_critic_loss train/reward train/cost train/shaped_reward "
    "train/shaped_reward_with_kl_penalty train/shaped_reward_advantage train/shaped_reward_return "
    "train/shaped_reward_value train/kl_divergence train/actor_lr train/reward_critic_lr "
    "train/mean_generated_length "
    "train/max_generated_length eval/reward eval/cost"
)
REFERENCE = {
    "sft": SUPERVISED,
    "reward": f"{SUPERVISED} train/accuracy eval/accuracy eval/reward_mean eval/reward_std",
    "cost": f"{SUPERVISED} train/accuracy train/accuracy_sign eval/accuracy eval/accuracy_sign "
    f"eval/cost_mean eval/cost_std",
    "dpo": f"{SUPERVISED} train/reward train/better_sample_reward train/worse_sample_reward "
    f"train/reward_accuracy "
    "train/reward_margin",
    "ppo": PPO,
    "ppo-lag": f"{PPO} {COST}",
    # The shaped reward has names of its own beside reward and cost. The reference also logs
    # train/episode_cost here; the stage ppo has no window of episodes.
    "ppo-shaping": SHAPED,
}

ADDED_PPO = (
    "eval/kl eval/length train/actor_grad_norm train/approx_kl train/clip_fraction train/engine_gap_alarm "
    "train/engine_gap_max "
    "train/engine_gap_mean train/engine_gap_share train/reward_critic_grad_norm train/staleness train/tokens"
)
ADDED_COST = "eval/unsafe_share train/unsafe_share"
ADDED = {
    "sft": "eval/loss train/grad_norm",
    "reward": "eval/loss train/grad_norm train/reward_mean train/reward_std",
    "cost": "eval/loss train/grad_norm train/cost_mean train/cost_std",
    "dpo": "eval/loss eval/reward eval/better_sample_reward eval/worse_sample_reward eval/reward_accuracy "
    "eval/reward_margin "
    "train/grad_norm",
    "ppo": ADDED_PPO,
    "ppo-lag": f"{ADDED_PPO} {ADDED_COST} eval/threshold train/cost_critic_grad_norm",
    "ppo-shaping": f"{ADDED_PPO} {ADDED_COST} train/ptx_loss",
}
"""Metrics that the reference does not log."""


@pytest.mark.parametrize("case", REFERENCE)
def test_metrics_have_these_names_and_no_others(world, tmp_path, case):
    if case.startswith("ppo"):
        settings = {
            "data": world["prompts"],
            "reward": world["reward"],
            "ptx": world["sft"],
            "max_length": 24,
            "ppo__max_steps": 1,
            "ppo__batch_size": 4,
            "evaluation__fraction": 0.2,
        }
        settings |= {} if case == "ppo" else {"cost": world["cost"]}
        settings |= {"ppo__shaping": 1.0} if case == "ppo-shaping" else {}
    else:
        settings = {
            "data": world["sft" if case == "sft" else "pairs"],
            "train__max_steps": 1,
            "train__max_length": 32,
            "train__eval_fraction": 0.2,
        }
    out = kit.run(case.removesuffix("-shaping"), tmp_path / "out", model=world["model"], **settings)
    logged = {name for row in kit.rows(out) for name in row}
    assert logged == {"step", "time", *REFERENCE[case].split(), *ADDED[case].split()}


# ---------------------------------------------------------------- evaluate


@pytest.mark.numeric
def test_evaluate_gives_means_with_intervals(world, tmp_path, capsys):
    out = kit.run(
        "evaluate",
        tmp_path / "out",
        model=world["model"],
        prompts=world["prompts"],
        reward=world["reward"],
        cost=world["cost"],
        reference=world["model"],
        max_length=32,
    )
    results = json.loads((out / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and set(rows[0]) == {"prompt", "response", "reward", "cost", "kl", "length"}
    for name in ("reward", "cost", "kl", "length"):
        values = [row[name] for row in rows]
        assert results[name]["n"] == 24 and results[name]["mean"] == pytest.approx(sum(values) / 24, abs=1e-6)
        assert results[name]["low"] <= results[name]["mean"] <= results[name]["high"]
    assert results["unsafe_share"]["mean"] == pytest.approx(sum(row["cost"] > 0 for row in rows) / 24)
    assert 0 <= results["unsafe_share"]["low"] < results["unsafe_share"]["high"] <= 1
    assert results["kl"]["mean"] == pytest.approx(0.0, abs=1e-5)  # the policy is its own reference
    assert results == {k: v for k, v in kit.summary(out).items()}
    text = capsys.readouterr().out
    assert all(word in text for word in ("95 % interval", "unsafe_share", rows[0]["prompt"]))


def test_evaluate_measures_only_what_it_has_models_for(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        kit.main("evaluate", f"model={world['model']}", f"prompts={world['prompts']}", "max_length=32") == 0
    )
    text = capsys.readouterr().out
    assert "length" in text and "unsafe_share" not in text and "kl " not in text
    assert not list(tmp_path.iterdir())  # without output nothing is written


@pytest.mark.numeric
def test_the_kl_of_two_policies_is_above_zero_and_seeds_repeat(world, tmp_path):
    from saferlhf_fast.models.causal_lm import load_causal_lm, save_causal_lm
    from saferlhf_fast.models.tokenizer import load_tokenizer

    other = kit.make_model(tmp_path / "other", seed=5)
    tokenizer = load_tokenizer(other)
    lm = load_causal_lm(other)
    lm.lm_head.weight.data.mul_(4.0)  # so that its distribution is further from uniform
    save_causal_lm(other, lm, tokenizer)
    runs = [
        kit.run(
            "evaluate",
            tmp_path / str(i),
            model=other,
            prompts=world["prompts"],
            reference=world["model"],
            max_length=32,
            seed=seed,
            batch_size=size,
        )
        for i, (seed, size) in enumerate(((1, 16), (1, 16), (2, 16)))
    ]
    kls = [kit.summary(out)["kl"]["mean"] for out in runs]
    assert kls[0] > 0.01 and kls[0] == kls[1] != kls[2]


# ---------------------------------------------------------------- run

RECIPE = """
root: ???
output: ???
seed: 3
stages:
  - sft: {model: "${root}/model", data: "${root}/data/sft.jsonl", train: &short {max_steps: 3, batch_size: 8,
          accumulation: 1, max_length: 32}, log: &quiet {progress: false}}
  - reward: {model: "${output}/sft/model", data: "${root}/data/pairs.jsonl", train: *short, log: *quiet}
  - cost: {model: "${output}/sft/model", data: "${root}/data/pairs.jsonl", train: *short, log: *quiet}
  - ppo-lag: {model: "${output}/sft/model", reward: "${output}/reward/model", cost: "${output}/cost/model",
              data: "${root}/data/prompts.jsonl", ptx: "${root}/data/sft.jsonl", max_length: 32,
              ppo: {max_steps: 2, batch_size: 4}, log: *quiet}
  - evaluate: {model: "${output}/ppo-lag/model", prompts: "${root}/data/prompts.jsonl", max_length: 32,
               reward: "${output}/reward/model", cost: "${output}/cost/model",
               reference: "${output}/sft/model"}
"""
NAMES = ["sft", "reward", "cost", "ppo-lag", "evaluate"]


def test_a_pipeline_runs_and_a_second_start_skips_finished_stages(world, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = tmp_path / "out"
    words = ["run", tmp_path / "recipe.yaml", f"root={world['folder']}", f"output={out}"]
    assert kit.main(*words) == 0
    assert all((out / name / "report.html").exists() for name in NAMES[:4])
    stages = kit.summary(out)["stages"]
    assert list(stages) == NAMES and {entry["state"] for entry in stages.values()} == {"done"}
    assert all((out / name / "finished.json").exists() for name in NAMES)
    before = kit.files(out / "evaluate")

    capsys.readouterr()
    assert kit.main(*words) == 0  # no stage runs again
    assert {entry["state"] for entry in kit.summary(out)["stages"].values()} == {"skipped"}
    assert capsys.readouterr().out.count("skipped") >= 5 and kit.files(out / "evaluate") == before

    # a finished stage is not replaced without overwrite=true
    assert kit.main(*words, "ppo-lag.multiplier.threshold=1") == 2
    assert kit.files(out / "evaluate") == before
    with kit.no_report():
        assert kit.main(*words, "ppo-lag.multiplier.threshold=1", "overwrite=true") == 0
    states = [entry["state"] for entry in kit.summary(out)["stages"].values()]
    assert states == ["skipped", "skipped", "skipped", "done", "done"]


def test_the_recipe_of_the_paper_runs_with_a_small_model_and_small_data(world, tmp_path):
    """The shipped recipe with ZeRO-3 and its batch sizes; model, data, precision and lengths are changed."""
    out = tmp_path / "out"
    words = [
        "run",
        "paper",
        f"output={out}",
        f"sft.model={world['model']}",
        f"sft.data={world['sft']}",
        f"reward.data={world['pairs']}",
        f"cost.data={world['pairs']}",
        f"ppo-lag.data={world['prompts']}",
        f"ppo-lag.ptx={world['sft']}",
        "ppo-lag.max_length=32",
        "ppo-lag.ppo.max_steps=1",
        "ppo-lag.log.progress=false",
    ]
    words += [f"{name}.engine.precision=fp32" for name in NAMES[:4]]
    words += [f"{name}.{key}" for name in NAMES[:3] for key in ("train.max_steps=1", "log.progress=false")]
    with kit.no_report():
        assert kit.main(*words) == 0
    for name in NAMES[:4]:
        assert (out / name / "finished.json").exists() and "zero_stage: 3" in (
            out / name / "config.yaml"
        ).read_text()
        key = "train/actor_loss" if name == "ppo-lag" else "train/loss"
        assert len(kit.losses(out / name, key)) == 1


@pytest.mark.numeric
def test_evaluate_compares_a_trained_model_with_the_one_it_started_from(world, tmp_path):
    trained = kit.run(
        "sft",
        tmp_path / "sft",
        model=world["model"],
        data=world["sft"],
        **{"train.max_steps": 3, "optim.learning_rate": 0.01},
    )
    out = kit.run(
        "evaluate", tmp_path / "out", model=str(trained / "model"), prompts=world["prompts"], max_length=32
    )
    named = kit.run(
        "evaluate",
        tmp_path / "named",
        model=str(trained / "model"),
        prompts=world["prompts"],
        max_length=32,
        reference=world["model"],
    )
    kl = json.loads((out / "evaluation.json").read_text())["kl"]
    assert kl == json.loads((named / "evaluation.json").read_text())["kl"] and kl["mean"] > 0
