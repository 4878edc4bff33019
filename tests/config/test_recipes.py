"""The shipped recipes load, are valid and have the settings of the paper's table."""

import shutil
from pathlib import Path

import pytest
import yaml

from saferlhf_fast.commands import run
from saferlhf_fast.config import load
from saferlhf_fast.config.stages import Source

RECIPES = sorted((Path(run.__file__).parents[1] / "recipes").glob("*.yaml"))
STAND_INS = {"pku_tiny": ("root",), "pku_small": ("root", "models"), "multi-node": ("output",)}
PRETRAINED = "pku_small"  # it starts from a chat model: no SFT, and an encoder as cost model
MODERATOR = "moderation"  # one stage


@pytest.fixture
def root(tmp_path):
    """A folder with every file that pku_tiny names, with the least content that passes the checks."""
    model = tmp_path / "models" / "stories260k"
    model.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    for name in ("SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"):
        shutil.copytree(model, tmp_path / name)
    texts = [(RECIPES[0].parent / f"{name}.yaml").read_text() for name in ("pku_tiny", "pku_small")]
    for word in " ".join(texts).split():
        if word.startswith("${root}/data"):
            path = tmp_path / word.removeprefix("${root}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("[{}]")
    return tmp_path


def plan(name, root, **overrides):
    given = {"root": str(root), "models": str(root), "output": str(root / "out")}
    return run.plan(name, {**{k: given[k] for k in STAND_INS.get(name, ())}, **overrides})


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p.stem not in (PRETRAINED, MODERATOR)], ids=lambda p: p.stem
)
def test_every_recipe_has_all_stages_in_order(path, root):
    _, steps = plan(path.stem, root)
    assert [s.kind for s in steps][:4] == ["sft", "reward", "cost", "ppo-lag"]
    sft, reward, cost, ppo = (s.cfg for s in steps[:4])
    assert reward.model == cost.model == ppo.model == f"{sft.output}/model"
    assert (ppo.reward, ppo.cost) == (f"{reward.output}/model", f"{cost.output}/model")
    for step in steps[4:]:
        assert step.kind == "evaluate" and step.cfg.reference == ppo.model
    assert path.read_text().startswith("# "), "a recipe begins with a comment on its purpose and its command"


def test_the_recipe_of_pretrained_models_evaluates_before_and_after_on_the_same_unseen_prompts(root):
    _, steps = plan(PRETRAINED, root)
    assert [s.kind for s in steps] == ["reward", "cost", "evaluate", "ppo-lag", "evaluate"]
    reward, cost, before, ppo, after = (s.cfg for s in steps)
    assert reward.model == ppo.model == before.model == after.reference and cost.model != reward.model
    for evaluation in (before, after):
        scorers = (evaluation.reward, evaluation.cost)
        assert scorers == (ppo.reward, ppo.cost) == (f"{reward.output}/model", f"{cost.output}/model")
    assert before.prompts == after.prompts and after.model == f"{ppo.output}/model"
    trained = {source.path for cfg in (reward, cost, ppo) for source in sources(cfg.data)}
    assert trained.isdisjoint(source.path for source in sources(before.prompts))


def test_the_recipe_of_the_moderator_names_the_hub_sets_and_measures_on_their_test_splits(root):
    _, steps = plan(MODERATOR, root)
    assert [s.kind for s in steps] == ["moderation"]
    cfg = steps[0].cfg
    trained, measured = sources(cfg.data), sources(cfg.train.eval_data)
    assert [s.path for s in trained] == [s.path for s in measured]
    assert {s.path for s in trained} == {"PKU-Alignment/PKU-SafeRLHF-QA", "PKU-Alignment/BeaverTails"}
    assert [s.split.replace("train", "test") for s in trained] == [s.split for s in measured]


def sources(data):
    """The sources of a setting that names data, each as a Source."""
    listed = data if isinstance(data, list) else [data]
    return [Source(path=source) if isinstance(source, str) else source for source in listed]


def test_the_recipes_that_the_readme_names_exist():
    named = {"paper", "pku_tiny", "pku_small", "quickstart", "single-gpu", "multi-node", "moderation"}
    assert named <= {p.stem for p in RECIPES}


