"""Splits the words of a command line into a recipe and the settings that override it."""

import re
from collections.abc import Sequence

from ..errors import UserError


def split_words(command: str, words: Sequence[str]) -> tuple[str | None, dict[str, str | list[str]]]:
    """Splits the words after a command into a recipe and the settings that override it.

    Settings are `key=value`, `--key=value` or `--key value`. The flag of a true-or-false setting needs no
    value; the flag of a list takes all words up to the next flag, pair or recipe.

    Args:
        command: A key of schema.SETTINGS.
        words: All words after the command.

    Returns:
        (recipe or None, {key: value}); the values are texts that `load.parse` reads.

    Raises:
        UserError: An unknown option, a flag without a value, or more than one recipe.
    """
    from saferlhf_fast.config import schema

    kinds = {
        key: schema.takes(leaf.annotation) for key, leaf in schema.leaves(schema.SETTINGS[command]).items()
    }
    if command == "run":
        kinds |= {
            key: schema.takes(leaf.annotation)
            for stage in schema.STAGES.values()
            for key, leaf in schema.leaves(stage).items()
        }
    recipe: str | None = None
    overrides: dict[str, str | list[str]] = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        flag = re.fullmatch(r"--([\w.-]+)", word)
        pair = re.fullmatch(r"(?:--)?([\w.-]+)=(.*)", word, re.DOTALL)
        if flag:
            key = flag[1]
            # `load.build` reports an unknown flag by its name; until then its value must not become a recipe.
            bare = not remaining or remaining[0].startswith("--") or "=" in remaining[0]
            kind = kinds.get(key, kinds.get(key.partition(".")[2], "switch" if bare else "value"))
            overrides[key] = _flag_value(key, kind, remaining)
        elif pair:
            overrides[pair[1]] = pair[2]
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}; settings are --key value or key=value")
        elif recipe is None:
            recipe = word
        else:
            raise UserError(f"expected one recipe and key=value pairs, got {recipe} and {word}")
    return recipe, overrides


def _flag_value(key: str, kind: str, remaining: list[str]) -> str | list[str]:
    """Takes the values of a flag from the remaining words; `kind` is what schema.takes returns."""

    def is_value() -> bool:
        return bool(remaining) and not remaining[0].startswith("--")

    if kind == "switch":
        is_given = is_value() and remaining[0].lower() in ("true", "false")
        return remaining.pop(0) if is_given else "true"
    if not is_value():
        raise UserError(f"--{key}: expected a value after it")
    values = [remaining.pop(0)]
    while (
        kind == "list"
        and is_value()
        and not re.match(r"[\w.-]+=", remaining[0])
        and not remaining[0].endswith((".yaml", ".yml"))
    ):
        values.append(remaining.pop(0))
    return values if len(values) > 1 else values[0]
