"""Dotted keys of a recipe, such as `train.max_steps: 3`, mean the same as nested ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from saferlhf_fast.errors import UserError

FREE = "columns"
"""The one setting whose keys are names that users choose: a dot in them means nothing."""


def nested(values: Any, place: str = "") -> Any:
    """Returns nested mappings and lists without dotted keys.

    Args:
        values: A recipe, or a part of it.
        place: The dotted key of that part, for messages.

    Raises:
        UserError: A key is given both nested and dotted.
    """
    if isinstance(values, list):
        return [nested(item, f"{place}{i}.") for i, item in enumerate(values)]
    if not isinstance(values, dict):
        return values
    result: dict[Any, Any] = {}
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        if key != FREE:
            value = nested(value, f"{place}{key}.")
        if _is_dotted(key):
            dotted[key] = value
        else:
            result[key] = value
    for key, value in dotted.items():
        steps = key.split(".")
        if FREE in steps:
            free = steps.index(FREE) + 1
            steps[free:] = [".".join(steps[free:])] if steps[free:] else []
        put(result, steps, value, place)
    return result


def _is_dotted(key: object) -> bool:
    return isinstance(key, str) and "." in key and all(step.strip() for step in key.split("."))


def put(target: Any, steps: Sequence[str], value: Any, place: str = "") -> None:
    """Writes a value into nested mappings and lists; mappings are merged.

    Args:
        target: A mapping or a list; it is changed.
        steps: The keys that lead to the value.
        value: The value.
        place: The dotted key of the target, for messages.

    Raises:
        UserError: The place has a value already.
    """
    key: Any = steps[0]
    place += key
    if isinstance(target, list):
        if not key.isdecimal() or int(key) >= len(target):
            raise UserError(f"{place}: expected a number below {len(target)}, as it is a list")
        key = int(key)
    is_new = isinstance(target, dict) and target.get(key) is None
    if len(steps) > 1:
        if is_new:
            target[key] = {}
        elif not isinstance(target[key], (dict, list)):
            raise UserError(f"{place}: is given twice, as a value and with keys below it")
        put(target[key], steps[1:], value, f"{place}.")
    elif is_new:
        target[key] = value
    elif isinstance(target[key], dict) and isinstance(value, Mapping):
        for inner, inner_value in value.items():
            put(target[key], [inner], inner_value, f"{place}.")
    elif value is not None:
        raise UserError(f"{place}: is given twice")


def with_settings_beside_stages(
    raw: DictConfig, names_and_kinds: Sequence[tuple[str, str]], recipe: str | Path
) -> DictConfig:
    """Returns a recipe of `run` with keys such as `sft.train.max_steps`, beside `stages`, in their stage.

    Args:
        raw: The recipe.
        names_and_kinds: (name, kind) of each stage.
        recipe: The name of the recipe, for messages.

    Raises:
        UserError: A stage has the setting already.
    """
    if all(name not in raw for name, _ in names_and_kinds):
        return raw
    values: Any = OmegaConf.to_container(raw, resolve=False)
    for i, (name, kind) in enumerate(names_and_kinds):
        if name in values:
            try:
                put(values["stages"][i], [kind], values.pop(name))
            except UserError as e:
                raise UserError(f"{recipe}: stages.{i}.{e}") from e
    return OmegaConf.create(values)
