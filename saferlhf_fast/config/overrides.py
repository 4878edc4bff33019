"""A command's words, sorted into a recipe and the settings that it overrides."""

import re

from ..errors import UserError


def split_words(command, words):
    """Sorts what follows a command into (recipe or None, {key: value}).

    `key=value`, `--key=value`, `--key value`; a flag of a true-or-false setting needs no value, one of a list
    takes all words up to the next flag, pair or recipe.
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
    recipe, overrides, rest = None, {}, list(words)
    while rest:
        word = rest.pop(0)
        flag = re.fullmatch(r"--([\w.-]+)", word)
        pair = re.fullmatch(r"(?:--)?([\w.-]+)=(.*)", word, re.DOTALL)
        if flag:
            key = flag[1]
            # An unknown flag is refused with the settings, by its name; its value must not be taken for a
            # recipe.
            bare = not rest or rest[0].startswith("--") or "=" in rest[0]
            kind = kinds.get(key, kinds.get(key.partition(".")[2], "switch" if bare else "value"))
            overrides[key] = _flag_value(key, kind, rest)
        elif pair:
            overrides[pair[1]] = pair[2]
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}; settings are --key value or key=value")
        elif recipe is None:
            recipe = word
        else:
            raise UserError(f"expected one recipe and key=value pairs, got {recipe} and {word}")
    return recipe, overrides


def _flag_value(key, kind, rest):
    """Takes from the remaining words what belongs to a flag."""

    def is_value():
        return rest and not rest[0].startswith("--")

    if kind == "switch":
        return rest.pop(0) if is_value() and rest[0].lower() in ("true", "false") else "true"
    if not is_value():
        raise UserError(f"--{key}: expected a value after it")
    values = [rest.pop(0)]
    while (
        kind == "list"
        and is_value()
        and not re.match(r"[\w.-]+=", rest[0])
        and not rest[0].endswith((".yaml", ".yml"))
    ):
        values.append(rest.pop(0))
    return values if len(values) > 1 else values[0]
