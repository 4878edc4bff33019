"""Describes the settings: every key with its type in words, its default and its docstring.

Also finds the key that a wrong one most likely means, and writes `--help`. Reads the dataclasses of stages.py
and nothing else: no YAML, no command line. `--help` and error messages use the same words for a type.
"""

import dataclasses
import difflib
import json
import textwrap
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard, Union, get_args, get_origin, get_type_hints

from saferlhf_fast.config.sections import Constraint
from saferlhf_fast.config.setting_types import ScorerSpec, Source
from saferlhf_fast.config.stage_table import WITH_SETTINGS
from saferlhf_fast.config.stages import (
    STAGES,
    DemoConfig,
    JudgeCalibrationConfig,
    ModerationClassifyConfig,
    ModerationEvaluateConfig,
    ModerationServeConfig,
    RunConfig,
)

SETTINGS: dict[str, type] = {
    **STAGES,
    "run": RunConfig,
    "demo": DemoConfig,
    "moderation evaluate": ModerationEvaluateConfig,
    "moderation classify": ModerationClassifyConfig,
    "moderation serve": ModerationServeConfig,
    "evaluate judge-calibration": JudgeCalibrationConfig,
}
"""Every command that has settings, and their class."""

LONG_FORMS: dict[type, str] = {Source: "source", ScorerSpec: "scorer"}
"""Groups that a plain path is short for, and what messages call them."""

EXAMPLES: dict[type, str] = {
    Source: "a source, where data is more than a path, e.g. data='[{path: a.json, count: 100}, b.jsonl]':",
    ScorerSpec: "a scorer, where it is more than a path, e.g. cost='{kind: moderator, path: DIR}':",
    Constraint: "a constraint, e.g. constraints='[{name: harm, cost: DIR, multiplier: {threshold: -0.5}}]':",
}
"""Groups that are written inside a value, and how `--help` begins its list of their settings."""

REQUIRED: Any = object()
"""The default of a key that has none."""

Annotation = object
"""The type of a setting: a class, or one of typing's forms, which have no common type."""


class Leaf(NamedTuple):
    """One setting: its annotation, its default (REQUIRED when it has none), its docstring."""

    annotation: Annotation
    default: Any
    doc: str


def is_group(annotation: Annotation) -> TypeGuard[type]:
    """Tells whether an annotation is a settings class, so that the setting is a group of settings."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def in_order(cls: type) -> list[dataclasses.Field[Any]]:
    """Returns the fields of a settings class as people read them: its own before the inherited ones."""
    return sorted(dataclasses.fields(cls), key=lambda f: f.name not in vars(cls).get("__annotations__", {}))


def own_fields(cls: type) -> Iterator[tuple[str, Annotation, Any, str]]:
    """Yields (name, annotation, default, doc) of each field of a settings class; groups are not opened."""
    hints = get_type_hints(cls, include_extras=True)
    for f in in_order(cls):
        default = REQUIRED
        if f.default is not dataclasses.MISSING:
            default = f.default
        elif f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        yield f.name, _without_description(hints[f.name]), default, _doc(cls, f.name)


def _doc(cls: type, name: str) -> str:
    """Returns the docstring under a field; pydantic reads it only in the class that declares the field."""
    infos = (vars(c).get("__pydantic_fields__", {}).get(name) for c in cls.__mro__)
    return next((info.description for info in infos if info and info.description), "")


def _without_description(annotation: Annotation) -> Annotation:
    """Returns X for Annotated[X, Field(description=…)]; an annotation with limits stays as it is."""
    if get_origin(annotation) is not Annotated:
        return annotation
    kind, *infos = get_args(annotation)
    return annotation if any(info.metadata for info in infos) else kind


def leaves(cls: type, prefix: str = "", group: object = None) -> dict[str, Leaf]:
    """Returns {dotted key: Leaf} of a settings class and the groups in it.

    Args:
        cls: The settings class.
        prefix: Written before each key.
        group: An instance of cls whose values are the defaults; those of cls when it is not given, or
            REQUIRED: the group has no default, since one of its settings is required.
    """
    by_key: dict[str, Leaf] = {}
    for name, annotation, default, doc in own_fields(cls):
        default = default if group is None or group is REQUIRED else getattr(group, name)
        if is_group(annotation):
            by_key |= leaves(annotation, f"{prefix}{name}.", default)
        else:
            by_key[prefix + name] = Leaf(annotation, default, doc)
    return by_key


def defaults(cls: type) -> dict[str, Any]:
    """Returns the defaults of a settings class as nested plain dicts, without the required keys."""
    return {
        name: dataclasses.asdict(value) if is_group(type(value)) else value
        for name, _, value, _ in own_fields(cls)
        if value is not REQUIRED
    }


def describe(annotation: Annotation) -> str:
    """Returns in words what a setting takes, e.g. "whole number above 0 or null"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(args[0]) + _bounds(args[1:])
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        null = " or null" if type(None) in args else ""
        for group, word in LONG_FORMS.items():
            if group in args:
                several = ", or a list of these" if any(get_origin(a) is list for a in args) else ""
                return f"a path, or a {word} (path: …){several}{null}"
        words = " or ".join(describe(a) for a in args if a is not type(None))
        return words + (f",{null}" if null and ", " in words else null)
    if origin is list:
        return "a list, each " + describe(args[0])
    if origin is tuple:
        return f"a list of {len(args)}, each " + describe(args[0])
    if is_group(annotation):
        return "a group with " + ", ".join(f.name for f in dataclasses.fields(annotation))
    if annotation is dict or origin is dict:
        return "a mapping"
    words_of: dict[object, str] = {
        int: "whole number",
        float: "number",
        bool: "true or false",
        str: "text",
    }
    return words_of[annotation]


