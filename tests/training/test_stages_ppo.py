"""The PPO stages on tiny data: metrics of a step, λ, thresholds, scorers with another tokenizer, stopping."""

import json
import shutil
from pathlib import Path

import kit
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.numeric

BASE = {
    "max_length": 24,
    "ppo__batch_size": 4,
    "ppo__max_steps": 3,
    "optim__learning_rate": 1e-3,
    "critic_optim__learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny policy, untrained score models and data."""
    folder = tmp_path_factory.mktemp("ppo")
    base = kit.make_model(folder / "model")
    return {
        "folder": folder,
        "model": base,
        **kit.make_data(folder / "data", n=12),
        **kit.make_scores(folder, base),
    }


@pytest.fixture
def go(world, tmp_path):
    """A function that runs ppo-lag (or ppo) with some settings and returns the folder."""
    numbers = iter(range(99))

    def run(stage="ppo-lag", **settings):
        given = {**BASE, "model": world["model"], "data": world["prompts"], "reward": world["reward"]}
        given |= {"cost": world["cost"]} if stage == "ppo-lag" else {}
        return kit.run(stage, tmp_path / f"run{next(numbers)}", **{**given, **settings})

    return run


def assert_close(a, b, tolerance=1e-4):
    """Asserts that two runs have logged the same numbers, apart from their times."""
    rows = [[{k: v for k, v in row.items() if k != "time"} for row in kit.rows(folder)] for folder in (a, b)]
    assert [sorted(row) for row in rows[0]] == [sorted(row) for row in rows[1]]
    for x, y in zip(*rows):
        for name in x:
            assert x[name] == pytest.approx(y[name], rel=tolerance, abs=tolerance), (x["step"], name)


def test_runs_with_one_seed_are_equal_and_another_seed_gives_another_run(go):
    a, b, c = go(), go(), go(seed=7)
    assert_close(a, b, 0)
    assert kit.losses(a) == [] and kit.losses(a, "train/actor_loss") != kit.losses(c, "train/actor_loss")


def test_the_long_form_of_one_constraint_equals_the_short_form(go, world):
    """The metrics are equal bit for bit and have the same names, whatever the name of the constraint is."""
    settings = {"rule": "pid", "threshold": -0.1, "init": 0.5}
    selecting = {"evaluation__select": True, "evaluation__fraction": 0.2}
    short = go(**selecting, **{f"multiplier__{key}": value for key, value in settings.items()})
    constraint = {
        "name": "privacy",
        "cost": {"kind": "score_model", "path": world["cost"]},
        "multiplier": settings,
    }
    long = go(**selecting, cost="null", constraints=json.dumps([constraint]))
    assert_close(short, long, 0)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (short, long)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    summaries = [
        {key: value for key, value in kit.summary(folder).items() if key != "data"}
        for folder in (short, long)
    ]
    assert summaries[0] == summaries[1] and summaries[0]["threshold"] == -0.1


@pytest.mark.parametrize(
    "changes", [{}, {"ppo__epochs": 2, "ppo__whiten": True}, {"ppo__reduction": "token-mean"}]
)
def test_micro_batches_change_no_number(go, changes):
    one_batch = go(ppo__micro_batch_size=4, **changes)
    for size in (1, 2):
        assert_close(one_batch, go(ppo__micro_batch_size=size, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ppo__reduction": "token-mean", "ppo__micro_tokens": 30},
        {"engine__packing": False},
        {"ppo__single_pass": False, "engine__packing": False},
    ],
)
def test_one_pass_equals_two_and_packed_equals_padded(go, world, capsys, changes):
    """A scoring pass of its own and padded rows change no metric."""
    common = {"ptx": world["sft"], "ppo__reduction": changes.get("ppo__reduction", "sequence-mean")}
    one, two = go(**{**common, **changes}), go(**common, ppo__single_pass=False)
    out = capsys.readouterr().out
    assert ("share their forward passes" in out) is changes.get("ppo__single_pass", True)
    assert "a pass of their own" in out
    assert_close(one, two)


def test_several_steps_per_batch_score_in_a_pass_of_its_own(go, capsys):
    """Epochs, minibatches and whitening switch the single pass off; each minibatch is a step of its own."""
    for changes in ({"ppo__epochs": 2}, {"ppo__minibatches": 2}, {"ppo__whiten": True}):
        capsys.readouterr()
        go(**changes)
        assert "a pass of their own" in capsys.readouterr().out
    halves, one_step = go(ppo__minibatches=2, optim__schedule="linear"), go(optim__schedule="linear")
    assert kit.losses(halves, "train/approx_kl")[0] > 1e-6 > abs(kit.losses(one_step, "train/approx_kl")[0])
    assert kit.losses(halves, "train/actor_lr")[-1] == pytest.approx(1e-3 / 5)


def test_log_probs_of_the_engine_are_compared_and_can_serve_as_the_old_ones(go):
    """`generate` samples with the weights of the trainer, so its log-probs differ only in the last bits.

    As old log-probs, or with importance weights of 1, they change no loss beyond that.
    """
    plain = go()
    assert all(gap < 1e-4 for gap in kit.losses(plain, "train/engine_gap_max"))
    assert (
        kit.losses(plain, "train/engine_gap_share") == [0.0] * 3
        and len(kit.losses(plain, "train/engine_gap_mean")) == 3
    )
    for changes in (
        {"ppo__old_logp": "engine"},
        {"ppo__old_logp": "engine", "ppo__epochs": 2},
        {"ppo__importance_cap": 2.0},
    ):
        other = go(**changes)
        if "ppo__epochs" not in changes:
            assert kit.losses(other, "train/actor_loss") == pytest.approx(
                kit.losses(plain, "train/actor_loss"), rel=1e-3, abs=1e-5
            )
        assert ("train/engine_gap_mean" in kit.rows(other)[1]) is (changes.get("ppo__old_logp") is None)
    assert kit.losses(other, "train/importance_weight") == pytest.approx([1.0] * 3, abs=1e-4)


def test_importance_weights_are_truncated():
    """The advantage is multiplied by π_trainer/π_engine, at most the cap; dummy sequences count nowhere."""
    from types import SimpleNamespace

    from saferlhf_fast.config.stages import PPO
    from saferlhf_fast.training.ppo.update import OptimizerStep, StepMetrics

    cfg, step_metrics = SimpleNamespace(ppo=PPO(importance_cap=2.0)), StepMetrics()
    ratio = torch.tensor([0.5, 1.0, 1.005, 4.0])
    engine_logp = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    advantages = torch.tensor([1.0, -1.0, 2.0, 3.0])
    step = OptimizerStep(None, None, None, cfg, SimpleNamespace(tokens=4), step_metrics, False)
    weighted = step.weighted(advantages, engine_logp + ratio.log(), engine_logp)
    torch.testing.assert_close(weighted, advantages * ratio.clamp(max=2.0))
    assert step_metrics.sums["engine_gap_share"].item() == pytest.approx(0.5)
    assert step_metrics.sums["engine_gap_mean"].item() == pytest.approx(
        ratio.log().abs().mean().item(), rel=1e-5
    )
    assert step_metrics.maxima["engine_gap_max"].item() == pytest.approx(
        ratio.log().abs().max().item(), rel=1e-5
    )
    assert torch.equal(step.weighted(advantages, engine_logp, None), advantages)


def test_the_step_reads_the_device_twice(go, monkeypatch):
    """One read checks that all numbers are finite, the second one reads the metrics.

    Reads of DeepSpeed and checks that exist only for CPU tensors are not counted.
    """
    import traceback

    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        real = getattr(torch.Tensor, name)

        def recorded(self, *args, real=real, name=name):
            frames = [f for f in traceback.extract_stack() if "saferlhf_fast" in f.filename]
            in_the_step = [
                f
                for f in frames
                if f.name
                in ("score_rollout", "update_in_one_pass", "averages", "update", "old_logprobs_and_values")
            ]
            caller = traceback.extract_stack()[-2]
            if (
                in_the_step
                and "saferlhf_fast" in caller.filename
                and caller.name not in ("known_ids", "check_offsets")
            ):
                reads.append((caller.name, name))
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, recorded)
    go(ppo__max_steps=1)
    assert reads == [("not_finite", "tolist"), ("_read", "tolist")], reads
    reads.clear()
    go(ppo__max_steps=1, ppo__single_pass=False)
    assert reads == [("not_finite", "tolist"), ("_read", "tolist")], reads


