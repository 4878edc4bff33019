"""The one table of stages: every name in it leads somewhere, and what is derived from it has nothing more."""

import inspect
from importlib import import_module

import pytest

from saferlhf_fast import cli
from saferlhf_fast.commands import run
from saferlhf_fast.config import schema, stages
from saferlhf_fast.config.stage_table import STAGE_SPECS, WITH_SETTINGS
from saferlhf_fast.runtime import launcher


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_every_name_in_a_row_leads_somewhere(name):
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


def test_a_recipe_can_name_the_rows_and_nothing_else():
    assert list(stages.STAGES) == list(STAGE_SPECS) and set(schema.SETTINGS) == set(WITH_SETTINGS)
    trained = {name for name, config in stages.STAGES.items() if "train" in config.__dataclass_fields__}
    assert trained == {name for name, spec in STAGE_SPECS.items() if spec.best_by}
