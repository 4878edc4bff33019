"""Finds the places where a function of another library is bound, and binds another function there.

`from x import f` binds f once more in every importing module, so a patch of the defining module alone changes
only part of a library. Every module in sys.modules is searched for the same object (by identity), and each
place is remembered, so that it can be restored.
"""

import functools
import hashlib
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

CALLS: Counter[str] = Counter()  # {target: calls of our implementation since it was put in place}


class Site(NamedTuple):
    """One binding: `holder[key]` of a dict, or attribute `key` of a module or class.

    Attributes:
        holder: The dict, module or class.
        key: Its key, or the attribute's name.
        label: How reports name the place.
    """

    holder: object
    key: Any
    label: str

    @property
    def value(self) -> Any:
        """What is bound there now, or None."""
        names: dict[Any, Any] = self.holder if isinstance(self.holder, dict) else vars(self.holder)
        return names.get(self.key)

    def bind(self, value: object) -> None:
        """Binds `value` there."""
        if isinstance(self.holder, dict):
            self.holder[self.key] = value
        else:
            setattr(self.holder, self.key, value)


def resolve(target: str) -> tuple[object, str]:
    """The object that holds a target, and the name under which it holds it.

    Args:
        target: "package.module:name" or "package.module:Class.name"; the module must have been imported
            already.

    Returns:
        The module or class, and the last part of the name.

    Raises:
        AttributeError: The module has no such name of its own.
    """
    module, _, path = target.partition(":")
    *outer, name = path.split(".")
    holder: object = sys.modules[module]
    for attribute in outer:
        holder = getattr(holder, attribute)
    if name not in vars(holder):
        raise AttributeError(f"{module} has no {path} of its own")
    return holder, name


def bindings(value: object) -> list[Site]:
    """Every Site at which a loaded module binds this very object."""
    sites = []
    for name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):  # a program may put any object into sys.modules
            continue
        sites += [Site(module, key, f"{name}.{key}") for key, bound in dict(names).items() if bound is value]
    return sites


def counted(target: str, function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its calls counted; whoever inspects it sees the original's name and signature.

    Under torch.compile a call is counted when it is traced, not when the compiled code runs.

    Args:
        target: The key in CALLS.
        function: Our implementation.
        original: The library's function, which may be compiled.

    Returns:
        The function to bind in the original's place.
    """
    count = counting(target)

    @functools.wraps(uncompiled(original))
    def replacement(*args: Any, **kwargs: Any) -> Any:
        count()
        return function(*args, **kwargs)

    vars(replacement)["__saferlhf_fast__"] = target
    return replacement


def in_dtype_of(
    names: tuple[str, ...],
    function: Callable[..., Any],
    original: Callable[..., Any],
    metrics: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """`function` with its floating-point results in the dtype that the library's own function gives them.

    Args:
        names: Parameters whose tensors decide the dtype. Of several the widest one counts; tensors without
            dimensions do not, as in torch's own type promotion.
        function: Our implementation.
        original: The library's function, whose signature has the names.
        metrics: Places in a tuple of results that stay as they are.

    Returns:
        The function; results that are not tensors, not floating-point or not in a tuple stay as they are.
    """
    import torch

    places = {name: at for at, name in enumerate(inspect.signature(original).parameters) if name in names}
    assert len(places) == len(names), f"{original}: expected parameters {names}"

    def call(*args: Any, **kwargs: Any) -> Any:
        results = function(*args, **kwargs)
        dtype = None
        for name, at in places.items():
            value = args[at] if at < len(args) else kwargs.get(name)
            if isinstance(value, torch.Tensor) and value.dim() and value.is_floating_point():
                dtype = value.dtype if dtype is None else torch.promote_types(dtype, value.dtype)
        if dtype is None:
            return results
        if isinstance(results, tuple):
            return tuple(
                result if at in metrics else _in_dtype(dtype, result) for at, result in enumerate(results)
            )
        return _in_dtype(dtype, results)

    return call


def _in_dtype(dtype: "torch.dtype", result: Any) -> Any:
    import torch

    return result.to(dtype) if isinstance(result, torch.Tensor) and result.is_floating_point() else result


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside the wrapper of torch.compile or torch.compiler.disable; any other one unchanged.

    These wrappers carry attributes by which torch.compile finds the function inside. If our function had a
    copy of them, compiled callers would go to the function inside and bypass our implementation.
    """
    while hasattr(function, "_torchdynamo_orig_callable"):
        function = function._torchdynamo_orig_callable
    return function


def counting(target: str) -> Callable[[], None]:
    """A function that adds one call to CALLS[target]."""

    def add() -> None:
        CALLS[target] += 1

    import torch

    return torch.compiler.assume_constant_result(add)


def parameters(function: Callable[..., Any]) -> str:
    """A function's parameters and defaults, without annotations: "(logits, index, temperature=1.0)"."""
    signature = inspect.signature(function)
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def digest(function: Callable[..., Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a function's source, without its indentation."""
    source = textwrap.dedent(inspect.getsource(function))
    return hashlib.sha256(source.encode()).hexdigest()[:12]