def test_ptx_keeps_the_policy_near_its_data(go, world):
    """With a large weight the supervised loss falls, and at the end it is below that of a small weight."""
    last_losses = []
    for weight in (0.01, 64):
        out = go(ptx=world["sft"], ppo__ptx_coeff=weight, ppo__max_steps=6, ppo__prompt_epochs=2)
        loss = kit.losses(out, "train/ptx_loss")
        assert len(loss) == 6
        last_losses.append(loss[-1])
    assert last_losses[1] < min(last_losses[0], loss[0])  # by 0.07 to 0.13 over 5 seeds
    assert not kit.losses(go(ptx=world["sft"], ppo__ptx_coeff=0), "train/ptx_loss")


def test_reward_shaping_equals_ppo_on_the_difference(go, world, tmp_path):
    """R − 2·C from two models equals the score of one model whose head is the difference of their heads."""
    from safetensors.torch import save_file

    heads = [load_file(Path(world[kind]) / "model.safetensors") for kind in ("reward", "cost")]
    difference = {**heads[0], "score.weight": heads[0]["score.weight"] - 2.0 * heads[1]["score.weight"]}
    shutil.copytree(world["reward"], tmp_path / "difference")
    save_file(difference, tmp_path / "difference" / "model.safetensors", metadata={"format": "pt"})
    shaped = go("ppo", cost=world["cost"], ppo__shaping=2.0)
    plain = go("ppo", reward=tmp_path / "difference", reward_critic=world["reward"])
    for name in (
        "actor_loss",
        "reward_critic_loss",
        "kl_divergence",
        "actor_grad_norm",
        "reward_critic_grad_norm",
    ):
        assert kit.losses(shaped, f"train/{name}") == pytest.approx(
            kit.losses(plain, f"train/{name}"), rel=1e-4, abs=1e-6
        )
    unshaped = go("ppo", cost=world["cost"])
    assert kit.losses(unshaped, "train/actor_loss") != pytest.approx(
        kit.losses(shaped, "train/actor_loss"), rel=1e-3
    )


