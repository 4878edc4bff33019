"""Tokenises texts, and tells which tokens belong to which characters."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Places = list[tuple[int, int]]
"""(begin, end) of each token in its text (characters)."""


def tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of texts, without special tokens around them; all at once is several times faster."""
    if not texts:
        return []
    # verbose=False: no warning about long sequences, because the caller checks lengths.
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def tokenize_with_places(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], borders: Sequence[Iterable[int]]
) -> list[tuple[list[int], Places]]:
    """Returns (ids, places) of texts, without special tokens around them.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        borders: The places in each text that `place_of` will be asked for. A tokenizer that reports no places
            is asked for the beginnings of the text up to these.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        encoded = tokenize(tokenizer, texts)
        return [(ids, _places(tokenizer, ids, *item)) for ids, item in zip(encoded, zip(texts, borders))]
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return [(list(ids), list(spans)) for ids, spans in zip(encoded["input_ids"], encoded["offset_mapping"])]


def place_of(places: Places, begin: int, end: int) -> tuple[int, int]:
    """Returns (first, stop) of the tokens with characters of a span; a token at its border belongs to it."""
    first = bisect_right(places, begin, key=lambda place: place[1])
    return first, max(first, bisect_left(places, end, key=lambda place: place[0]))


def _places(
    tokenizer: "PreTrainedTokenizerBase", ids: list[int], text: str, borders: Iterable[int]
) -> Places:
    """Returns places as exact as borders need: a token is in front of one if the text up to there has it."""
    places: Places = []
    begin = 0
    for border in sorted({*borders, len(text)}):
        prefix = ids if border == len(text) else tokenize(tokenizer, [text[:border]])[0]
        known = next((i for i, pair in enumerate(zip(prefix, ids)) if pair[0] != pair[1]), len(prefix))
        places += [(begin, border)] * (min(known, len(ids)) - len(places))
        begin = border
    return places
