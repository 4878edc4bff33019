"""What an integration consists of: the functions to replace, those that stay, and the reasons."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

LibraryFunction: TypeAlias = Callable[..., Any]
"""A function or method of another library, or our implementation with the same parameters."""


@dataclass(frozen=True)
class Replace:
    """One function of a library that our implementation replaces.

    Attributes:
        target: "module:name" or "module:Class.name".
        make: Takes the library's function and returns our implementation, which calls the library's function
            in the cases that it does not handle itself.
        parameters: Its parameters and defaults, as `sites.parameters` writes them; a function with others is
            refused.
        why: What is better, in one line.
        entries: Registries that hold the function too, as pairs of "module:DICT" and key.
        digests: `sites.digest` of the sources that we compared it with, where a library has no version;
            empty where its version identifies them.
        signature_of: The attribute of the object that has the parameters, where the object is no function.
        optional: Its module may fail to import.
        loaded: Replace it only when something else has imported the module, which is slow or has many
            dependencies.
        dtype_of: Names of the parameters whose tensors give the library's own result its dtype, the wider one
            of several; empty where the library's results have the dtype of ours.
        metrics: Places in a tuple of results where the library returns float32 whatever the inputs are.
    """

    target: str
    make: Callable[..., Any]
    parameters: str
    why: str
    entries: tuple[tuple[str, str], ...] = ()
    digests: tuple[str, ...] = ()
    signature_of: str = ""
    optional: bool = False
    loaded: bool = False
    dtype_of: tuple[str, ...] = ()
    metrics: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """Name of the module that defines it."""
        return self.target.partition(":")[0]

    def why_with(self, dtype: str) -> str:
        """`why` for results of a dtype.

        Args:
            dtype: "float32", or "input" for the library's own dtype.
        """
        if dtype == "input" and self.dtype_of:
            return self.why.replace("float32 results", "results in the dtype of the input")
        return self.why


@dataclass(frozen=True)
class Library:
    """The table of one library.

    Attributes:
        name: What `patch` calls it.
        distribution: The name that pip knows; None for a checkout without versions.
        versions: Beginnings of the versions that we compared our functions with.
        replace: The functions that are replaced.
        leave: (function, reason) of those that stay.
    """

    name: str
    distribution: str | None
    versions: tuple[str, ...]
    replace: tuple[Replace, ...]
    leave: tuple[tuple[str, str], ...] = field(default=())