def test_pku_tiny_needs_a_root():
    with pytest.raises(ValueError, match="pku_tiny: missing: root"):
        run.plan("pku_tiny", {})


def test_pku_tiny_splits_by_prompt_and_compares_with_a_baseline(root):
    _, steps = plan("pku_tiny", root)
    by_name = {s.name: s.cfg for s in steps}
    for name in ("reward", "cost"):
        assert by_name[name].baseline and by_name[name].train.eval_fraction == 0.1
    assert max(cfg.train.max_length for n, cfg in by_name.items() if n in ("sft", "reward", "cost")) <= 512
    assert by_name["ppo-lag"].ptx is not None


@pytest.mark.parametrize("name, gpus", [("paper", 8), ("multi-node", 16)])
def test_global_batches_equal_those_of_the_paper(name, gpus, root):
    _, steps = plan(name, root)
    sft, reward, cost, ppo = (s.cfg for s in steps)
    assert sft.train.batch_size * sft.train.accumulation * gpus == 256
    for cfg in (reward, cost):
        assert cfg.train.batch_size * cfg.train.accumulation * gpus == 128
    assert ppo.ppo.batch_size * gpus == 128 and ppo.multiplier.window == 1024


@pytest.mark.parametrize("name", ["paper", "multi-node"])
def test_settings_equal_the_table_of_the_paper(name, root):
    """The settings of the paper's reference implementation, line by line."""
    _, steps = plan(name, root)
    sft, reward, cost, ppo = (s.cfg for s in steps)
    assert (sft.train.epochs, reward.train.epochs, cost.train.epochs, ppo.ppo.prompt_epochs) == (3, 2, 2, 1)
    for cfg in (sft, reward, cost):
        o = cfg.optim
        assert (o.learning_rate, o.schedule, o.warmup_ratio, o.betas, o.max_grad_norm) == (
            2e-5,
            "cosine",
            0.03,
            (0.9, 0.95),
            1.0,
        )
        assert cfg.train.max_length == 512
    assert (sft.optim.weight_decay, reward.optim.weight_decay, cost.optim.weight_decay) == (0, 0.1, 0.1)
    assert reward.regularization == cost.regularization == 0.001 and reward.loss == cost.loss == "sequence"
    a, c = ppo.optim, ppo.critic_optim
    assert (a.learning_rate, a.schedule, a.warmup_ratio, a.weight_decay) == (1e-5, "cosine", 0.03, 0.01)
    assert (c.learning_rate, c.schedule, c.weight_decay, c.max_grad_norm) == (5e-6, "constant", 0, 1)
    assert a.betas == c.betas == (0.9, 0.95)
    p = ppo.ppo
    assert (p.kl_coeff, p.gamma, p.lam, p.clip_ratio, p.clip_score, p.clip_value, p.ptx_coeff, p.epochs) == (
        0.01,
        1,
        0.95,
        0.2,
        50,
        5,
        16,
        1,
    )
    assert not p.whiten and ppo.sampling.temperature == 1 and ppo.max_length == 512
    m = ppo.multiplier
    assert (m.rule, m.init, m.lr, m.max, m.threshold, m.delay) == ("exponential", 1, 0.1, 5, 0, 0)
    assert m.threshold_quantile is None
    for cfg in (sft, reward, cost, ppo):
        assert (cfg.engine.zero_stage, cfg.engine.precision, cfg.template) == (3, "bf16", "safe-rlhf")


def test_the_recipe_paper_accepts_another_model_and_other_data(root):
    """So the recipe can be tried on one CPU: with these settings it names nothing on the Hub."""
    data = str(root / "data.json")
    (root / "data.json").write_text("[{}]")
    stand_ins = {
        "sft.model": str(root / "models" / "stories260k"),
        "ppo-lag.ptx": data,
        "output": str(root / "out"),
    }
    stand_ins |= {f"{stage}.data": data for stage in ("sft", "reward", "cost", "ppo-lag")}
    _, steps = run.plan("paper", stand_ins)
    for step in steps:
        used = yaml.safe_dump(load.to_dict(step.cfg))
        assert "tatsu-lab" not in used and "PKU-Alignment" not in used and "huggyllama" not in used
