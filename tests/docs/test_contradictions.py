"""docs/contradictions.md against the tables, and the tables against the settings that they name."""

import string

import contradictions_page
import pytest

from saferlhf_fast.config import contradictions, load, schema
from saferlhf_fast.config.stages import STAGES

ROWS = [
    (stage, row)
    for table in contradictions.TABLES
    for stage in table.stages
    for row in table.rows
    if row.only in ("", stage)
]
GIVEN = {"model": "m", "data": "d", "prompts": "d", "reward": "r", "output": "o"}


def config(stage, **settings):
    given = {key: value for key, value in GIVEN.items() if key in schema.leaves(STAGES[stage])}
    return load.load(
        stage, None, {**given, **{key.replace("__", "."): value for key, value in settings.items()}}
    )


def test_the_page_is_what_the_tables_say():
    assert contradictions_page.PAGE.read_text(encoding="utf-8") == contradictions_page.page(), (
        "python tests/support/contradictions_page.py writes it anew"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_row_names_settings_that_its_stage_has(stage):
    """A setting that is renamed would otherwise be missed until somebody contradicts himself."""
    cfg, rows = config(stage), [row for asked, row in ROWS if asked == stage]
    assert rows
    for row in rows:
        assert not row.condition(cfg) or row.key == "cost", f"{row.key}: the defaults contradict each other"
        names = {name for _, name, _, _ in string.Formatter().parse(f"{row.key}: {row.message}") if name}
        words = {name: name for name in names if not name.startswith("cfg.")}
        assert words.keys() <= {"got", "key", "name", "hint", "multiplier", "bound", "critic", "inside"}
        assert row.message.format(cfg=cfg, **words)


@pytest.mark.parametrize(
    "settings, key",
    [
        (
            {
                "ppo__overlap": "true",
                "ppo__importance_cap": "2",
                "sampling__engine": "vllm-server",
                "evaluation__interval": "3",
                "evaluation__fraction": "0.1",
            },
            "evaluation.interval",
        ),
        ({"ppo__overlap": "true", "ppo__importance_cap": "2", "engine__frozen": "sharded"}, "ppo.overlap"),
        ({"lora__rank": "4", "engine__zero_stage": "3"}, "engine.zero_stage"),
        ({"lora__bits": "4"}, "lora.bits"),
        ({"lora__bits": "4", "lora__rank": "4", "engine__zero_stage": "3"}, "lora.bits"),
        ({"lora__bits": "4", "lora__rank": "4", "engine__frozen": "sharded"}, "lora.bits"),
        ({"lora__rank": "4", "reward_critic": "c"}, "reward_critic"),
        ({"ppo__shared_critic": "true", "cost_critic": "c"}, "cost_critic"),
        ({"ppo__minibatches": "99"}, "ppo.minibatches"),
        ({"multiplier__init": "0"}, "multiplier.init"),
        ({"multiplier__init": "9"}, "multiplier.init"),
        ({"cost": None, "constraints": "[]"}, "cost"),
        ({"constraints": "[{cost: c}]"}, "constraints"),
        ({"cost": None, "constraints": "[{cost: c}]", "cost_critic": "c"}, "constraints"),
        ({"cost": None, "constraints": "[{cost: c}]", "multiplier__threshold": "1"}, "constraints"),
        ({"cost": None, "constraints": "[{cost: c, name: harm}, {cost: c, name: privacy}]"}, "constraints"),
        ({"cost": None, "constraints": "[{cost: c, name: reward}]"}, "constraints.0.name"),
        ({"cost": None, "constraints": "[{cost: c, name: a/b}]"}, "constraints.0.name"),
        (
            {"cost": None, "constraints": "[{cost: c, multiplier: {init: 9}}]"},
            "constraints.0.multiplier.init",
        ),
        ({"cost": None, "constraints": "[{cost: c, critic: c}]", "lora__rank": "4"}, "constraints.0.critic"),
    ],
)
def test_rows_of_ppo_lag_are_found(settings, key):
    assert contradictions.first("ppo-lag", config("ppo-lag", **{"cost": "c", **settings})).startswith(
        f"{key}: "
    )


def test_a_message_may_hold_braces():
    cfg = config("sft", engine__config={"optimizer": "{cfg}"})
    assert contradictions.first("sft", cfg).endswith('got "{cfg}"')