def test_ppo_equals_ppo_lag_with_a_multiplier_of_zero(go):
    """Only the pid rule allows λ = 0; the actor then uses the advantage of the reward alone."""
    lag = go(multiplier__rule="pid", multiplier__init=0, multiplier__kp=0, multiplier__ki=0, multiplier__kd=0)
    ppo = go("ppo")
    for name in ("train/actor_loss", "train/reward", "train/reward_critic_loss"):
        assert kit.losses(lag, name) == pytest.approx(kit.losses(ppo, name), rel=1e-5, abs=1e-6)


def test_the_first_loss_of_a_whitened_token_mean_is_zero(go):
    """Before the first update the ratio is 1: the loss is minus the mean advantage, 0 after whitening."""
    out = go(ppo__whiten=True, ppo__reduction="token-mean", ppo__max_steps=1)
    assert kit.losses(out, "train/actor_loss") == pytest.approx([0.0], abs=1e-6)
    assert abs(kit.losses(go(ppo__max_steps=1), "train/actor_loss")[0]) > 1e-3


def test_a_second_epoch_trains_on_each_batch_again(go):
    """In the second epoch the policy differs from that of the rollout; the schedule counts every update."""
    one, two = go(optim__schedule="linear"), go(ppo__epochs=2, optim__schedule="linear")
    assert kit.losses(one, "train/approx_kl") == pytest.approx([0.0] * 3, abs=1e-6)
    assert all(kl > 1e-6 for kl in kit.losses(two, "train/approx_kl"))
    assert kit.losses(one, "train/actor_lr")[-1] == pytest.approx(1e-3 / 2) and kit.losses(
        two, "train/actor_lr"
    )[-1] == pytest.approx(1e-3 / 5)


# ---------------------------------------------------------------- λ


