"""Settings: defaults, recipe and overrides in this order, and the one line that every mistake gets."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from saferlhf_fast.config import checks, deepspeed_keys, fingerprint, inputs, schema
from saferlhf_fast.config import load as settings
from saferlhf_fast.config.sections import MEMORY_SHARES
from saferlhf_fast.config.stages import STAGES, Sampling, Source
from saferlhf_fast.errors import UserError

GIVEN = {"model": "org/model", "data": "data.json", "output": "out"}


def load(command="sft", recipe=None, **overrides):
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    return settings.load(command, recipe, {**(GIVEN if recipe is None else {}), **values})


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def error(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_recipe_that_gives_part_of_a_group_keeps_the_stage_s_own_defaults(tmp_path):
    path = recipe(tmp_path, "model: m\ndata: d.json\noutput: o\ntrain: {batch_size: 2}\noptim:\n")
    cfg = load(recipe=path)
    assert (cfg.train.epochs, cfg.train.accumulation, cfg.train.batch_size) == (3, 8, 2)
    assert cfg.optim.learning_rate == 2e-5
    cost = settings.load("cost", path)
    assert (cost.train.epochs, cost.train.batch_size, cost.optim.weight_decay) == (2, 2, 0.1)


def test_overrides_win_over_the_recipe_and_values_are_yaml(tmp_path):
    path = recipe(tmp_path, "model: m\ndata: d.json\noutput: o\nseed: 3\ntrain: {max_steps: 7}\n")
    cfg = load(
        recipe=path,
        seed="5",
        train__max_steps="null",
        optim__learning_rate="1e-3",
        optim__betas="[0.8, 0.9]",
        log__trackers="wandb",
        data="[a.json, {path: b.json, count: 3}]",
    )
    assert (cfg.seed, cfg.train.max_steps, cfg.optim.learning_rate) == (5, None, 1e-3)
    assert cfg.optim.betas == (0.8, 0.9) and cfg.log.trackers == ["wandb"]
    assert cfg.data == ["a.json", Source(path="b.json", count=3)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"reward": "{kind: judge, path: x}"},
            'reward.kind: expected one of score_model, moderator, got "judge"',
        ),
        ({"reward": "{kinds: score_model, path: x}"}, "reward.kinds: unknown key; did you mean kind?"),
        ({"reward": "{kind: score_model}"}, "reward.path: missing"),
        ({"reward": "[a]"}, 'reward: expected a path, or a scorer (path: …), got ["a"]'),
        ({"constraints": "[{cost: c, names: x}]"}, "constraints.0.names: unknown key; did you mean name?"),
        ({"constraints": "[{name: harm}]"}, "constraints.0.cost: missing"),
        (
            {"constraints": "[{cost: c, multiplier: {threshold: true}}]"},
            "constraints.0.multiplier.threshold: expected number, got true",
        ),
        (
            {"constraints": "[{cost: c, threshold: 1}]"},
            "constraints.0.threshold: unknown key; did you mean multiplier.threshold?",
        ),
        (
            {"constraints": "[{cost: c, multiplier: {treshold: 1}}]"},
            "treshold: unknown key; did you mean threshold?",
        ),
        (
            {"constraints": "{cost: c}"},
            "constraints: expected a list, each a group with name, cost, critic, multiplier, or null",
        ),
        ({"data": "[{path: d, columns: {a: 1}}]"}, "data.0.columns.a: expected text, got 1"),
        (
            {"data": "[{path: d, count: true}]"},
            "data.0.count: expected whole number above 0 or null, got true",
        ),
    ],
)
def test_nested_values_are_checked_like_other_settings(given, expected):
    with pytest.raises(UserError) as caught:
        settings.load("ppo-lag", None, {**GIVEN, "reward": "r", **given})
    assert expected in str(caught.value)


def test_nested_scorers_and_constraints_are_listed_as_inputs():
    cfg = settings.load(
        "ppo-lag", None, {**GIVEN, "reward": "{path: r}", "constraints": "[{cost: {path: c}, critic: v}]"}
    )
    assert list(inputs.listed(cfg)) == [
        ("model", "org/model", "model"),
        ("reward.path", "r", "model"),
        ("constraints.0.cost.path", "c", "model"),
        ("constraints.0.critic", "v", "model"),
        ("data", "data.json", "data"),
    ]
    assert {name: (spec.kind, spec.path) for name, spec in cfg.scorers().items()} == {
        "reward": ("score_model", "r"),
        "cost": ("score_model", "c"),
    }


def test_a_run_without_constraints_keeps_the_hash_of_earlier_versions():
    """Otherwise its folder would count as a run with other settings."""
    values = {"model": "org/model", "data": "data.json", "output": "out", "reward": "r", "cost": "c"}
    cfg = settings.load("ppo-lag", None, values)
    assert (
        fingerprint.recipe_hash("ppo-lag", settings.to_dict(cfg), list(inputs.listed(cfg)))
        == "505dd34e702ca006498b6451991f5f339094159a9aa364133c35b39456be59f2"
    )


def test_text_stays_text_even_if_it_looks_like_a_number():
    cfg = load(output="2026", log__project="1e5", data="runs/a #1.json", template="none")
    assert (cfg.output, cfg.log.project, cfg.data, cfg.template) == ("2026", "1e5", "runs/a #1.json", "none")


def test_interpolation_and_mandatory_keys(tmp_path):
    path = recipe(tmp_path, "root: ???\nmodel: ${root}/m\ndata: ???\noutput: o\n")
    assert "recipe.yaml: missing: root, data (give them as root=… data=…)" in error(recipe=path)
    cfg = load(recipe=path, root="/r", data="${root}/d.json")
    assert (cfg.model, cfg.data) == ("/r/m", "/r/d.json")
    line = error(recipe=recipe(tmp_path, "model: ${nowhere}/m\ndata: d\noutput: o\n"))
    assert "recipe.yaml: model" in line and "nowhere" in line


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().seed = 1


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({"train__epohs": "3"}, "command line: train.epohs: unknown key; did you mean train.epochs?"),
        (
            {"learning_rate": "3"},
            "command line: learning_rate: unknown key; did you mean optim.learning_rate?",
        ),
        ({"trian": "3"}, "command line: trian: unknown key; did you mean train?"),
        ({"qqqqqqqq": "3"}, "command line: qqqqqqqq: unknown key; saferlhf-fast sft --help lists them"),
        (
            {"train__batch_size": "many"},
            'command line: train.batch_size: expected whole number above 0, got "many"',
        ),
        ({"train__batch_size": "0"}, "command line: train.batch_size: expected whole number above 0, got 0"),
        (
            {"train__batch_size": "1.5"},
            "command line: train.batch_size: expected whole number above 0, got 1.5",
        ),
        (
            {"train__batch_size": "true"},
            "command line: train.batch_size: expected whole number above 0, got true",
        ),
        (
            {"optim__learning_rate": ".nan"},
            "command line: optim.learning_rate: expected number above 0, got NaN",
        ),
        (
            {"optim__learning_rate": ".inf"},
            "command line: optim.learning_rate: expected number above 0, got Infinity",
        ),
        (
            {"optim__betas": "[0.9]"},
            "command line: optim.betas: expected a list of 2, each number above 0 and below 1, got [0.9]",
        ),
        (
            {"optim__schedule": "cosin"},
            'command line: optim.schedule: expected one of cosine, linear, constant, got "cosin"',
        ),
        (
            {"log__trackers": "[tensorbord]"},
            'command line: log.trackers.0: expected one of tensorboard, wandb, trackio, got "tensorbord"',
        ),
        ({"overwrite": "maybe"}, 'command line: overwrite: expected true or false, got "maybe"'),
        ({"train": "5"}, "command line: train: expected a group with epochs, max_steps"),
        ({"data": "[{pth: x}]"}, "command line: data.0.pth: unknown key; did you mean path?"),
        ({"data": "{count: 3}"}, "command line: data.path: missing"),
        (
            {"data": "[a, {path: x, count: -1}]"},
            "command line: data.1.count: expected whole number above 0 or null, got -1",
        ),
        ({"data": "[a, 3]"}, "command line: data.1: expected a path, or a source (path: …), got 3"),
        (
            {"train__eval_data": "{pth: x}"},
            "command line: train.eval_data.pth: unknown key; did you mean path?",
        ),
        ({"model": ""}, "command line: missing: model (give it as model=…"),
        ({"optim__betas": "[0.9"}, 'command line: optim.betas: "[0.9" is not YAML'),
    ],
)
def test_each_mistake_gets_one_line_with_key_expected_and_got(overrides, expected):
    assert error(**overrides).startswith(expected)


def test_an_error_names_the_file_that_has_the_key(tmp_path):
    path = recipe(tmp_path, "model: m\ndata: d\noutput: o\ntrain: {batch_size: x}\n")
    line = error(recipe=path)
    assert line.startswith(f"{path}: train.batch_size: expected") and line.endswith('got "x"')
    assert error(recipe=path, train__batch_size="y").startswith("command line: train.batch_size")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: [1", "not YAML at line"),
        ("- a\n- b\n", "expected a mapping"),
        ("just words", "expected a mapping"),
        ("seed: 1\nseed: 2\n", "not YAML at line 2"),
        ("stages: []", "start it with: saferlhf-fast run"),
        ("", "missing: model, data, output"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_path(tmp_path, text, expected):
    path = recipe(tmp_path, text)
    line = error(recipe=path)
    assert line.startswith(str(path)) and expected in line


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "bytes.yaml: cannot be read as text" in error(recipe=tmp_path / "bytes.yaml")
    assert "cannot be read" in error(recipe=tmp_path)
    assert "no such recipe" in error(recipe=tmp_path / "absent.yaml")


def test_every_setting_has_a_help_text():
    for command, cls in schema.SETTINGS.items():
        text = schema.help_text(command)
        for key, leaf in schema.leaves(cls).items():
            assert leaf.doc, f"{command}: {key} has no docstring"
            assert f"  {key}  ({schema.describe(leaf.annotation)}; " in text
            assert leaf.doc.split()[0] in text
    assert "train.epochs  (number above 0; default: 3.0)" in schema.help_text("sft")
    assert "train.epochs  (number above 0; default: 2.0)" in schema.help_text("reward")


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_valid_and_unchanged_after_a_round_trip(stage):
    given = {"model": "m", "data": "d", "prompts": "d", "reward": "r", "output": "o"}
    given = {k: v for k, v in given.items() if k in schema.leaves(STAGES[stage])}
    cfg = settings.load(stage, None, given)
    plain = settings.to_dict(cfg)
    assert settings.build(stage, json.loads(json.dumps(plain))) == cfg


PPO_GIVEN = {"reward": "org/reward", "cost": "org/cost"}


@pytest.mark.parametrize(
    "key, value",
    [
        ("multiplier.threshold", -3.0),
        ("multiplier.threshold_quantile", 0.2),
        ("multiplier.init", 3.0),
        ("multiplier.max", 2.0),
        ("multiplier.rule", "pid"),
        ("multiplier.delay", 4),
        ("multiplier.kp", 0.5),
        ("multiplier.ki", 0.5),
        ("multiplier.kd", 0.5),
        ("multiplier.lr", 0.5),
        ("multiplier.window", 8),
        ("evaluation.margin", 3.0),
    ],
)
def test_ppo_refuses_settings_of_a_constraint(key, value):
    given = {**GIVEN, **PPO_GIVEN, key: str(value)}
    with pytest.raises(UserError) as caught:
        checks.check_settings("ppo", settings.load("ppo", None, given), "one.")
    line = str(caught.value)
    assert (
        line.startswith(f"one.{key}: ") and "ppo-lag" in line and line.endswith(f"got {schema.show(value)}")
    )
    checks.check_settings("ppo-lag", settings.load("ppo-lag", None, given))


def test_ppo_accepts_a_multiplier_with_default_values():
    checks.check_settings(
        "ppo", settings.load("ppo", None, {**GIVEN, **PPO_GIVEN, "multiplier.threshold": "0"})
    )


def test_help_says_what_ppo_refuses():
    assert "multiplier.* and evaluation.margin are for ppo-lag alone" in " ".join(
        schema.help_text("ppo").split()
    )


ZERO = "zero_optimization"


@pytest.mark.parametrize(
    "config, key, suggested",
    [
        ({"foo": 1}, "foo", None),
        ({"gradient_cliping": 1}, "gradient_cliping", "gradient_clipping"),
        ({"comms_loger": {}}, "comms_loger", "comms_logger"),
        ({ZERO: {"overlap_com": True}}, f"{ZERO}.overlap_com", f"{ZERO}.overlap_comm"),
        ({ZERO: {"comms_logger": {}}}, f"{ZERO}.comms_logger", None),
    ],
)
def test_a_key_that_deepspeed_does_not_have_is_refused(config, key, suggested):
    cfg = settings.build("sft", {**GIVEN, "engine": {"config": config}})
    with pytest.raises(UserError) as caught:
        checks.check_settings("sft", cfg)
    line, name = str(caught.value), key.split(".")[-1]
    assert line.startswith(f"engine.config.{key}: expected") and "DeepSpeed" in line
    assert line.endswith(f"got {name}" if suggested is None else f"got {name}; did you mean {suggested}?")


def test_every_key_that_deepspeed_has_is_accepted():
    """The keys that deepspeed.runtime.config reads, and every field of its ZeRO class by name and alias."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    class RecordingDict(dict):
        def get(self, key, default=None):
            keys_read.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            keys_read.add(key)
            return super().__contains__(key)

        def keys(self):
            return self

        def __copy__(self):
            return self

    keys_read = set()
    DeepSpeedConfig(RecordingDict({"train_batch_size": 1}))
    assert {
        "bf16",
        "fp16",
        "optimizer",
        "scheduler",
        ZERO,
        "gradient_clipping",
        "communication_data_type",
        "aio",
        "activation_checkpointing",
        "flops_profiler",
        "comms_logger",
        "wall_clock_breakdown",
        "tensorboard",
    } <= keys_read
    others = {
        "elasticity",
        "compression_training",
        "autotuning",
        "data_efficiency",
        "curriculum_learning",
        "nebula",
        "hybrid_engine",
        "progressive_layer_drop",
        "eigenvalue",
        "sequence_parallel_size",
        "memory_breakdown",
        "amp",
    }
    assert deepspeed_keys.unknown({key: None for key in {*keys_read, *others}}) is None
    fields = DeepSpeedZeroConfig.model_fields
    names = [*fields, *filter(None, (field.alias for field in fields.values()))]
    assert len(names) > len(fields) > 30 and deepspeed_keys.unknown({ZERO: dict.fromkeys(names)}) is None


