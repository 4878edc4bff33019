"""The table of stages: every name in it exists in the code, and no stage is missing from it."""

import inspect
from importlib import import_module

import pytest

from saferlhf_fast import cli
from saferlhf_fast.commands import run
from saferlhf_fast.config import load, schema, stages
from saferlhf_fast.config.sections import PreferenceData
from saferlhf_fast.config.stage_table import FAMILIES, STAGE_SPECS, WITH_SETTINGS, stages_of
from saferlhf_fast.runtime import launcher


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_every_name_in_a_row_exists_in_the_code(name):
    spec = WITH_SETTINGS[name]
    assert schema.SETTINGS[name] is getattr(stages, spec.config)
    assert cli.COMMANDS[name] == spec.help and all(example.startswith(name) for example in spec.examples)
    if spec.entry:
        module, function = spec.entry.split(":")
        parameters = inspect.signature(getattr(import_module(module), function)).parameters
        assert list(parameters)[0] == "cfg" and "restart" in parameters and run.ENTRIES[name] == spec.entry
    if spec.planner:
        module, function = spec.planner.split(":")
        assert callable(getattr(import_module(f"saferlhf_fast.commands.plan.{module}"), function))
    assert (name in launcher.COMMANDS) == spec.several_processes


def test_a_recipe_can_name_exactly_the_stages_of_the_table():
    assert list(stages.STAGES) == list(STAGE_SPECS) and set(schema.SETTINGS) == set(WITH_SETTINGS)
    trained = {name for name, config in stages.STAGES.items() if "train" in config.__dataclass_fields__}
    assert trained == {name for name, spec in STAGE_SPECS.items() if spec.best_by}


def test_each_stage_is_in_one_family_that_names_its_settings():
    """Otherwise `saferlhf-fast plan` could name a key that was renamed or that does not bound a pass."""
    assert sorted(stages_of(*FAMILIES)) == sorted(STAGE_SPECS)
    for name, spec in STAGE_SPECS.items():
        family, leaves = FAMILIES[spec.family], schema.leaves(stages.STAGES[name])
        keys = [key for key in family[1:] if key]
        assert set(keys) <= set(leaves), name
        assert bool(family.recomputation) == ("optim.kind" in leaves), name
        needed = {key: "x" for key in ("model", "data", "prompts", "reward", "output") if key in leaves}
        cfg = load.load(name, None, {**needed, family.pass_rows: "3", family.max_length: "700"})
        of_pass = cfg.train.pass_tokens(spec.sequences) if spec.family == "supervised" else cfg.pass_tokens()
        assert of_pass == 3 * 700 * spec.sequences
        if family.pass_tokens:
            cfg = load.load(name, None, {**needed, family.pass_tokens: "99"})
            assert (
                cfg.train.pass_tokens(spec.sequences) if spec.family == "supervised" else cfg.pass_tokens()
            ) == 99


def test_stages_of_preference_data_have_two_sequences_per_example():
    pairs = {
        name
        for name, config in stages.STAGES.items()
        if config.__dataclass_fields__.get("data") is not None
        and config.__dataclass_fields__["data"].type == PreferenceData
    }
    assert pairs == {name for name, spec in STAGE_SPECS.items() if spec.sequences == 2}
    assert {spec.sequences for spec in STAGE_SPECS.values()} == {1, 2}
