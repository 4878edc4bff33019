"""What the tests of the integrations share: random batches, and how near our version has to be to a library's
own.

Run in an environment of the library's own (`make test-integrations`): torch and pytest are all that may be
imported here.
"""

import copy
import importlib.util
import runpy
import sys
from pathlib import Path

import torch

stub = runpy.run_path(str(Path(__file__).resolve().parents[2] / "bench" / "stubs.py"))["stub"]

BATCHES = 50
# What another test of this process, one of several ranks, may have left in the environment; a child would
# believe it.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a result in this dtype may be off by, relative and absolute: the library's own rounding, not ours.
ROUNDING = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2**-5, 2**-5),
    torch.float16: (2**-9, 2**-9),
}


def near(got, expected, message=""):
    """Within the rounding of the narrower of the two dtypes; gradients are measured on their largest
    entry.
    """
    kinds = [tensor.dtype for tensor in (got, expected) if tensor.dtype in ROUNDING]
    relative, absolute = max(ROUNDING[kind] for kind in kinds) if kinds else (0, 0)
    scale = max(1.0, float(expected.detach().double().abs().nan_to_num().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        got.detach().double(),
        expected.detach().double(),
        rtol=relative,
        atol=absolute * scale,
        equal_nan=True,
        msg=lambda text: f"{message}: {text}",
    )


def not_worse(got, theirs, exact, message=""):
    """No further from the exact result than theirs, but for float32's rounding."""
    error, other = ((tensor.detach().double() - exact.detach().double()).abs() for tensor in (got, theirs))
    scale = float(exact.detach().double().abs().max().clamp(min=1.0)) if exact.numel() else 1.0
    if error.numel():
        assert float(error.max()) <= float(other.max()) + 2e-5 * scale, (
            f"{message}: {float(error.max())} > {float(other.max())}"
        )


def gradients(outputs, inputs, seed=0):
    """Gradients of a random combination of the outputs that have one."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [tensor for tensor in outputs if tensor is not None and tensor.requires_grad]
    upstream = [
        torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        for tensor in outputs
    ]
    return torch.autograd.grad(outputs, inputs, upstream)


def leaf(tensor):
    """A copy that gradients go to."""
    return tensor.detach().clone().requires_grad_()


def pristine(module):
    """A second copy of a module, which no patch reaches: its functions call one another, not ours."""
    spec = importlib.util.spec_from_file_location(module.__name__ + "_pristine", module.__file__)
    copied = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copied  # while it is made: dataclasses look there
    try:
        spec.loader.exec_module(copied)
    finally:
        del sys.modules[spec.name]
    return copied


class Batches:
    """Random shapes and numbers; each batch has its own seed, named in messages."""

    def __init__(self, count=BATCHES):
        self.count = count

    def __iter__(self):
        for seed in range(self.count):
            yield Batch(seed)


class Batch:
    """Random draws from one seed."""

    def __init__(self, seed):
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def __str__(self):
        return f"batch {self.seed}"

    def whole(self, low, high):
        """An integer in low … high."""
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))

    def pick(self, *values):
        """One of the values."""
        return values[self.whole(0, len(values) - 1)]

    def normal(self, *shape, dtype=torch.float32, scale=1.0):
        """Normal numbers."""
        return (torch.randn(*shape, generator=self.generator) * scale).to(dtype)

    def ids(self, vocabulary, *shape):
        """Token ids."""
        return torch.randint(vocabulary, shape, generator=self.generator)

    def rows(self, count, width, at_least=1):
        """A boolean mask [count, width]: each row begins and ends somewhere; at_least tokens in each."""
        mask = torch.zeros(count, width, dtype=torch.bool)
        for row in mask:
            length = self.whole(at_least, width)
            start = self.whole(0, width - length)
            row[start : start + length] = True
        return mask

    def holes(self, mask):
        """A mask with some tokens taken out again, at least one of each row kept."""
        kept = mask & (torch.rand(mask.shape, generator=self.generator) < 0.7)
        return torch.where(kept.any(-1, keepdim=True), kept, mask)


def snapshot(*modules):
    """{(module, name): object} of the modules' functions and classes, and of classes' own attributes, to
    compare later.
    """
    taken = {}
    for module in modules:
        for name, value in vars(module).items():
            taken[module.__name__, name] = value
            if isinstance(value, type):
                taken.update(
                    {
                        (module.__name__, name, key): held
                        for key, held in vars(value).items()
                        if callable(held)
                    }
                )
            elif isinstance(value, dict) and name.isupper():
                taken[module.__name__, name] = copy.copy(value)
                taken.update(
                    {(module.__name__, name, key): held for key, held in value.items() if callable(held)}
                )
    return taken


def same(before, after):
    """Every object is the very one of before."""
    changed = [key for key, value in before.items() if callable(value) and after.get(key) is not value]
    assert not changed, f"not restored: {changed}"
