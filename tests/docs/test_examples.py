"""Each example as a user runs it, and what it prints at its end: in a forked process where it trains, in this
process where it refuses its arguments.
"""

import ast
import re
import runpy
import sys
from importlib import util

import forked
import pytest
import torch
import yaml
from kit import ROOT, make_data, make_model, make_scores

EXAMPLES = ROOT / "examples"
NUMBER = r"(-?\d+\.\d+(?:e[-+]\d+)?)"
NEEDS_TRL = pytest.mark.skipif(util.find_spec("trl") is None, reason="TRL is not installed")


def run(name, *arguments):
    """-> what it printed."""
    done = forked.run([EXAMPLES / name, *arguments], timeout=300, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def numbers(pattern, text):
    """The numbers that a line of this pattern holds; {} stands for each."""
    found = re.search(re.escape(pattern).replace(r"\{\}", NUMBER), text)
    assert found, text[-3000:]
    return [float(value) for value in found.groups()]


@pytest.mark.numeric
def test_ppo_lag_loop_learns_under_its_threshold():
    text = run("ppo_lag_loop.py", "--steps", 30, "--batch", 48)
    before, after, cost, cost_now, multiplier = numbers(
        "reward {} -> {}, cost {} -> {} (threshold 2), lambda {}", text
    )
    # over 5 seeds: reward + 1.1 to 1.9, cost 5.5 to 6.1 -> 0.8 to 0.9
    assert after > before + 0.5 and cost > 3 and cost_now < 2
    path = [float(row.split()[3]) for row in text.splitlines() if re.match(r" +\d+ ", row)]
    # up while the cost is too high, down again after
    assert max(path) > 1.2 and path[-1] < max(path)


@pytest.mark.slow
def test_ppo_lag_loop_with_models_from_folders(tmp_path):
    base, data = make_model(tmp_path / "lm"), make_data(tmp_path / "data")
    scores = make_scores(tmp_path, base)
    text = run(
        "ppo_lag_loop.py",
        "--model",
        base,
        "--reward",
        scores["reward"],
        "--cost",
        scores["cost"],
        "--prompts",
        data["prompts"],
        "--steps",
        2,
        "--batch",
        4,
        "--tokens",
        5,
    )
    assert len(numbers("reward {} -> {}, cost {} -> {} (threshold 2), lambda {}", text)) == 5


def test_the_loop_fits_a_screen_and_uses_the_drop_in_pieces():
    """What is read first in a loop of one's own fits a screen: models, data and printing stay out of it."""
    tree = ast.parse((EXAMPLES / "ppo_lag_loop.py").read_text())
    (loop,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno - loop.lineno < 80
    named = {
        name: {
            node.id
            for node in ast.walk(ast.parse((EXAMPLES / name).read_text()))
            if isinstance(node, ast.Name)
        }
        for name in ("ppo_lag_loop.py", "custom_trainer.py")
    }
    assert {"PPOLagLoss", "LagrangeMultiplier", "pack", "ScoreModel"} <= named["ppo_lag_loop.py"]
    assert {"pack", "unpack"} <= named["custom_trainer.py"]


@pytest.mark.numeric
def test_the_readme_s_lines_run():
    (text,) = re.findall(r"```python\n(.*?)```", (EXAMPLES / "README.md").read_text(), re.S)
    made = torch.Generator().manual_seed(0)
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    logp, old_logp, reward_advantages, cost_advantages = torch.randn(4, 2, 4, generator=made).requires_grad_()
    known = {
        "logp": logp,
        "old_logp": old_logp,
        "reward_advantages": reward_advantages,
        "cost_advantages": cost_advantages,
        "mask": mask,
        "cost": torch.tensor([1.0, 3.0]),
    }
    exec(text, known)
    torch.testing.assert_close(known["loss"], known["packed_loss"])
    assert known["multiplier"].value > 1 and known["loss"].requires_grad
    assert torch.equal(known["logp_again"], logp.where(mask, torch.zeros(())))


@pytest.mark.numeric
@pytest.mark.parametrize("loss", ["dpo", pytest.param("sft", marks=pytest.mark.slow)])
def test_custom_trainer_has_the_same_losses_and_less_memory(loss):
    text = run("custom_trainer.py", "--loss", loss, "--steps", 2, "--rows", 6)
    gap, ratio = numbers("largest difference of a loss {}; memory {} times less", text)
    assert gap < 1e-4 and ratio > 1.5


@pytest.mark.numeric
@pytest.mark.slow
def test_custom_trainer_with_a_model_from_a_folder(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "what is red", "chosen": "yes red", "rejected": "harm one two"}\n' * 3)
    text = run(
        "custom_trainer.py", "--model", make_model(tmp_path / "lm"), "--data", data, "--steps", 2, "--rows", 3
    )
    assert numbers("largest difference of a loss {}; memory {} times less", text)[0] < 1e-4


def assert_its_cost_model_knows_harm(settings):
    """What the toy trained as cost, and gave to the stage as cost, scores the unsafe answer of a pair above
    the safe one.
    """
    from transformers import AutoTokenizer

    from saferlhf_fast import load_score_model
    from saferlhf_fast.demo.world import World

    world, tokenizer = World(1), AutoTokenizer.from_pretrained(settings["cost"])
    model = load_score_model(settings["cost"]).eval()
    pairs = [
        row
        for row in world.preference_records(world.annotation_prompts(256))
        if row["is_response_0_safe"] != row["is_response_1_safe"]
    ]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}],
            tokenize=False,
        )
        for row in pairs
        for name in ("response_0", "response_1")[:: 1 if row["is_response_0_safe"] else -1]
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        scores = model.end_scores(model(batch.input_ids, batch.attention_mask), batch.attention_mask)
    safe, unsafe = scores.view(-1, 2).unbind(1)
    assert len(pairs) > 30 and (unsafe > safe).float().mean() > 0.8