def test_lambda_follows_the_reference_rule(go):
    out = go(
        multiplier__lr=0.5,
        multiplier__threshold=-0.2,
        multiplier__delay=1,
        ppo__max_steps=4,
        multiplier__window=6,
    )
    costs, windows = kit.losses(out, "train/cost"), kit.losses(out, "train/episode_cost")
    value = torch.tensor(1.0)
    for step, (logged, mean_cost) in enumerate(zip(kit.losses(out, "train/lambda"), windows)):
        if step >= 1:
            value = (value.log() + 0.5 * value * (mean_cost + 0.2)).exp().clamp(max=5.0)
        assert logged == pytest.approx(value.item(), rel=1e-5)
    # the window of 6 episodes has 4 of the second step and 2 of the first
    assert windows[0] == pytest.approx(costs[0]) and windows[1] != pytest.approx(costs[1])
    assert kit.summary(out)["multiplier"] == pytest.approx(value.item(), rel=1e-5)


def test_lambda_follows_the_pid_rule(go):
    out = go(
        multiplier__rule="pid",
        multiplier__kp=0.5,
        multiplier__ki=0.2,
        multiplier__kd=0.1,
        multiplier__init=0.3,
        multiplier__threshold=-1,
        ppo__max_steps=4,
    )
    integral, last = 0.3, None
    for logged, mean_cost in zip(kit.losses(out, "train/lambda"), kit.losses(out, "train/episode_cost")):
        error = mean_cost + 1
        integral = min(5.0, max(0.0, integral + 0.2 * error))
        value = 0.5 * error + integral + (0.1 * max(0.0, error - last) if last is not None else 0.0)
        assert logged == pytest.approx(min(5.0, max(0.0, value)), rel=1e-5)
        last = error


def test_a_threshold_by_quantile_is_of_the_starting_policy_s_costs(go, capsys):
    out = go(multiplier__threshold_quantile=0.25, ppo__max_steps=1)
    costs = torch.tensor([row["cost"] for row in json.loads((out / "evaluation_before.json").read_text())])
    assert kit.summary(out)["threshold"] == pytest.approx(torch.quantile(costs, 0.25).item())
    assert "costs of the starting policy: mean" in capsys.readouterr().out


def test_the_best_feasible_evaluation_is_kept(go):
    """The saved actor is the evaluated one: new samples of it get the same reward."""
    out = go(
        evaluation__select=True,
        evaluation__interval=1,
        evaluation__fraction=0.3,
        multiplier__threshold=100,
        ppo__max_steps=5,
        optim__learning_rate=1e-2,
    )
    summary, rewards = kit.summary(out), kit.losses(out, "eval/reward")[1:]
    assert summary["after"]["reward"] == max(rewards) and rewards[summary["kept_step"] - 1] == max(rewards)
    second_run = go(
        model=out / "model", evaluation__fraction=0.3, ppo__max_steps=1, reward_critic=out / "model"
    )
    assert kit.losses(second_run, "eval/reward")[0] == pytest.approx(max(rewards), rel=1e-5)


def test_the_actor_is_saved_every_n_steps(go):
    out = go(save_interval=1)
    assert sorted(p.name for p in out.glob("step-*")) == ["step-1", "step-2"] and (out / "model").is_dir()


# ---------------------------------------------------------------- scorers with another tokenizer


def permuted(folder, base, score):
    """Writes the model `score` with a permuted vocabulary, under which texts keep their scores."""
    from saferlhf_fast.models.score_checkpoint import save_score_model
    from saferlhf_fast.models.score_model import load_score_model
    from saferlhf_fast.models.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(base), load_score_model(score)
    other = kit.make_tokenizer(extra=("more",))
    raw = json.loads(other.backend_tokenizer.to_str())
    vocab = tokenizer.get_vocab()
    reversed_ids = {word: len(vocab) - 1 - i for word, i in vocab.items()}
    raw["model"]["vocab"] = reversed_ids
    for token in raw["added_tokens"]:
        token["id"] = reversed_ids[token["content"]]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    embedding = model.backbone.get_input_embeddings().weight
    with torch.no_grad():
        embedding.copy_(embedding.flip(0))
    save_score_model(folder, model, other, kind="reward")
    return str(folder)


