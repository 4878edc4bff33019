"""From defaults, recipe and overrides to a typed config: defaults ← YAML ← key=value, then validation.

OmegaConf reads YAML and resolves `${root}` and `???`; pydantic checks; this file merges and turns every error
into one UserError line that names the file (or the command line), the key, what was expected and what came.
No torch.
"""

import dataclasses
import math
from pathlib import Path
from typing import get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from saferlhf_fast.config import redact
from saferlhf_fast.config.schema import (
    LONG_FORMS,
    REQUIRED,
    SETTINGS,
    defaults,
    describe,
    in_order,
    is_number,
    is_text,
    leaves,
    nearest,
    own_fields,
    show,
)
from saferlhf_fast.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"


def load(command, recipe=None, overrides=None):
    """Returns the frozen config of a stage (or demo).

    recipe: path of a YAML file, or the name of a shipped recipe; overrides: {dotted key: value}, a text value
    being read as YAML. A recipe may have `root`, which only serves `${root}`, and `stage`, which must be the
    command.
    """
    overrides = overrides or {}
    raw = read_recipe(recipe) if recipe else OmegaConf.create({})
    if "stages" in raw:
        raise UserError(f"{recipe}: has several stages; start it with: saferlhf-fast run {recipe}")
    known = leaves(SETTINGS[command])
    apply(raw, overrides, known, recipe)
    values = resolve(raw, recipe)
    if "root" not in known:
        values.pop("root", None)
    stage = values.pop("stage", command)  # the config.yaml of a run folder is a recipe too
    if stage != command:
        raise UserError(f"{recipe}: stage: is of the stage {stage}, not {command}")
    return build(command, values, where(recipe, overrides))


def read_recipe(recipe):
    """Returns a recipe as an OmegaConf mapping, nothing resolved yet."""
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
    except AssertionError:  # what it says of a lone number
        raw = None
    # OmegaConf reads `abc` as {abc: null}
    if not isinstance(raw, DictConfig) or (text.strip() and ":" not in text):
        raise UserError(f"{recipe}: expected a mapping of keys to values, got {show(text.strip())}")
    return raw


def apply(raw, overrides, known, recipe=None):
    """Writes overrides into a recipe; `known` ({key: Leaf}) tells which are text."""
    for key, value in overrides.items():
        annotation = known[key].annotation if key in known else None
        try:
            OmegaConf.update(raw, key, parse(value, annotation, key), merge=False, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError, IndexError) as e:
            if isinstance(e, UserError):
                raise
            at = recipe or "the settings"
            raise UserError(f"command line: {key}: cannot be set in {at}: {_first_line(e)}") from e


def parse(value, annotation=None, key="value"):
    """Reads a value of the command line as YAML; text settings keep what looks like a number as text."""
    if isinstance(value, list):
        return [parse(v, None, key) for v in value]
    if not isinstance(value, str):
        return value
    if value in ("", "None"):
        return None
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(f"x: {value}"), resolve=False)["x"]
    except (yaml.YAMLError, OmegaConfBaseException) as e:
        if annotation is not None and is_text(annotation):
            return value  # a path may hold any character
        raise UserError(f"command line: {key}: {show(value)} is not YAML (quote it?)") from e
    if get_origin(annotation) is list and parsed is not None and not isinstance(parsed, list):
        return [parsed]  # --seeds 0, log.trackers=wandb
    plain_text = is_text(annotation) and isinstance(parsed, (str, bool, int, float)) and value[0] not in "'\""
    return value if plain_text else parsed


def resolve(raw, recipe=None, rename=str):
    """Returns the plain nested dict of a recipe: `???` filled, `${…}` replaced. rename: how messages write a
    key.
    """
    missing = [rename(key) for key in _unfilled(OmegaConf.to_container(raw, resolve=False))]
    if missing:
        raise UserError(
            f"{recipe or 'command line'}: missing: {', '.join(missing)} "
            f"(give {'them' if len(missing) > 1 else 'it'} as {missing[0]}=…)"
        )
    try:
        return OmegaConf.to_container(raw, resolve=True)
    except OmegaConfBaseException as e:
        key = f"{rename(e.full_key)}: " if getattr(e, "full_key", None) else ""
        raise UserError(f"{recipe or 'command line'}: {key}{_first_line(e)}") from e


def where(recipe, overrides):
    """Returns a function that says where a key's value came from: the recipe's file, or the command line."""

    def origin(key):
        given = any(key == o or key.startswith(f"{o}.") or o.startswith(f"{key}.") for o in overrides)
        return "command line" if given or not recipe else str(recipe)

    return origin


def build(command, values, origin=lambda key: "settings", prefix=""):
    """Merges values over the defaults of a command and returns its frozen config.

    origin: says where a key came from; prefix: what to write before each key (a run's `sft.`).
    """
    cls = SETTINGS[command]

    def fail(key, sentence):
        raise UserError(f"{origin(prefix + key)}: {prefix}{key}: {sentence}")

    missing = [
        name for name, _, default, _ in own_fields(cls) if default is REQUIRED and values.get(name) is None
    ]
    unknown = _unknown(cls, values)
    if unknown:
        known = list(leaves(cls)) + [name for name, *_ in own_fields(cls)]
        guess = nearest(unknown, known)
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
            f"{prefix}{missing[0]}=… or in the recipe)"
        )
    merged = _merge(defaults(cls), values)
    _refuse_odd_numbers(cls, merged, fail)
    try:
        return TypeAdapter(cls).validate_python(merged)
    except ValidationError as e:
        fail(*_sentence(cls, merged, e.errors()))