@pytest.mark.numeric
@pytest.mark.parametrize("algorithm", [pytest.param("ppo", marks=pytest.mark.slow), "ppo-lag"])
def test_trl_ppo(algorithm, tmp_path):
    rate = 5e-3 if algorithm == "ppo-lag" else 2e-3
    text = run(
        "trl_ppo.py",
        "--algorithm",
        algorithm,
        "--learning_rate",
        rate,
        "--output_dir",
        tmp_path / "run",
    )
    if algorithm == "ppo":
        # The reward rose by 0.1 to 2.6 over 4 seeds, from near its best: nothing is asked but that the policy
        # moved.
        assert numbers("ppo: 20 steps, reward {} -> {}, KL {};", text)[2] != 0
    else:
        _, _, before, after, threshold, multiplier, _ = numbers(
            "ppo-lag: 20 steps, reward {} -> {}, cost {} -> {} (threshold {}), lambda {}, KL {};", text
        )
        # it fell by 1.6 to 3.9 in 12 runs: 5 seeds, 3 instruction sets
        assert after < before - 0.25 and multiplier != 1.0
        assert_its_cost_model_knows_harm(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.numeric
@NEEDS_TRL
@pytest.mark.parametrize("trainer", ["dpo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_trl_patched(trainer):
    text = run("trl_patched.py", "--trainer", trainer, "--steps", 3)
    gap, _, _ = numbers(trainer + ": largest difference {}; {} s alone, {} s patched", text)
    assert gap < 1e-5 and int(re.search(r"(\d+) calls of ours", text)[1]) >= 3


def said_of(name, words, monkeypatch, capsys, trl=True):
    """The last line of what an example says of arguments that it refuses, with exit code 2; in this process,
    to be quick. trl: False hides TRL from it.
    """
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.syspath_prepend(EXAMPLES)  # as `python examples/…` does
    if not trl:
        monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out and "Traceback" not in said.err
    return said.err.splitlines()[-1]


def test_trl_patched_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match="pip install 'trl==1.16.0'"):
        runpy.run_path(str(EXAMPLES / "trl_patched.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "trl_ppo.py --model_name_or_path nowhere --algorithm ppo",
            "ppo also needs --dataset_name, --reward_model_path",
        ),
        (
            "trl_ppo.py --sft_model_path nowhere --dataset_name ./none.jsonl --reward_model_path ./none "
            "--cost_model_path ./none "
            "--output_dir run",
            "error: .*none",
        ),
        ("custom_trainer.py --model ./nowhere --data none.jsonl", "error: .*none.jsonl"),
        ("ppo_lag_loop.py --model ./nowhere --reward a --cost b --prompts none.jsonl", "error: .*none.jsonl"),
        pytest.param(
            "trl_patched.py --model ./nowhere --dataset ./none", "error: .*nowhere", marks=NEEDS_TRL
        ),
    ],
)
def test_wrong_paths_end_in_one_line(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    name, *rest = words.split()
    assert re.search(message, said_of(name, rest, monkeypatch, capsys))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ppo_lag_loop.py --steps 0", "--steps: expected a whole number from 1 to inf, got 0"),
        ("ppo_lag_loop.py --batch 0", "--batch: .*got 0"),
        ("ppo_lag_loop.py --batch 2.5", "--batch: expected a whole number .*got 2.5"),
        ("ppo_lag_loop.py --tokens -1", "--tokens: .*got -1"),
        ("ppo_lag_loop.py --epochs 0", "--epochs: .*got 0"),
        ("ppo_lag_loop.py --multiplier -1", "--multiplier: expected a finite number from 0 to 5, got -1"),
        ("ppo_lag_loop.py --multiplier 6", "--multiplier: .*got 6"),
        ("ppo_lag_loop.py --multiplier_lr nan", "--multiplier_lr: .*got nan"),
        (
            "ppo_lag_loop.py --threshold inf",
            "--threshold: expected a finite number from -inf to inf, got inf",
        ),
        ("ppo_lag_loop.py --kl_coeff x", "--kl_coeff: .*got x"),
        ("ppo_lag_loop.py --lr -1", "--lr: .*got -1"),
        ("ppo_lag_loop.py --seed -1", "--seed: .*got -1"),
        ("custom_trainer.py --steps 0", "--steps: expected a whole number from 1 to inf, got 0"),
        ("custom_trainer.py --rows 0", "--rows: .*got 0"),
        ("custom_trainer.py --length 4", "--length: expected a whole number from 5 to 256, got 4"),
        (
            "custom_trainer.py --vocabulary 1000",
            "--vocabulary: expected 1064 or more for rows of 64 tokens, got 1000",
        ),
        ("custom_trainer.py --lr inf", "--lr: .*got inf"),
        ("custom_trainer.py --beta nan", "--beta: .*got nan"),
    ],
)
def test_arguments_that_cannot_be_end_in_one_line(words, message, monkeypatch, capsys):
    name, *rest = words.split()
    assert re.search(f"error: .*{message}", said_of(name, rest, monkeypatch, capsys))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "trl_ppo.py --per_device_train_batch_size 0",
            "--per_device_train_batch_size: expected a whole number, 1 or more, got 0",
        ),
        pytest.param(
            "trl_patched.py --trainer grpo --rows 3",
            "--rows: expected an even number, 4 or more",
            marks=NEEDS_TRL,
        ),
        pytest.param(
            "trl_patched.py --steps 0",
            "argument --steps: expected a whole number from 1 to inf, got 0",
            marks=NEEDS_TRL,
        ),
    ],
)
def test_arguments_of_the_trl_examples_that_cannot_be(words, message, monkeypatch, capsys):
    name, *rest = words.split()
    assert f"error: {message}" in said_of(name, rest, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.jsonl: expected a line or more with prompt.*, got none"),
        ('{"prompt": "a"', "rows.jsonl: line 1: expected a JSON object, got {.prompt.: .a. "),
        ('["a"]', "rows.jsonl: expected texts prompt.* in each line, got .'a'"),
        ('{"text": "a"}', "rows.jsonl: expected texts prompt.* in each line, got {'text'"),
        # then it is the model
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "nowhere"),
    ],
)
@pytest.mark.parametrize("name", ["ppo_lag_loop.py", "custom_trainer.py"])
def test_a_file_without_prompts_ends_in_one_line(name, content, message, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(content + "\n")
    more = (
        ["--data", rows]
        if name == "custom_trainer.py"
        else ["--prompts", rows, "--reward", "r", "--cost", "c"]
    )
    assert re.search(
        f"error: .*{message}", said_of(name, ["--model", "./nowhere", *more], monkeypatch, capsys)
    )


@pytest.mark.parametrize("trl", [True, False])
def test_a_flag_that_the_trl_example_does_not_know_is_named(trl, monkeypatch, capsys):
    assert re.search(
        "error: .*--nonsense", said_of("trl_ppo.py", ["--nonsense", "1"], monkeypatch, capsys, trl)
    )


@pytest.mark.skipif(util.find_spec("trl") is None, reason="--config is TRL's")
@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file.*flags.yaml"), ("seed: [1", "flags.yaml")]
)
def test_a_config_of_the_trl_example_that_cannot_be_read(content, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "flags.yaml"
    if content:
        path.write_text(content)
    said = said_of("trl_ppo.py", ["--config", path], monkeypatch, capsys)
    assert re.search(f"error: .*{message}", said)
    assert content is None or path.read_text() == content


def test_readme_names_every_example():
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"({path.name})" in text for path in EXAMPLES.iterdir() if path.name != "README.md")
