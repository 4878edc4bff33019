"""From defaults, recipe and overrides to a typed config: defaults ← YAML ← key=value, then validation.

OmegaConf reads YAML and resolves `${root}` and `???`; pydantic checks; this file merges and turns every error
into one UserError line that names the file (or the command line), the key, what was expected and what was
given. No torch.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from saferlhf_fast.config import dotted_keys, redact, setting_errors, yaml_numbers
from saferlhf_fast.config.schema import (
    REQUIRED,
    SETTINGS,
    Annotation,
    Leaf,
    defaults,
    in_order,
    is_group,
    is_text,
    leaves,
    nearest,
    own_fields,
    show,
)
from saferlhf_fast.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"


def load(command: str, recipe: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Any:
    """Returns the frozen config of a stage (or demo).

    A recipe may have `root`, which is only used for `${root}`, and `stage`, which must be the command.

    Args:
        command: A key of schema.SETTINGS.
        recipe: The path of a YAML file, or the name of a shipped recipe.
        overrides: {dotted key: value}; a value that is text is read as YAML.

    Returns:
        An instance of SETTINGS[command].

    Raises:
        UserError: The recipe cannot be read, or a setting is unknown, missing or wrong.
    """
    overrides = overrides or {}
    raw = read_recipe(recipe) if recipe else OmegaConf.create({})
    if "stages" in raw:
        raise UserError(f"{recipe}: has several stages; start it with: saferlhf-fast run {recipe}")
    leaf_of = leaves(SETTINGS[command])
    apply(raw, overrides, leaf_of, recipe)
    values = resolve(raw, recipe)
    for folder in ("root", "models"):  # a recipe of one stage may name them for its paths
        if folder not in leaf_of:
            values.pop(folder, None)
    stage = values.pop("stage", command)  # the config.yaml of a run folder can be used as a recipe
    if stage != command:
        raise UserError(f"{recipe}: stage: is of the stage {stage}, not {command}")
    return build(command, values, where(recipe, overrides))


def read_recipe(recipe: str | Path) -> DictConfig:
    """Returns a recipe as an OmegaConf mapping that is not resolved yet; dotted keys are nested.

    Raises:
        UserError: There is no such recipe, or it is not a YAML mapping.
    """
    path = Path(recipe).expanduser()
    shipped = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    if not path.exists() and path.parent == Path(".") and shipped.exists():
        path = shipped
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise UserError(
            f"{recipe}: no such recipe (expected a YAML file, or one of the shipped ones: {names})"
        )
    try:
        text = path.read_text(encoding="utf-8")
        raw = OmegaConf.create(text)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{recipe}: cannot be read as text: {e}") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{recipe}: not YAML{at}: {getattr(e, 'problem', None) or e}") from e
    except OmegaConfBaseException as e:
        raise UserError(f"{recipe}: {_first_line(e)}") from e
    except ValueError as e:  # Python converts integers of up to 4300 digits
        long = re.search(r"([\w.-]+)\s*[:=]\s*[-+]?\d{999}", text)
        key = f"{long[1]}: " if long else ""
        raise UserError(f"{recipe}: {key}expected a number of up to 4300 digits, got one of more") from e
    except AssertionError:  # what OmegaConf raises for a file with only a number
        raw = None
    # OmegaConf reads `abc` as {abc: null}.
    if not isinstance(raw, DictConfig) or (text.strip() and ":" not in text):
        raise UserError(f"{recipe}: expected a mapping of keys to values, got {show(text.strip())}")
    problem = yaml_numbers.misread(text)
    if problem:
        raise UserError(f"{recipe}: {problem}")
    try:
        return OmegaConf.create(dotted_keys.nested(OmegaConf.to_container(raw, resolve=False)))
    except UserError as e:
        raise UserError(f"{recipe}: {e}") from e


def apply(
    raw: DictConfig,
    overrides: Mapping[str, Any],
    known: Mapping[str, Leaf],
    recipe: str | Path | None = None,
) -> None:
    """Writes overrides into a recipe.

    Args:
        raw: The recipe; it is changed.
        overrides: {dotted key: value}; a value that is text is read as YAML.
        known: What schema.leaves returns; it tells which settings are text.
        recipe: The name of the recipe, for messages.

    Raises:
        UserError: A value is not YAML, or there is no place for its key.
    """
    for key, value in overrides.items():
        annotation = known[key].annotation if key in known else None
        try:
            OmegaConf.update(raw, key, parse(value, annotation, key), merge=False, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError, IndexError) as e:
            if isinstance(e, UserError):
                raise
            at = recipe or "the settings"
            raise UserError(f"command line: {key}: cannot be set in {at}: {_first_line(e)}") from e


def parse(value: Any, annotation: Annotation = None, key: str = "value") -> Any:
    """Reads a value of the command line as YAML.

    Args:
        value: Its text, or a list of texts; any other value is returned as it is.
        annotation: The type of the setting: where it is text, a value that looks like a number stays text.
        key: The setting, for messages.

    Raises:
        UserError: The value is not YAML.
    """
    if isinstance(value, list):
        return [parse(v, None, key) for v in value]
    if not isinstance(value, str):
        return value
    if value in ("", "None"):
        return None
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(f"x: {value}"), resolve=False)["x"]
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeError) as e:
        if annotation is not None and is_text(annotation):
            return value  # a path may hold any character
        raise UserError(f"command line: {key}: {show(value)} is not YAML (quote it?)") from e
    except ValueError as e:  # Python converts integers of up to 4300 digits
        raise UserError(
            f"command line: {key}: expected a number of up to 4300 digits, got {len(value)} characters"
        ) from e
    if get_origin(annotation) is list and parsed is not None and not isinstance(parsed, list):
        return [parsed]  # --seeds 0, log.trackers=wandb
    if is_text(annotation) and isinstance(parsed, (str, bool, int, float)) and value[0] not in "'\"":
        return value
    problem = yaml_numbers.misread(f"{key}: {value}")
    if problem:
        raise UserError(f"command line: {problem}")
    return parsed


def resolve(
    raw: DictConfig, recipe: str | Path | None = None, rename: Callable[[str], str] = str
) -> dict[str, Any]:
    """Returns a recipe as nested plain dicts, with each `${…}` replaced.

    Args:
        raw: The recipe with its overrides.
        recipe: The name of the recipe, for messages.
        rename: Returns the form of a key that messages show.

    Raises:
        UserError: A value is still `???`, or a `${…}` has no value.
    """
    missing = [rename(key) for key in _unfilled(OmegaConf.to_container(raw, resolve=False))]
    if missing:
        raise UserError(
            f"{recipe or 'command line'}: missing: {', '.join(missing)} "
            f"(give {'them' if len(missing) > 1 else 'it'} as {' '.join(f'{key}=…' for key in missing)})"
        )
    try:
        return OmegaConf.to_container(raw, resolve=True)
    except OmegaConfBaseException as e:
        key = f"{rename(e.full_key)}: " if getattr(e, "full_key", None) else ""
        raise UserError(f"{recipe or 'command line'}: {key}{_first_line(e)}") from e


def where(recipe: str | Path | None, overrides: Collection[str]) -> Callable[[str], str]:
    """Returns a function that says where a key's value came from: the recipe's file, or the command line.

    Args:
        recipe: The name of the recipe.
        overrides: The dotted keys that the command line gave.
    """

    def origin(key: str) -> str:
        overridden = any(key == o or key.startswith(f"{o}.") or o.startswith(f"{key}.") for o in overrides)
        return "command line" if overridden or not recipe else str(recipe)

    return origin


def build(
    command: str,
    values: dict[str, Any],
    origin: Callable[[str], str] = lambda key: "settings",
    prefix: str = "",
) -> Any:
    """Merges values over the defaults of a command and returns its frozen config.

    Args:
        command: A key of schema.SETTINGS.
        values: Nested plain dicts.
        origin: Returns where a key came from, for messages.
        prefix: Written before each key in messages (a run's `sft.`).

    Returns:
        An instance of SETTINGS[command].

    Raises:
        UserError: A setting is unknown, missing or wrong.
    """
    cls = SETTINGS[command]

    def fail(key: str, sentence: str) -> NoReturn:
        raise UserError(f"{origin(prefix + key)}: {prefix}{key}: {sentence}")

    missing = [
        name for name, _, default, _ in own_fields(cls) if default is REQUIRED and values.get(name) is None
    ]
    unknown = _unknown(cls, values)
    if unknown:
        keys = list(leaves(cls)) + [name for name, *_ in own_fields(cls)]
        guess = nearest(unknown, keys)
        fail(
            unknown,
            f"unknown key; did you mean {prefix}{guess}?"
            if guess
            else f"unknown key; saferlhf-fast {command} --help lists them",
        )
    if missing:
        names = ", ".join(prefix + m for m in missing)
        raise UserError(
            f"{origin('')}: missing: {names} (give {'them' if len(missing) > 1 else 'it'} as "
            f"{' '.join(f'{prefix}{key}=…' for key in missing)} or in the recipe)"
        )
    merged = _merge(defaults(cls), values)
    odd_number = setting_errors.odd_number(cls, merged)
    if odd_number:
        fail(*odd_number)
    try:
        return TypeAdapter(cls).validate_python(merged)
    except ValidationError as e:
        fail(*setting_errors.most_precise(cls, merged, e.errors()))


def to_dict(cfg: object, hide: bool = True) -> Any:
    """Returns a config as nested plain dicts and lists, as config.yaml has it.

    Args:
        cfg: The config of a stage, or a group of its settings.
        hide: Leave passwords out (redact.py), as in everything that is written. False returns values that can
            be used.
    """

    def plain(value: object) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in in_order(type(value))}
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return redact.values(plain(cfg)) if hide else plain(cfg)


def _unfilled(value: Any, key: str = "") -> Iterator[str]:
    """Yields the dotted keys whose value in a recipe is ???."""
    if value == "???":
        yield key
    elif isinstance(value, (dict, list)):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unfilled(inner, f"{key}.{step}" if key else str(step))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested dicts: groups key by key, any other value is replaced. An empty group changes nothing."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(base.get(key), dict) and (value is None or isinstance(value, dict)):
            merged[key] = _merge(base[key], value or {})
        else:
            merged[key] = value
    return merged


def _unknown(cls: type, values: Mapping[str, Any], prefix: str = "") -> str | None:
    """Returns the first dotted key of values that the settings do not have; None when all are known."""
    annotations = {name: annotation for name, annotation, *_ in own_fields(cls)}
    for key, value in values.items():
        if key not in annotations:
            return f"{prefix}{key}"
        annotation = annotations[key]
        if is_group(annotation) and isinstance(value, dict):
            inner = _unknown(annotation, value, f"{prefix}{key}.")
            if inner:
                return inner
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
