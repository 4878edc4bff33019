"""Words of the command line of `data` -> sources and options."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from saferlhf_fast.config.paths import is_local
from saferlhf_fast.errors import UserError


@dataclass
class Options:
    """Options that the three commands share."""

    sources: list[str] = field(default_factory=list)
    form: str = "auto"
    strict: bool = False
    overwrite: bool = False
    seed: int = 0


@dataclass
class InspectOptions(Options):
    """Options of `data inspect`."""

    model: str | None = None
    lengths: str = "sample"
    against: str | None = None
    near: float | None = None
    output: str = "inspection"


@dataclass
class ConvertOptions(Options):
    """Options of `data convert`."""

    to: str | None = None
    by: str = "better"
    output: str | None = None


@dataclass
class SplitOptions(Options):
    """Options of `data split`."""

    test: float = 0.1
    validation: float = 0.0
    near: float = 0.8
    output: str | None = None


def parse(command: str, options: Any, words: Sequence[str]) -> None:
    """Sets options from words: sources, key=value, --key value, --key=value, --switch.

    Args:
        command: The command, for messages.
        options: One of the classes above; it is changed.
        words: What follows the command.

    Raises:
        UserError: A word is wrong, a value has another type, or there is no source.
    """
    types = {name: kind for name, kind in get_type_hints(type(options)).items() if name != "sources"}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in types and (word.startswith("--") or (equals and name.isidentifier())):
            raise UserError(f"{command}: {name}: expected one of {', '.join(types)}")
        if name not in types or not (equals or word.startswith("--")):
            options.sources.append(word)
            continue
        if not equals:
            is_switch = types[name] is bool and (not rest or rest[0].lower() not in ("true", "false"))
            if not is_switch and not rest:
                raise UserError(f"{command}: {name}: expected a value after it")
            value = "true" if is_switch else rest.pop(0)
        setattr(options, name, _value(name, value, types[name]))
    if not options.sources:
        raise UserError(f"{command}: expected a source (a file, a folder or a data set of the Hub), got none")
    against = getattr(options, "against", None)
    for source in [*options.sources, *([against] if against else [])]:
        if is_local(source) and not Path(source).expanduser().exists():
            raise UserError(f"{source}: no such file or folder")


def _value(name: str, value: str, kind: Any) -> Any:
    kinds = [item for item in get_args(kind) if item is not type(None)] or [kind]
    if kinds[0] is bool:
        if value.lower() not in ("true", "false"):
            raise UserError(f"{name}: expected true or false, got {value!r}")
        return value.lower() == "true"
    if kinds[0] in (int, float):
        try:
            number = kinds[0](value)
        except ValueError as error:
            expected = "a whole number" if kinds[0] is int else "a number"
            raise UserError(f"{name}: expected {expected}, got {value!r}") from error
        if kinds[0] is float and not 0 <= number <= 1:
            raise UserError(f"{name}: expected a number from 0 to 1, got {value}")
        return number
    return value


def require_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    """Raises UserError when a value is not among the choices."""
    if value not in choices:
        raise UserError(f"{name}: expected one of {', '.join(choices)}, got {value or 'nothing'}")


def names_of(options: type[Options]) -> list[str]:
    """Returns the names of the options of a command."""
    return [item.name for item in fields(options) if item.name != "sources"]
