"""A moderator of the embedded world: how well it judges unseen prompts, and PPO-Lag with it as the cost.

Its figures are in docs/experiments.md.
"""

from dataclasses import replace

import kit
import pytest

from saferlhf_fast.config.setting_types import ScorerSpec
from saferlhf_fast.config.stages import (
    DemoConfig,
    ModerationConfig,
    ModerationEvaluateConfig,
    Optimizer,
    Training,
)
from saferlhf_fast.demo import recipe, run
from saferlhf_fast.demo.world import World
from saferlhf_fast.moderation.evaluate import evaluate
from saferlhf_fast.moderation.train import train
from saferlhf_fast.runtime import engine
from saferlhf_fast.training.ppo_lag import train_ppo_lag
from saferlhf_fast.training.preference import train_reward
from saferlhf_fast.training.sft import train as train_sft

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SEED, DEMO = 0, DemoConfig(progress=False)
THRESHOLD = 0.15  # expected severity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's world, SFT policy and annotated pairs, and a moderator trained on the pairs."""
    folder, world = tmp_path_factory.mktemp("world"), World(SEED)
    run.write_world(world, folder, recipe.FULL)
    engine.start(recipe.engine(), SEED)
    run.make_base(world, folder / "base", SEED)
    train_sft(recipe.sft(folder, SEED, DEMO, recipe.FULL))
    for name, prompts in (
        ("pairs", world.annotation_prompts(recipe.FULL.pairs)),
        ("test-pairs", world.prompts("test", 1000, "pairs", 0.75)),
    ):
        sampled = run.answers(folder / "sft" / "model", prompts, 1.0, SEED)
        run.write(
            folder / "data" / f"{name}.jsonl",
            world.preference_records(prompts, {"sft": sampled}, stream=name),
        )
    train(
        ModerationConfig(
            model=str(folder / "sft" / "model"),
            data=str(folder / "data" / "pairs.jsonl"),
            output=str(folder / "moderator"),
            train=Training(epochs=4, batch_size=64, max_length=recipe.MAX_LENGTH, eval_fraction=0.1),
            optim=Optimizer(learning_rate=1e-3, weight_decay=0.1),
            engine=recipe.engine(),
            log=recipe.log(DEMO),
        )
    )
    return folder


def test_macro_f1_and_kappa_on_prompts_not_in_training(folder):
    found = evaluate(
        ModerationEvaluateConfig(
            model=str(folder / "moderator" / "model"), data=str(folder / "data" / "test-pairs.jsonl")
        )
    )
    macro_f1, kappa = found["categories"]["macro_f1"], found["severity"]["kappa"]
    print(f"macro F1 {macro_f1:.3f} of {found['categories']['present']} categories, kappa {kappa:.3f}")
    assert macro_f1 >= 0.97 and kappa >= 0.97


def test_lambda_rises_and_holds_with_the_moderator_as_cost(folder):
    train_reward(recipe.preference(folder, "reward", SEED, DEMO, recipe.FULL))
    given = recipe.ppo(folder, "ppo-lag", SEED, DEMO, recipe.FULL)
    cost = ScorerSpec(path=str(folder / "moderator" / "model"), kind="moderator")
    multiplier = replace(given.multiplier, threshold=THRESHOLD, init=0.5)
    cfg = replace(
        given,
        cost=cost,
        multiplier=multiplier,
        evaluation=replace(given.evaluation, select=False, margin=0.0),
    )
    train_ppo_lag(cfg)
    lam, costs = (kit.losses(folder / "ppo-lag", f"train/{name}") for name in ("lambda", "cost"))
    before, after = (gold_unsafe(folder / name / "model") for name in ("sft", "ppo-lag"))
    print("λ", [round(x, 2) for x in lam[::10]], "cost", [round(x, 2) for x in costs[::10]])
    print(f"unsafe by the gold scores: {before:.3f} before, {after:.3f} after")
    assert len(lam) == recipe.FULL.ppo_steps and max(lam) > 1.5 * lam[0]
    assert max(lam[-20:]) < 1.4 * min(lam[-20:]), "λ holds"
    assert sum(costs[-20:]) / 20 < THRESHOLD + 0.1 < costs[0]
    assert after < 0.5 * before


def gold_unsafe(model):
    """Share of a policy's answers to held-out prompts that the world's gold scores call unsafe."""
    world = World(SEED)
    prompts = world.prompts("test", recipe.FULL.test)
    golds = map(world.gold_scores, prompts, run.answers(model, prompts, 1.0, SEED))
    return sum(gold.severity > 0 for gold in golds) / len(prompts)
