"""Numbers that are none, in every setting that takes a number; dotted keys in recipes."""

import itertools

import pytest

from saferlhf_fast.commands import run
from saferlhf_fast.config import load, schema
from saferlhf_fast.errors import UserError

NOT_FINITE = ["inf", "nan", "-inf", "Infinity", "NaN", ".inf", "-.INF", "'nan'", "1e999", "'1e999'", "[nan]"]
TOO_LONG = ["1" + "0" * 400, "'" + "9" * 5000 + "'", "9" * 5000]


@pytest.mark.parametrize("command", ["sft", "cost", "ppo-lag", "dpo", "evaluate", "demo"])
def test_no_field_takes_a_number_that_is_not_finite(command, tmp_path):
    cls = schema.SETTINGS[command]
    required = {name: "x" for name, _, default, _ in schema.own_fields(cls) if default is schema.REQUIRED}
    numbers = [key for key, leaf in schema.leaves(cls).items() if schema.is_number(leaf.annotation)]
    assert len(numbers) > 3 or command == "demo"
    words = itertools.cycle([*NOT_FINITE, *TOO_LONG])
    recipe = tmp_path / "r.yaml"
    for key in numbers:
        for word in itertools.islice(words, 2):
            with pytest.raises(UserError) as caught:
                load.load(command, None, {**required, key: word})
            assert f"command line: {key}: expected " in str(caught.value), (key, word)
        recipe.write_text(f"{key}: {word}\n" + "".join(f"{name}: x\n" for name in required))
        with pytest.raises(UserError, match=f"r.yaml: {key}: expected .*got "):
            load.load(command, recipe)


@pytest.mark.parametrize(
    "key, value",
    [
        ("optim.betas.1", "{optim: {betas: [0.9, nan]}}"),
        ("data.0.proportion", "{data: [{path: a, proportion: inf}]}"),
        ("data.count", "{data: {path: a, count: 99999999999999999999}}"),
        ("constraints.0.multiplier.threshold", "{constraints: [{cost: c, multiplier: {threshold: nan}}]}"),
    ],
)
def test_numbers_inside_lists_are_checked_too(tmp_path, key, value):
    (tmp_path / "r.yaml").write_text(value)
    with pytest.raises(UserError, match=f"r.yaml: {key}: expected .*number"):
        load.load(
            "ppo-lag",
            tmp_path / "r.yaml",
            {"model": "m", "reward": "r", "output": "o"} | ({} if "data" in key else {"data": "d"}),
        )


def test_words_stay_words_where_text_is_expected():
    cfg = load.load("sft", None, {"model": "nan", "data": "inf", "output": "infinity"})
    assert (cfg.model, cfg.data, cfg.output) == ("nan", "inf", "infinity")


def sft(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text + "\n")
    return load.load(
        "sft", tmp_path / "r.yaml", {"model": "m", "output": "o"} | ({} if "data" in text else {"data": "d"})
    )


@pytest.mark.parametrize(
    "text",
    [
        "train.max_steps: 3\ntrain.epochs: 2",
        "train.max_steps: 3\ntrain: {epochs: 2}",
        "train:\ntrain.max_steps: 3\ntrain.epochs: 2",
        "train: {epochs: 2}\ntrain.max_steps: ${seed}\nseed: 3",
        "{train.max_steps: 3, train: {epochs: 2}}",
    ],
)
def test_dotted_keys_mean_the_same_as_nested_ones(tmp_path, text):
    cfg = sft(tmp_path, text)
    assert (cfg.train.max_steps, cfg.train.epochs, cfg.train.batch_size) == (3, 2, 4)


def test_names_of_columns_may_have_dots(tmp_path):
    for text in ("data: {path: x, columns: {a.b: prompt}}", "data.path: x\ndata.columns.a.b: prompt"):
        assert sft(tmp_path, text).data.columns == {"a.b": "prompt"}
    assert sft(tmp_path, "data:\n- {path: x}\ndata.0.count: 3").data[0].count == 3


@pytest.mark.parametrize(
    "text, said",
    [
        ("train: {max_steps: 2}\ntrain.max_steps: 3", "r.yaml: train.max_steps: is given twice"),
        ("seed: 3\nseed.x: 3", "r.yaml: seed: is given twice"),
        ("train.max_step: 3", "r.yaml: train.max_step: unknown key; did you mean train.max_steps?"),
        ("data: [x]\ndata.1.count: 3", "r.yaml: data.1: expected a number below 1"),
        ("train.: 3", "r.yaml: train.: unknown key; did you mean train?"),
    ],
)
def test_dotted_keys_that_cannot_be_used(tmp_path, text, said):
    with pytest.raises(UserError) as caught:
        sft(tmp_path, text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "stages",
    [
        "- sft: {model: m, data: d, train.max_steps: 3}",
        "- sft: {model: m, data: d}\nsft.train.max_steps: 3",
        "- {name: big, sft: {model: m, data: d}}\nbig.train.max_steps: 3",
        "- sft.model: m\n  sft.data: d\n  sft.train: {max_steps: 3}",
    ],
)
def test_dotted_keys_in_the_recipe_of_a_run(tmp_path, stages):
    (tmp_path / "r.yaml").write_text(f"output: o\nstages:\n{stages}\n")
    name = "big" if "big" in stages else "sft"
    for overrides, steps in (({}, 3), ({f"{name}.train.max_steps": "9"}, 9)):
        _, (step,) = run.steps_of(tmp_path / "r.yaml", overrides)
        assert step.cfg.train.max_steps == steps and step.name == name


def test_a_run_s_setting_that_is_given_twice(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "output: o\nstages:\n- sft: {model: m, data: d, train: {max_steps: 3}}\nsft.train.max_steps: 3\n"
    )
    with pytest.raises(UserError, match=r"r.yaml: stages.0.sft.train.max_steps: is given twice"):
        run.steps_of(tmp_path / "r.yaml", {})


@pytest.mark.parametrize(
    "key, word, value",
    [
        ("train.max_steps", "010", 8),
        ("train.max_steps", "-0_10", -8),
        ("train.max_steps", "1:30", 90),
        ("optim.learning_rate", "1:30.5", 90.5),
        ("optim", "{betas: [0.9, 0:59.5]}", 59.5),
        ("data", "[{path: a, count: 010}]", 8),
    ],
)
def test_numbers_that_yaml_reads_otherwise_are_refused(tmp_path, key, word, value):
    expected = rf"{key}[\w.]*: expected a number in decimal digits, got .*, which is {value} in YAML"
    with pytest.raises(UserError, match=f"r.yaml: {expected}"):
        sft(tmp_path, f"{key}: {word}")
    with pytest.raises(UserError, match=f"command line: {expected}"):
        load.load("sft", None, {"model": "m", "data": "d", "output": "o", key: word})


def test_numbers_with_zeros_that_mean_what_they_say(tmp_path):
    cfg = sft(tmp_path, "seed: 00\ntrain: {max_steps: 08}\noptim.learning_rate: 00.5\nlog.project: '1:30'")
    assert (cfg.seed, cfg.train.max_steps, cfg.optim.learning_rate, cfg.log.project) == (0, 8, 0.5, "1:30")
    cfg = load.load("sft", None, {"model": "010", "data": "1:30", "output": "007"})
    assert (cfg.model, cfg.data, cfg.output) == ("010", "1:30", "007")
