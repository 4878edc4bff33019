"""What the examples share: arguments within bounds, and rows of JSON lines, each refused in one line."""

import argparse
import json
import math


def number(kind, least=-math.inf, most=math.inf):
    """What reads an argument that has to be a number of this kind within bounds."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or abs(value) == math.inf:
            wanted = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"expected {wanted} from {least:g} to {most:g}, got {text}")
        return value

    return read


def rows_of(path, *names):
    """The objects of a file of JSON lines; ValueError for one without texts of these names, and for a file
    without any.
    """
    rows = []
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
