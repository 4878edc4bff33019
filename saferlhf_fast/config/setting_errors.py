"""Turns what is wrong with the value of a setting into one sentence on one key.

pydantic finds most of it; numbers that it would accept are found here.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from saferlhf_fast.config.schema import (
    LONG_FORMS,
    Annotation,
    describe,
    is_group,
    is_number,
    leaves,
    nearest,
    own_fields,
    show,
)

_LARGEST = (1 << 63) - 1

KeyPath = tuple[str | int, ...]
"""The steps to a setting in nested mappings and lists."""

Error = Any
"""One item of pydantic's ValidationError.errors(): a mapping with `type` and `loc`."""


def odd_number(cls: type, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Finds a number that cannot be used though pydantic accepts it.

    That is true for 1, infinity, not-a-number, and a whole number that does not fit in 64 bits.

    Args:
        cls: The settings class.
        values: Nested plain dicts; lists in them are searched too.

    Returns:
        (dotted key, sentence) of the first one; None when there is none.
    """
    for path, value in _plain_values(values):
        if (
            isinstance(value, bool)
            or isinstance(value, float)
            and not math.isfinite(value)
            or isinstance(value, int)
            and abs(value) > _LARGEST
        ):
            annotation = _type_at(cls, path)
            if is_number(annotation):
                return ".".join(map(str, path)), f"expected {describe(annotation)}, got {show(value)}"
    return None


def _plain_values(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yields (path, value) of everything in nested settings that is neither a mapping nor a list."""
    if isinstance(value, (dict, list)):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _plain_values(inner, (*path, step))
    else:
        yield path, value


def most_precise(cls: type, values: Mapping[str, Any], errors: Iterable[Error]) -> tuple[str, str]:
    """Returns (dotted key, sentence) of the most precise error; pydantic reports one per branch of a union.

    Args:
        cls: The settings class that the values were checked against.
        values: Nested plain dicts.
        errors: What pydantic's ValidationError.errors() returns.
    """

    def rank(error: Error) -> tuple[int, bool, bool]:
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
        assert is_group(group), "only a group of settings has keywords"
        guess = nearest(str(path[-1]), [*leaves(group), *(f.name for f in dataclasses.fields(group))])
        return key, "unknown key" + (f"; did you mean {guess}?" if guess else f"; expected {describe(group)}")
    if _is_missing(error):
        return key, "missing"
    return key, f"expected {describe(_type_at(cls, path))}, got {show(value)}"


def _is_missing(error: Error) -> bool:
    """Tells whether a key is missing. Of a list that is too short (a number ends its location) it is not."""
    return error["type"] == "missing" and isinstance(error["loc"][-1], str)


def _real_path(error: Error, values: Mapping[str, Any]) -> tuple[list[str | int], Any]:
    """Returns (path, value there) of an error: pydantic's location without the names of unions' branches."""
    path: list[str | int] = []
    value: Any = values
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


def _type_at(annotation: Annotation, path: Sequence[str | int]) -> Annotation:
    """Returns the annotation of the setting at a path.

    In lists and unions it follows the branch that has the step. Where a step is unknown, and inside of free
    mappings, it returns the annotation of what contains it.
    """
    for step in path:
        if is_group(annotation):
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
