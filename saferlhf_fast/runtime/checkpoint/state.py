"""State besides the trained models: trees of numbers, texts and tensors, and random generators.

Trees are written as JSON and safetensors.
"""

import base64
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

_TENSOR = "__tensor__"


def flatten(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Separates the tensors of a tree from what JSON can hold.

    Args:
        tree: Dicts and lists of numbers, texts, None and tensors.

    Returns:
        The tree with a name instead of each tensor, and the tensors by name.

    Raises:
        TypeError: The tree holds anything else.
    """
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = value
            return {_TENSOR: path}
        if isinstance(value, dict):
            return {
                str(key): walk(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [walk(inner, f"{path}.{i}") for i, inner in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(
            f"{path}: expected a number, a text or a tensor in a checkpoint's state, got "
            f"{type(value).__name__}"
        )

    return walk(tree, ""), tensors


def restore(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The tree that `flatten` was given; tuples have become lists.

    Args:
        tree: The tree with names instead of tensors.
        tensors: The tensors by name.
    """
    if isinstance(tree, dict):
        return (
            tensors[tree[_TENSOR]]
            if set(tree) == {_TENSOR}
            else {key: restore(v, tensors) for key, v in tree.items()}
        )
    return [restore(inner, tensors) for inner in tree] if isinstance(tree, list) else tree


def generators() -> dict[str, Any]:
    """States of this process's random number generators, as JSON can hold them.

    Returns:
        Those of Python and torch, of the GPU where there is one, and of numpy where it is loaded.
    """
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        states["numpy"] = [kind, keys.tolist(), position, has_gauss, cached]
    return states


def set_generators(states: Mapping[str, Any]) -> None:
    """Sets the random number generators to the states that `generators` returned."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(_bytes(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))
    if "numpy" in states:
        import numpy

        kind, keys, *position_and_gauss = states["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *position_and_gauss))


def _text(state_8: torch.Tensor) -> str:
    """Bytes, [count] of uint8, as base64."""
    return base64.b64encode(bytes(state_8.tolist())).decode()


def _bytes(text: str) -> torch.Tensor:
    """The bytes that `_text` encoded, [count] of uint8."""
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


class ResumableDict(dict[str, Any]):
    """A few values that a checkpoint keeps: numbers, texts, tensors, lists, dicts."""

    def state_dict(self) -> dict[str, Any]:
        """The values."""
        return dict(self)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes the values of a checkpoint; others stay."""
        self.update(values)
