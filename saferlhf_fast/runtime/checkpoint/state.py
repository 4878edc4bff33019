"""State that is not a trained model's: trees of numbers, texts and tensors as JSON and safetensors, and
random generators.
"""

import base64
import random
import sys

import torch

_TENSOR = "__tensor__"


def flatten(tree):
    """A tree of dicts and lists with numbers, texts, None and tensors -> (the same with names for tensors,
    {name: tensor}).
    """
    tensors = {}

    def walk(value, path):
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


def restore(tree, tensors):
    """What `flatten` was given (tuples have become lists)."""
    if isinstance(tree, dict):
        return (
            tensors[tree[_TENSOR]]
            if set(tree) == {_TENSOR}
            else {key: restore(v, tensors) for key, v in tree.items()}
        )
    return [restore(inner, tensors) for inner in tree] if isinstance(tree, list) else tree


def generators():
    """States of this process's random number generators: Python's, torch's, the GPU's, numpy's where it is
    loaded.
    """
    version, numbers, gauss = random.getstate()
    found = {"python": [version, list(numbers), gauss], "torch": _text(torch.get_rng_state())}
    if torch.cuda.is_available():
        found["cuda"] = _text(torch.cuda.get_rng_state())
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        found["numpy"] = [kind, keys.tolist(), position, has_gauss, cached]
    return found


def set_generators(found):
    """Puts the generators back to what `generators` saw."""
    version, numbers, gauss = found["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(_bytes(found["torch"]))
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(found["cuda"]))
    if "numpy" in found:
        import numpy

        kind, keys, *rest = found["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))


def _text(state_8):
    return base64.b64encode(bytes(state_8.tolist())).decode()


def _bytes(text):
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
