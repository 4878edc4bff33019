"""Where a function of another library is bound, and putting another in its place: found by identity, restored
one by one.

`from x import f` binds f once more in every importing module, so a patch of the defining module alone changes
only part of a library. Every module in sys.modules is looked through for the very object, and each place is
remembered.
"""

import functools
import hashlib
import inspect
import sys
import textwrap
from collections import Counter
from typing import NamedTuple

CALLS = Counter()  # {target: calls of our version since it was put in place}


class Site(NamedTuple):
    """One binding: `holder[key]` of a dict, or attribute `key` of a module or class. label: for people."""

    holder: object
    key: object
    label: str

    @property
    def value(self):
        """What is bound there now, or None."""
        names = self.holder if isinstance(self.holder, dict) else vars(self.holder)
        return names.get(self.key)

    def bind(self, value):
        """Binds `value` there."""
        if isinstance(self.holder, dict):
            self.holder[self.key] = value
        else:
            setattr(self.holder, self.key, value)


def resolve(target):
    """ "package.module:Class.name" -> (holder, name). ImportError or AttributeError when it is not there.

    The module must have been imported already.
    """
    module, _, path = target.partition(":")
    *outer, name = path.split(".")
    holder = sys.modules[module]
    for part in outer:
        holder = getattr(holder, part)
    if name not in vars(holder):
        raise AttributeError(f"{module} has no {path} of its own")
    return holder, name


def bindings(value):
    """Every Site at which a loaded module binds this very object."""
    found = []
    for name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):  # whatever a program has put into sys.modules
            continue
        found += [Site(module, key, f"{name}.{key}") for key, held in dict(names).items() if held is value]
    return found


def counted(target, function, original):
    """`function`, looking like `original` to whoever inspects it, with its calls counted in CALLS[target].

    Under torch.compile a call is counted when it is traced, not when the compiled code runs.
    """
    count = counting(target)

    @functools.wraps(uncompiled(original))
    def replacement(*args, **kwargs):
        count()
        return function(*args, **kwargs)

    replacement.__saferlhf_fast__ = target
    return replacement


def uncompiled(function):
    """The function inside torch.compile's or torch.compiler.disable's wrapper; any other is given back.

    Their wrappers carry attributes by which torch.compile finds the function inside; a copy of them on ours
    would send compiled callers there, past ours.
    """
    while hasattr(function, "_torchdynamo_orig_callable"):
        function = function._torchdynamo_orig_callable
    return function


def counting(target):
    """A function that adds one call to CALLS[target]."""

    def add():
        CALLS[target] += 1

    import torch

    return torch.compiler.assume_constant_result(add)


def parameters(function):
    """A function's parameters and defaults as text, without annotations: "(logits, index, temperature=1.0)"."""
    signature = inspect.signature(function)
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def digest(function):
    """The first 12 hexadecimal digits of the SHA-256 of a function's source text, without its indentation."""
    source = textwrap.dedent(inspect.getsource(function))
    return hashlib.sha256(source.encode()).hexdigest()[:12]