def test_a_scorer_with_another_tokenizer_reads_the_text(world, tmp_path, go, capsys):
    """A model with permuted ids gives the same scores; its critic starts from the policy."""
    from saferlhf_fast.config.sections import SCORER_KINDS, ScorerSpec
    from saferlhf_fast.config.stages import PPOConfig
    from saferlhf_fast.data.examples import PromptExample
    from saferlhf_fast.data.templates import Template
    from saferlhf_fast.models.tokenizer import load_tokenizer
    from saferlhf_fast.rollout.batch import assemble
    from saferlhf_fast.rollout.scorers import KINDS, load_scorer

    assert tuple(KINDS) == SCORER_KINDS
    from saferlhf_fast.rollout.types import Response
    from saferlhf_fast.runtime import engine

    other = permuted(tmp_path / "permuted", world["model"], world["reward"])
    cfg = PPOConfig(model=world["model"], reward=other, data="none", output="none", max_length=32)
    engine.start(cfg.engine, 0)
    tokenizer = load_tokenizer(world["model"])
    template = Template(tokenizer, "auto")
    prompts = []
    for text in ("what is red", "stop the day of blue"):
        messages = ({"role": "user", "content": text},)
        prompts.append(PromptExample(template.encode_prompts([messages])[0], text, messages))
    # the second response has no end token
    responses = [tokenizer("yes red </s>")["input_ids"], tokenizer("no")["input_ids"]]
    rollout = assemble(
        prompts, [Response(ids, None, ended) for ids, ended in zip(responses, (True, False))], tokenizer, 99
    )
    assert sorted(rollout.texts) == ["no", "yes red"]
    scorers = [load_scorer(ScorerSpec(path=path), tokenizer, cfg)[0] for path in (world["reward"], other)]
    assert [scorer.retokenizes for scorer in scorers] == [False, True]
    a, b = (scorer(rollout, slice(0, 2)) for scorer in scorers)
    assert a.tolist() == pytest.approx(b.tolist(), abs=1e-5) and abs(a[0] - a[1]) > 1e-4

    capsys.readouterr()
    out = go(reward=other, ppo__max_steps=1)
    assert f"so the critic starts from {world['model']} with a new head" in capsys.readouterr().out
    assert kit.losses(out, "train/reward_critic_loss")


def test_evaluation_on_training_prompts_is_reported(go, capsys):
    """The same warning in the report is tested by test_report.py."""
    go(ppo__max_steps=1)
    out = " ".join(capsys.readouterr().out.split())
    assert "the first 12 training prompts; evaluation.fraction or evaluation.data" in out
    go(ppo__max_steps=1, evaluation__fraction=0.3)
    assert "training prompts" not in capsys.readouterr().out


