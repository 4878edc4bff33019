"""Sampling ahead: a batch is one step stale, its loss is corrected, and it is scored during sampling."""

import json
from pathlib import Path

import kit
import pytest

pytestmark = pytest.mark.numeric

SETTINGS = {
    "max_length": 24,
    "ppo__batch_size": 4,
    "ppo__max_steps": 4,
    "optim__learning_rate": 2e-2,
    "optim__warmup_ratio": 0.0,
    "critic_optim__learning_rate": 1e-3,
    "ppo__overlap": True,
    "ppo__importance_cap": 2.0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap")
    base = kit.make_model(folder / "model")
    scores = kit.make_scores(folder, base)
    return {
        "model": base,
        "reward": scores["reward"],
        "cost": scores["cost"],
        "data": kit.make_data(folder / "data")["prompts"],
    }


def test_batches_are_one_step_stale(world, tmp_path):
    """Each batch is sampled with the weights of the step before the last, and the run logs that.

    The same prompts and seeds with those weights give responses of the logged length. From the second step on
    the log-probs differ from those of the trainer.
    """
    from saferlhf_fast.config.stages import PPO, Engine, PPOConfig, Sampling
    from saferlhf_fast.models.causal_lm import load_causal_lm
    from saferlhf_fast.models.policy import Policy
    from saferlhf_fast.models.tokenizer import load_tokenizer
    from saferlhf_fast.rollout import prefetch
    from saferlhf_fast.rollout.batch import end_tokens, generate
    from saferlhf_fast.rollout.engines import open_generator
    from saferlhf_fast.runtime import engine
    from saferlhf_fast.training.ppo.prompts import load_data, prompt_batches

    out = kit.run("ppo-lag", tmp_path / "run", save_interval=1, log__sample_interval=1, **world, **SETTINGS)
    assert kit.losses(out, "train/staleness") == [0, 1, 1, 1]
    gaps = kit.losses(out, "train/engine_gap_mean")
    assert gaps[0] < 1e-5 and all(gap > 1e-3 for gap in gaps[1:])
    # Over 5 seeds the largest distance of a weight from 1 was 0.04 to 0.10, that of the second 0.002 to 0.05.
    assert max(abs(weight - 1.0) for weight in kit.losses(out, "train/importance_weight")) > 1e-3

    cfg = PPOConfig(
        model=world["model"],
        reward=world["reward"],
        cost=world["cost"],
        data=world["data"],
        output="none",
        max_length=24,
        ppo=PPO(batch_size=4, max_steps=4),
    )
    engine.start(cfg.engine, cfg.seed)
    tokenizer = load_tokenizer(world["model"])
    prompts, *_ = load_data(cfg, tokenizer)
    lengths = kit.losses(out, "train/mean_generated_length")
    for step, batch in enumerate(prompt_batches(prompts, cfg, 4), 1):
        sampled = {}
        for name, weights in (("stale", step - 2), ("fresh", step - 1)):
            folder = out / f"step-{weights}" if weights > 0 else world["model"]
            lm = load_causal_lm(str(folder), tokenizer=tokenizer)
            sampling = Sampling()
            actor = engine.Frozen(Policy(lm), Engine())
            generator = open_generator(actor, tokenizer, end_tokens(tokenizer, lm, "auto"), sampling)
            responses = generate(generator, batch, sampling, 24, prefetch.step_seed(cfg, step))[1]
            sampled[name] = sum(len(r.ids) for r in responses) / 4, [r.ids for r in responses]
        assert lengths[step - 1] == pytest.approx(sampled["stale"][0])
        if step == 3:
            assert sampled["stale"][1] != sampled["fresh"][1]  # else the lengths could not tell the two apart
    assert json.loads((Path(out) / "summary.json").read_text())["steps"] == 4


def test_scoring_in_portions_during_sampling_changes_no_number(world, tmp_path, monkeypatch):
    """Frozen models score each portion in the sampling thread; the metrics equal those of one portion."""
    import threading

    from saferlhf_fast.rollout import scoring

    calls = []
    frozen_scores = scoring.frozen_scores

    def recorded(rollout, *arguments):
        calls.append((threading.current_thread().name, len(rollout)))
        return frozen_scores(rollout, *arguments)

    monkeypatch.setattr("saferlhf_fast.rollout.prefetch.frozen_scores", recorded)
    runs = [
        kit.run("ppo-lag", tmp_path / str(size), sampling__batch_size=size, **world, **SETTINGS)
        for size in (1, 4)
    ]
    assert [count for _, count in calls] == [1] * 16 + [4] * 4 and all("rollout" in name for name, _ in calls)
    for name in ("reward", "cost", "actor_loss", "kl_divergence", "cost_critic_loss"):
        a, b = (kit.losses(run, f"train/{name}") for run in runs)
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4), name


def test_old_log_probs_of_the_engine_correct_stale_batches(world, tmp_path):
    """With old_logp=engine the ratio itself corrects, so from the second step on it is not 1."""
    out = kit.run(
        "ppo-lag",
        tmp_path / "run",
        **world,
        **{**SETTINGS, "ppo__importance_cap": "null", "ppo__old_logp": "engine"},
    )
    kl = kit.losses(out, "train/approx_kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and all(value > 1e-5 for value in kl[1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ppo.importance_cap": "null"},
            "ppo.overlap: needs ppo.importance_cap (2.0 is common) or ppo.old_logp=engine",
        ),
        (
            {"engine.zero_stage": 3},
            "ppo.overlap: expected engine.zero_stage 0, 1 or 2 and separate models, got 3",
        ),
        ({"engine.frozen": "sharded"}, "ppo.overlap: expected engine.frozen auto or replicated, got sharded"),
        ({"lora.rank": 4}, "got one shared base (lora.rank)"),
    ],
)
def test_settings_that_exclude_overlap_are_refused(world, tmp_path, capsys, settings, message):
    given = {**{key.replace("__", "."): value for key, value in SETTINGS.items()}, **settings}
    code = kit.main(
        "ppo-lag",
        f"output={tmp_path / 'no'}",
        *(f"{key}={value}" for key, value in {**world, **given}.items()),
    )
    assert code != 0 and message in capsys.readouterr().err


def test_a_failure_in_the_thread_ends_the_run(world, tmp_path, monkeypatch, capsys):
    """The error is raised in the step that waits for the batch, and no thread remains."""
    import threading

    monkeypatch.setattr("saferlhf_fast.rollout.prefetch.frozen_scores", lambda *arguments: 1 / 0)
    code = kit.main(
        "ppo-lag",
        f"output={tmp_path / 'no'}",
        *(f"{key.replace('__', '.')}={value}" for key, value in {**world, **SETTINGS}.items()),
    )
    assert code != 0 and "ZeroDivisionError" in capsys.readouterr().err
    assert not [t for t in threading.enumerate() if t.name.startswith("rollout")]
