"""What a call of `patch` did: which functions it replaced at which places, which it left and why."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from . import sites


class Refused(ValueError):
    """The library's version, or a function's parameters or source, was never compared with our functions."""


@dataclass
class Report:
    """What one call of `patch` did; as a context manager it restores everything at its end.

    Attributes:
        library: What was patched.
        version: Its version.
        replaced: {function: places at which it was replaced}.
        why: {function: what is better}.
        left: {function: the reason why it stays}.
        undo: What runs when a `with` block ends; None where an earlier `patch` replaced the functions.
        standing: Whether the replacements that it reports are still in place.
        dtype: Of results of half-precision inputs: "float32", or "input" for the library's own dtype.
    """

    library: str
    version: str
    replaced: dict[str, list[str]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    undo: Callable[[], object] | None = None
    standing: Callable[[], bool] | None = None
    dtype: str = "float32"

    @property
    def calls(self) -> dict[str, int]:
        """{function: how often our implementation was called since it was put in place}."""
        return {target: sites.CALLS[target] for target in self.replaced}

    @property
    def rebound(self) -> list[str]:
        """Places outside the library: names that other modules, your script too, had imported before."""
        places = [place for found in self.replaced.values() for place in found]
        return sorted(place for place in places if _outside(self.library, place))

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or what another process reads, tells what happened here; it has nothing to undo.
        return {**vars(self), "undo": None, "standing": None}

    def __enter__(self) -> Self:
        if self.standing is not None and not self.standing():
            raise ValueError(f"this report's patch of {self.library} has been undone: call patch again")
        return self

    def __exit__(self, *_: object) -> None:
        if self.undo is not None:
            self.undo()

    def __str__(self) -> str:
        counts = f"{len(self.replaced)} replaced, {len(self.left)} left"
        lines = [f"saferlhf-fast: {self.library} {self.version}: {counts}"]
        for target, places in self.replaced.items():
            # Empty for a patched model, whose places are described in words.
            own = [place for place in places if place == target.replace(":", ".")]
            others = ", ".join(place for place in places if place not in own)
            lines.append(f"  replaced  {', also at '.join(filter(None, [*own, others]))}: {self.why[target]}")
        if self.rebound:
            lines.append(f"  rebound   in modules outside {self.library}: {', '.join(self.rebound)}")
        lines += [f"  left      {target.replace(':', '.')}: {reason}" for target, reason in self.left.items()]
        return "\n".join(lines)

    def show(self) -> None:
        """Prints the report, on the first rank."""
        if os.environ.get("RANK", "0") == "0":
            print(self)


def _outside(library: str, place: str) -> bool:
    """Whether a place is in a module that does not belong to the library; a patched model's is no module."""
    return library != "transformers" and place.partition(".")[0] != library
