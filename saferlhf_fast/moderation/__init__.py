"""The moderator: training, thresholds, quality, and judging texts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .moderator import Moderator as Moderator

__all__ = ["Moderator"]


if not TYPE_CHECKING:  # a type checker that saw it would accept any name

    def __getattr__(name: str) -> object:
        if name != "Moderator":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .moderator import Moderator

        return Moderator
