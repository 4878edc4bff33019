"""Stop strings: a response ends with the token that completes one of some texts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def split_ends(ends: Sequence[int | str]) -> tuple[list[int], list[str]]:
    """Splits what ends a response into token ids, and end marks that are no single token."""
    return [end for end in ends if not isinstance(end, str)], [end for end in ends if isinstance(end, str)]


class StopStrings:
    """Looks for texts at the end of a response. Without any, it finds nothing and decodes nothing."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # A token encodes one byte at least; a few more tokens, for special ones, which encode none.
        self.window = max((len(text.encode()) for text in self.strings), default=0) + 8

    def __bool__(self) -> bool:
        return bool(self.strings)

    def completed(self, ids: Sequence[int]) -> bool:
        """True when the last id, or one shortly before it, completes a text; reads the last ids alone."""
        text = self.tokenizer.decode(ids[-self.window :])
        return any(string in text for string in self.strings)

    def length(self, ids: Sequence[int]) -> int | None:
        """Number of ids up to and including the first that completes a text; None when none does."""
        return (
            next((n for n in range(1, len(ids) + 1) if self.completed(ids[:n])), None)
            if self.strings
            else None
        )
