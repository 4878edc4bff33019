"""What the settings say about themselves: every key with its type in words, default and docstring; nearest
keys; help.

Reads the dataclasses of stages.py; knows nothing of YAML or of the command line's words. The same words for a
type are used by `--help` and by error messages.
"""

import dataclasses
import difflib
import json
import textwrap
import types
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from saferlhf_fast.config.sections import Constraint, ScorerSpec, Source
from saferlhf_fast.config.stage_table import WITH_SETTINGS
from saferlhf_fast.config.stages import STAGES, DemoConfig, RunConfig

SETTINGS = {**STAGES, "run": RunConfig, "demo": DemoConfig}
"""Every command that has settings, and their class."""

LONG_FORMS = {Source: "source", ScorerSpec: "scorer"}
"""Groups that a plain path is short for, and what messages call them."""

EXAMPLES = {
    Source: "a source, where data is more than a path, e.g. data='[{path: a.json, count: 100}, b.jsonl]':",
    ScorerSpec: "a scorer, where it is more than a path, e.g. reward='{kind: score_model, path: DIR}':",
    Constraint: "a constraint, e.g. constraints='[{name: harm, cost: DIR, multiplier: {threshold: -0.5}}]':",
}
"""Groups that are written inside a value, and how `--help` begins its list of their settings."""

REQUIRED = object()
"""The default of a key that has none."""


class Leaf(NamedTuple):
    """One setting: its annotation, its default (REQUIRED when it has none), its docstring."""

    annotation: Any
    default: Any
    doc: str


def in_order(cls):
    """The fields of a settings class as people read them: its own first, then those that it shares with
    others.
    """
    return sorted(dataclasses.fields(cls), key=lambda f: f.name not in vars(cls).get("__annotations__", {}))


def own_fields(cls):
    """Yields (name, annotation, default, doc) of a settings class; groups are not opened."""
    hints = get_type_hints(cls, include_extras=True)
    for f in in_order(cls):
        default = REQUIRED
        if f.default is not dataclasses.MISSING:
            default = f.default
        elif f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        yield f.name, _without_description(hints[f.name]), default, _doc(cls, f.name)


def _doc(cls, name):
    """The docstring under a field, which pydantic reads in the class that declares it alone."""
    known = (
        c.__pydantic_fields__[name].description
        for c in cls.__mro__
        if name in vars(c).get("__pydantic_fields__", {})
    )
    return next((doc for doc in known if doc), "")


def _without_description(annotation):
    """Annotated[X, Field(description=…)] is X; limits stay."""
    if get_origin(annotation) is not Annotated:
        return annotation
    kind, *infos = get_args(annotation)
    return annotation if any(info.metadata for info in infos) else kind


def leaves(cls, prefix="", group=None):
    """Returns {dotted key: Leaf} of a settings class; `group`: an instance whose values are the defaults."""
    found = {}
    for name, annotation, default, doc in own_fields(cls):
        default = default if group is None else getattr(group, name)
        if dataclasses.is_dataclass(annotation):
            found |= leaves(annotation, f"{prefix}{name}.", default)
        else:
            found[prefix + name] = Leaf(annotation, default, doc)
    return found


def defaults(cls):
    """Returns the defaults of a settings class as nested plain dicts, without the required keys."""
    return {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, _, value, _ in own_fields(cls)
        if value is not REQUIRED
    }


def describe(annotation):
    """Says in words what a setting takes, e.g. "whole number above 0 or null"."""
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
    if dataclasses.is_dataclass(annotation):
        return "a group with " + ", ".join(f.name for f in dataclasses.fields(annotation))
    if annotation is dict or origin is dict:
        return "a mapping"
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}[annotation]


def _bounds(metadata):
    """Says the limits in pydantic's Field(gt=…, ge=…, lt=…, le=…) in words."""
    limits = {
        type(m).__name__: next(iter(dataclasses.asdict(m).values()))
        for info in metadata
        for m in info.metadata
    }
    words = {"Gt": "above {}", "Ge": "at least {}", "Lt": "below {}", "Le": "at most {}"}
    said = [words[name].format(limit) for name, limit in limits.items()]
    return " " + " and ".join(said) if said else ""


def groups_within(annotation):
    """The settings classes that a value of a type may hold: Source in Data, Constraint and what it holds in a
    list of them.
    """
    found = {annotation} if dataclasses.is_dataclass(annotation) else set()
    inner = [a for _, a, *_ in own_fields(annotation)] if found else get_args(annotation)
    return found.union(*(groups_within(a) for a in inner))


def takes(annotation):
    """Says how many words a flag takes: "switch" (none needed), "list" (several), "value" (one)."""
    if annotation is bool:
        return "switch"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (list, tuple):
        return "list"
    if origin in (Union, types.UnionType) and any(takes(a) == "list" for a in args):
        return "list"
    return "value"


def is_text(annotation):
    """Tells whether a setting is text (or null, or a path among other forms), so that 2026 means "2026"."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return any(is_text(a) for a in get_args(annotation))
    return annotation is str


def is_number(annotation):
    """Tells whether a setting takes a number, limits and null aside."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return any(is_number(a) for a in get_args(annotation))
    return annotation in (int, float)


def nearest(key, known):
    """Returns the known key that a wrong one most likely means: the same last word in another group, or a
    typo.
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


def show(value):
    """Writes a value as a recipe would, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "…"


# --- help
# ---------------------------------------------------------------------------------------------------------

PLACES = """Settings come from three places, the later winning: the defaults below, the recipe (YAML), the command line.
`key=value`, `--key value` and `--key=value` mean the same; values are YAML: null, true, 1e-5, [a, b].
A recipe may say `${root}` for the value of its key `root`, and `???` where a value must be given."""


def help_text(command):
    """Returns the whole `--help` of a command that has settings: every key with its type, default and
    meaning.
    """
    cls = SETTINGS[command]
    recipe = "recipe.yaml" if command == "run" else "[recipe.yaml]"
    lines = [f"usage: saferlhf-fast {command} {recipe} [key=value …] [--key value …] [--debug]", ""]
    lines += _wrap(cls.__doc__.strip(), "") + ["", *PLACES.splitlines(), "", "examples:"]
    lines += [f"  saferlhf-fast {example}" for example in WITH_SETTINGS[command].examples]
    groups = []
    lines += ["", "settings:"]
    for name, annotation, default, doc in own_fields(cls):
        if dataclasses.is_dataclass(annotation):
            groups.append((name, annotation, default))
        else:
            lines += _entry(name, Leaf(annotation, default, doc))
    for name, annotation, default in groups:
        lines += ["", f"{name}: {annotation.__doc__.strip()}"]
        for key, leaf in leaves(annotation, f"{name}.", default).items():
            lines += _entry(key, leaf)
    within = set().union(*(groups_within(leaf.annotation) for leaf in leaves(cls).values()))
    for group, beginning in EXAMPLES.items():
        if group in within:
            lines += ["", beginning]
            for key, leaf in leaves(group).items():
                lines += _entry(key, leaf)
    return "\n".join(lines)


def _entry(key, leaf):
    default = "required" if leaf.default is REQUIRED else f"default: {show(leaf.default)}"
    return [f"  {key}  ({describe(leaf.annotation)}; {default})", *_wrap(leaf.doc, "      ")]


def _wrap(text, indent):
    return textwrap.wrap(" ".join(text.split()), 116, initial_indent=indent, subsequent_indent=indent)
