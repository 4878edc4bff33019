"""Numbers that YAML 1.1 reads otherwise than people write them: 010 is 8 there, and 1:30 is 90."""

from collections.abc import Iterator

import yaml

_INTEGER, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


def misread(text: str) -> str | None:
    """Returns a sentence about the first number of a YAML text that means something else; None for none.

    Args:
        text: YAML that can be read.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, number in _numbers(node) if node is not None else ():
        digits = number.value.lstrip("+-").replace("_", "")
        is_octal = number.tag == _INTEGER and digits.isdecimal() and digits[0] == "0" and digits.strip("0")
        if is_octal or ":" in digits:
            value = yaml.safe_load(number.value)
            hint = "leave out the zeros in front" if is_octal else "quote it where it is a text"
            return (
                f"{key}: expected a number in decimal digits, got {number.value}, which is {value} in YAML; "
                f"{hint}"
            )
    return None


def _numbers(node: yaml.Node, place: str = "") -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Yields (dotted key, number) of the numbers in a node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _numbers(value, f"{place}.{key.value}" if place else str(key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _numbers(value, f"{place}.{i}" if place else str(i))
    elif isinstance(node, yaml.ScalarNode) and node.tag in (_INTEGER, _FLOAT):
        yield place, node