def test_without_deepspeed_its_keys_are_not_checked(monkeypatch):
    monkeypatch.setattr(deepspeed_keys, "find_spec", lambda name: None)
    assert deepspeed_keys.unknown({"foo": 1}) is None


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, True),
        ({"ppo.single_pass": "false"}, False),
        ({"ppo.epochs": "2"}, False),
        ({"ppo.minibatches": "2"}, False),
        ({"ppo.whiten": "true"}, False),
        ({"lora.dropout": "0.1"}, True),
        ({"lora.rank": "4"}, True),
        ({"lora.rank": "4", "lora.dropout": "0.1"}, False),
    ],
)
def test_which_settings_allow_one_pass(changed, expected):
    """lora.dropout has no effect without adapters."""
    required = {"model": "m", "reward": "r", "data": "d", "output": "o"}
    assert settings.load("ppo", None, {**required, **changed}).in_one_pass() is expected


def test_default_lengths_are_derived_from_max_length():
    for given, prompt, responses in (
        ({}, 50, {50: 50, 1: 99, 99: 1, 100: 1}),
        ({"max_prompt_length": 70, "max_new_tokens": 40}, 70, {50: 40, 70: 30}),
    ):
        sampling = Sampling(**given)
        assert sampling.prompt_limit(100) == prompt
        assert {length: sampling.response_limit(length, 100) for length in responses} == responses


def test_shares_of_memory_equal_those_in_the_help_text():
    text = schema.leaves(STAGES["ppo"])["sampling.memory"].doc
    for engine, share in MEMORY_SHARES.items():
        assert re.search(rf"{engine} .*?{share:g} when not given", text.replace("\n", " ")), engine
        assert Sampling().memory_share(engine) == share and Sampling(memory=0.5).memory_share(engine) == 0.5


def test_settings_import_no_torch():
    code = (
        "import sys; from saferlhf_fast.commands import run; from saferlhf_fast.config import "
        "deepspeed_keys; "
        "from saferlhf_fast.runtime import run_folder; "
        "assert deepspeed_keys.unknown({'foo': 1}) and not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