def _bounds(metadata: Iterable[Any]) -> str:
    """Returns in words the limits in pydantic's Field(gt=…, ge=…, lt=…, le=…)."""
    limits = {
        type(m).__name__: next(iter(dataclasses.asdict(m).values()))
        for info in metadata
        for m in info.metadata
    }
    words = {"Gt": "above {}", "Ge": "at least {}", "Lt": "below {}", "Le": "at most {}"}
    bounds = [words[name].format(limit) for name, limit in limits.items()]
    return " " + " and ".join(bounds) if bounds else ""


def groups_within(annotation: Annotation) -> set[type]:
    """Returns the settings classes that a value of a type may contain.

    Data contains Source; a list of Constraint contains Constraint and the classes of its fields.
    """
    if is_group(annotation):
        return {annotation}.union(*(groups_within(a) for _, a, *_ in own_fields(annotation)))
    return set().union(*(groups_within(a) for a in get_args(annotation)))


def takes(annotation: Annotation) -> str:
    """Returns how many words a flag takes: "switch" (none needed), "list" (several), "value" (one)."""
    if annotation is bool:
        return "switch"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (list, tuple):
        return "list"
    if origin in (Union, types.UnionType) and any(takes(a) == "list" for a in args):
        return "list"
    return "value"


def is_text(annotation: Annotation) -> bool:
    """Tells whether a setting may be text (or null, or a path among other forms), so that 2026 is "2026"."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return any(is_text(a) for a in get_args(annotation))
    return annotation is str


def is_number(annotation: Annotation) -> bool:
    """Tells whether a setting takes a number; limits and null do not matter."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return any(is_number(a) for a in get_args(annotation))
    return annotation in (int, float)


def nearest(key: str, known: Collection[str]) -> str | None:
    """Returns the known key that a wrong one most likely means; None where none is near.

    It is a key with the same last word in another group, or one that differs by a typing error.
    """
    last = key.rsplit(".", 1)[-1]
    same = [k for k in known if k.rsplit(".", 1)[-1] == last]
    if same:
        return difflib.get_close_matches(key, same, n=1, cutoff=0)[0]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(list(known))}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return by_last[close[0]] if close else None


def show(value: object) -> str:
    """Returns a value as a recipe writes it, shortened to 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # Python writes integers of up to 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "…"


# --- help ---

PLACES = """Settings come from the defaults below, the recipe (YAML) and the command line; later ones win.
`key=value`, `--key value` and `--key=value` mean the same; values are YAML: null, true, 1e-5, [a, b].
A recipe may write `${root}` for the value of its key `root`, and `???` where a value must be given.
In a recipe `train.max_steps: 3` means the same as `train: {max_steps: 3}`."""


def help_text(command: str) -> str:
    """Returns the `--help` of a command that has settings: every key with its type, default and meaning."""
    cls = SETTINGS[command]
    recipe = "recipe.yaml" if command == "run" else "[recipe.yaml]"
    written = "moderation train" if command == "moderation" else command
    lines = [f"usage: saferlhf-fast {written} {recipe} [key=value …] [--key value …] [--debug]", ""]
    lines += _wrap(cls.__doc__ or "", "") + ["", *PLACES.splitlines(), "", "examples:"]
    lines += [f"  saferlhf-fast {example}" for example in WITH_SETTINGS[command].examples]
    groups = []
    lines += ["", "settings:"]
    for name, annotation, default, doc in own_fields(cls):
        if is_group(annotation):
            groups.append((name, annotation, default))
        else:
            lines += _entry(name, Leaf(annotation, default, doc))
    for name, annotation, default in groups:
        lines += ["", f"{name}: {(annotation.__doc__ or '').strip()}"]
        for key, leaf in leaves(annotation, f"{name}.", default).items():
            lines += _entry(key, leaf)
    within = {group for leaf in leaves(cls).values() for group in groups_within(leaf.annotation)}
    for group, heading in EXAMPLES.items():
        if group in within:
            lines += ["", heading]
            for key, leaf in leaves(group).items():
                lines += _entry(key, leaf)
    return "\n".join(lines)


def _entry(key: str, leaf: Leaf) -> list[str]:
    default = "required" if leaf.default is REQUIRED else f"default: {show(leaf.default)}"
    return [f"  {key}  ({describe(leaf.annotation)}; {default})", *_wrap(leaf.doc, "      ")]


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 116, initial_indent=indent, subsequent_indent=indent)
