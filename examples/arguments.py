"""What the examples share: arguments within bounds, and rows of JSON lines; each error is one line."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def number(
    kind: type[int] | type[float], least: float = -math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """The `type` of an argument that has to be a finite number of this kind within bounds.

    Args:
        kind: int or float.
        least: the lower bound, included.
        most: the upper bound, included.
    """

    def read(text: str) -> float:
        value: float
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or abs(value) == math.inf:
            expected = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"expected {expected} from {least:g} to {most:g}, got {text}")
        return value

    return read


def rows_of(path: str | Path, *names: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines.

    Args:
        path: the file.
        names: fields that each object has to have, with texts as values.

    Raises:
        ValueError: a line is no such object, or the file has none.
    """
    rows: list[dict[str, Any]] = []
    with open(path, encoding="utf-8") as file:
        for place, line in enumerate(file, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(
                    f"{path}: line {place}: expected a JSON object, got {line.strip()[:80]} ({error})"
                ) from error
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in names):
            raise ValueError(f"{path}: expected texts {', '.join(names)} in each line, got {str(row)[:80]}")
    if not rows:
        raise ValueError(f"{path}: expected a line or more with {', '.join(names)}, got none")
    return rows
