"""What an integration is made of: the functions of a library that ours replace, those it keeps, and the
reasons.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Replace:
    """One function of a library that gives way to ours.

    target: "module:name" or "module:Class.name" · make: the library's function -> ours, which may hand it
    what we leave to it · parameters: its parameters and defaults, as `sites.parameters` writes them; others
    are refused · why: what is better, one line · entries: registries that hold the function too,
    "module:DICT" and key · digests: where a library has no version to go by, of the sources that were
    compared (`sites.digest`); empty: the version vouches · signature_of: the part of the object that has the
    parameters, where it is no function · optional: the module may fail to import · loaded: only when
    something else has imported the module (it is slow or needs much), else it is left.
    """

    target: str
    make: Callable
    parameters: str
    why: str
    entries: tuple = ()
    digests: tuple = ()
    signature_of: str = ""
    optional: bool = False
    loaded: bool = False

    @property
    def module(self):
        """Name of the module that defines it."""
        return self.target.partition(":")[0]


@dataclass(frozen=True)
class Library:
    """name: for `patch` · distribution: as pip knows it, None: a checkout without versions · versions:

    beginnings of the versions that were compared · replace: tuple of Replace · leave: ((function, why), …).
    """

    name: str
    distribution: str | None
    versions: tuple
    replace: tuple
    leave: tuple = field(default=())