def to_dict(cfg, hide=True):
    """Returns a config as nested plain dicts and lists, as written to config.yaml.

    hide: without passwords (redact.py), as everything that is written; False for what is to be used.
    """

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in in_order(type(value))}
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return redact.values(plain(cfg)) if hide else plain(cfg)


# --- inside
# -------------------------------------------------------------------------------------------------------


def _unfilled(value, key=""):
    """Yields the dotted keys that a recipe marks with ???."""
    if value == "???":
        yield key
    elif isinstance(value, (dict, list)):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unfilled(inner, f"{key}.{step}" if key else str(step))


def _merge(base, over):
    """Merges nested dicts; what is no group in the defaults is replaced whole; an empty group changes
    nothing.
    """
    merged = dict(base)
    for key, value in over.items():
        if isinstance(base.get(key), dict) and (value is None or isinstance(value, dict)):
            merged[key] = _merge(base[key], value or {})
        else:
            merged[key] = value
    return merged


def _unknown(cls, values, prefix=""):
    """Returns the first key of values that the settings do not have, dotted; None when all are known."""
    groups = {name: annotation for name, annotation, *_ in own_fields(cls)}
    for key, value in values.items():
        if key not in groups:
            return f"{prefix}{key}"
        if dataclasses.is_dataclass(groups[key]) and isinstance(value, dict):
            inner = _unknown(groups[key], value, f"{prefix}{key}.")
            if inner:
                return inner
    return None


def _refuse_odd_numbers(cls, values, fail):
    """Refuses what pydantic would let through: true as 1, and numbers that are not finite; inside of lists
    too.
    """
    for path, value in _plain_values(values):
        if isinstance(value, bool) or isinstance(value, float) and not math.isfinite(value):
            annotation = _type_at(cls, path)
            if is_number(annotation):
                fail(".".join(map(str, path)), f"expected {describe(annotation)}, got {show(value)}")


def _plain_values(value, path=()):
    """Yields (path, value) of everything in nested settings that is neither a mapping nor a list."""
    if isinstance(value, (dict, list)):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _plain_values(inner, (*path, step))
    else:
        yield path, value


def _sentence(cls, values, errors):
    """Picks the error that says most (pydantic reports one per branch of a union) and returns (key,
    sentence).
    """

    def rank(error):
        return (
            len(_real_path(error, values)[0]),
            error["type"] == "unexpected_keyword_argument",
            _is_missing(error),
        )

    error = max(errors, key=rank)
    path, value = _real_path(error, values)
    key = ".".join(str(step) for step in path)
    if error["type"] == "unexpected_keyword_argument":
        group = _type_at(cls, path[:-1])
        group = next((long for long in LONG_FORMS if long in get_args(group)), group)
        guess = nearest(str(path[-1]), [*leaves(group), *(f.name for f in dataclasses.fields(group))])
        return key, "unknown key" + (f"; did you mean {guess}?" if guess else f"; expected {describe(group)}")
    if _is_missing(error):
        return key, "missing"
    return key, f"expected {describe(_type_at(cls, path))}, got {show(value)}"


def _is_missing(error):
    """A missing key; a list that is too short (its location ends in a number) is a wrong value instead."""
    return error["type"] == "missing" and isinstance(error["loc"][-1], str)


def _real_path(error, values):
    """Drops from pydantic's location what names a branch of a union; returns (path, the value there)."""
    path, value = [], values
    for step in error["loc"]:
        if (
            isinstance(value, dict)
            and step in value
            or isinstance(value, list)
            and isinstance(step, int)
            and step < len(value)
        ):
            path, value = path + [step], value[step]
    return (path + [error["loc"][-1]], None) if _is_missing(error) else (path, value)


def _type_at(annotation, path):
    """Returns the annotation of the setting at a path; through lists and unions to the branch that fits the
    step. Where a step is unknown, and inside of free mappings, the annotation of what holds it.
    """
    for step in path:
        if dataclasses.is_dataclass(annotation):
            inner = {name: a for name, a, *_ in own_fields(annotation)}
            if step not in inner:
                break
            annotation = inner[step]
            continue
        branches = get_args(annotation)
        mappings = [a for a in (annotation, *branches) if get_origin(a) is dict]
        if mappings:
            annotation = get_args(mappings[0])[1]
            continue
        lists = [a for a in (annotation, *branches) if get_origin(a) is list]
        if isinstance(step, int) and (lists or get_origin(annotation) is tuple):
            annotation = get_args(lists[0])[0] if lists else branches[step]
        else:
            group = next((long for long in LONG_FORMS if long in branches), None)
            if group is None:
                break
            annotation = _type_at(group, [step])
    return annotation


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
