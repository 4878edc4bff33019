"""What a call of `patch` did: which function is replaced at which places, which is left and why."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from . import sites


class Refused(ValueError):
    """A library's version, or a function's parameters or source, that ours were never compared with."""


@dataclass
class Report:
    """library, version: what was patched · replaced: {function: list of places} · why: {function: what is
    better} · left: {function: reason} · undo: what leaving a `with` block does; None where an earlier `patch`
    did the work · standing: tells whether what it reports is still in place.
    """

    library: str
    version: str
    replaced: dict[str, list[str]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    undo: Callable[[], object] | None = None
    standing: Callable[[], bool] | None = None

    @property
    def calls(self) -> dict[str, int]:
        """{function: how often ours was called in its place}, since it was put there."""
        return {target: sites.CALLS[target] for target in self.replaced}

    def __enter__(self) -> Self:
        if self.standing is not None and not self.standing():
            raise ValueError(f"this report's patch of {self.library} has been undone: call patch again")
        return self

    def __exit__(self, *_: object) -> None:
        if self.undo is not None:
            self.undo()

    def __str__(self) -> str:
        lines = [
            f"saferlhf-fast: {self.library} {self.version}: {len(self.replaced)} replaced, {len(self.left)} "
            f"left"
        ]
        for target, places in self.replaced.items():
            # none of one model's methods
            own = [place for place in places if place == target.replace(":", ".")]
            others = ", ".join(place for place in places if place not in own)
            lines.append(f"  replaced  {', also at '.join(filter(None, [*own, others]))}: {self.why[target]}")
        lines += [f"  left      {target.replace(':', '.')}: {reason}" for target, reason in self.left.items()]
        return "\n".join(lines)

    def show(self) -> None:
        """Prints the report, on the first rank."""
        if os.environ.get("RANK", "0") == "0":
            print(self)