# ---------------------------------------------------------------- stopping, also if padding is the end token


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_stopping_at_the_end_token_is_learned(tmp_path, pad_is_eos):
    """After SFT on one answer, greedy generation of transformers and the sampling of PPO stop after it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from saferlhf_fast.config.stages import Engine, Sampling
    from saferlhf_fast.data.examples import prompt_examples
    from saferlhf_fast.models.causal_lm import load_causal_lm
    from saferlhf_fast.models.policy import Policy
    from saferlhf_fast.models.tokenizer import load_tokenizer
    from saferlhf_fast.rollout.batch import end_tokens, generate
    from saferlhf_fast.rollout.engines import open_generator
    from saferlhf_fast.runtime import engine

    base = kit.make_model(tmp_path / "model", pad_is_eos=pad_is_eos)
    questions = [f"what is {word}" for word in ("one", "two", "three", "red of the day and night")]
    data = kit.write_rows(
        tmp_path / "sft.jsonl", [{"prompt": q, "completion": "yes stop"} for q in questions]
    )
    out = kit.run(
        "sft",
        tmp_path / "sft",
        model=base,
        data=data,
        train__epochs=30,
        train__batch_size=4,
        train__accumulation=1,
        train__max_length=32,
        optim__learning_rate=1e-2,
    )
    model, tokenizer = (cls.from_pretrained(out / "model") for cls in (AutoModelForCausalLM, AutoTokenizer))
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) is pad_is_eos
    ids = tokenizer("BEGINNING OF CONVERSATION: USER: what is two ASSISTANT:", return_tensors="pt")[
        "input_ids"
    ]
    answer = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "yes stop </s>"

    engine.start(Engine(), 0)
    tokenizer = load_tokenizer(out / "model")
    lm = load_causal_lm(out / "model", tokenizer=tokenizer)
    prompts, _ = prompt_examples(data, tokenizer, "auto", 20)
    sampling = Sampling(temperature=0.05)
    generator = open_generator(
        engine.Frozen(Policy(lm), Engine()), tokenizer, end_tokens(tokenizer, lm, "auto"), sampling
    )
    rows, responses = generate(generator, prompts, sampling, 32)
    assert rows == prompts and all(r.ended for r in responses)
    assert [r.ids for r in responses] == [tokenizer("yes stop </s>")["input_ids"]] * 4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_end_tokens_as_padding_of_a_prompt_change_no_log_prob(tmp_path, architecture):
    """Prompts that are padded on the left with the end token get the log-probs of a single sequence.

    GPT-2 has absolute positions, which must be counted from the first token of each row.
    """
    from saferlhf_fast.config.stages import Engine, Sampling
    from saferlhf_fast.data.examples import prompt_examples
    from saferlhf_fast.models.causal_lm import load_causal_lm
    from saferlhf_fast.models.policy import Policy
    from saferlhf_fast.models.tokenizer import load_tokenizer
    from saferlhf_fast.rollout.batch import assemble, end_tokens, generate
    from saferlhf_fast.rollout.engines import open_generator
    from saferlhf_fast.runtime import engine

    base = kit.make_model(tmp_path / "model", pad_is_eos=True, architecture=architecture)
    data = kit.write_rows(
        tmp_path / "p.jsonl", [{"prompt": "what"}, {"prompt": "what is the number of the day"}]
    )
    engine.start(Engine(), 0)
    tokenizer = load_tokenizer(base)
    lm = load_causal_lm(base, tokenizer=tokenizer)
    prompts, _ = prompt_examples(data, tokenizer, "auto", 20)
    actor = engine.Frozen(Policy(lm), Engine())
    sampling = Sampling(max_new_tokens=6)
    generator = open_generator(actor, tokenizer, end_tokens(tokenizer, lm, "auto"), sampling)
    rollout = assemble(*generate(generator, prompts, sampling, 32), tokenizer, 99)
    logps = actor(rollout.packed(slice(0, 2))).split(rollout.lengths)
    for i, (logp, ids, count) in enumerate(zip(logps, rollout.sequences, rollout.lengths)):
        ids = torch.tensor(ids)
        expected = lm(ids[None, :-1]).logits[0].log_softmax(-1)[-count:].gather(1, ids[-count:, None])[:, 0]
        torch.testing.assert_close(logp, expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            rollout.engine_logp_N[rollout.tokens(slice(i, i + 1))], expected.detach(), rtol=1e-4, atol=1e-5
        )


def test_the_model_s_own_generation_settings_change_no_sample(tmp_path):
    """Chat models come with a repetition penalty, min_p and more; sampling ignores them, as scoring does."""
    from saferlhf_fast.config.stages import Engine, Sampling
    from saferlhf_fast.data.examples import prompt_examples
    from saferlhf_fast.models.causal_lm import load_causal_lm
    from saferlhf_fast.models.policy import Policy
    from saferlhf_fast.models.tokenizer import load_tokenizer
    from saferlhf_fast.rollout.batch import end_tokens, generate
    from saferlhf_fast.rollout.engines import open_generator
    from saferlhf_fast.runtime import engine

    base = kit.make_model(tmp_path / "model")
    data = kit.write_rows(tmp_path / "p.jsonl", [{"prompt": "what is the number of the day"}])
    engine.start(Engine(), 0)
    tokenizer = load_tokenizer(base)
    lm = load_causal_lm(base, tokenizer=tokenizer)
    prompts, _ = prompt_examples(data, tokenizer, "auto", 20)
    sampling = Sampling(max_new_tokens=10)
    generator = open_generator(
        engine.Frozen(Policy(lm), Engine()), tokenizer, end_tokens(tokenizer, lm, "auto"), sampling
    )

    def sampled():
        return [r.ids for r in generate(generator, prompts * 8, sampling, 32)[1]]

    plain = sampled()
    lm.generation_config.update(repetition_penalty=9.0, min_p=0.9, num_beams=2)
    assert sampled() == plain
    assert lm.generation_config.repetition_penalty == 9.0  # saved with the model as it was
