"""Splits rows by prompt: equal prompts, and near-duplicates of each other, are on one side.

Which side depends on the prompts and the seed only, not on the order of the rows.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from saferlhf_fast.data.hash_columns import HashColumn, Hashes, stable_hash
from saferlhf_fast.data.near_duplicates import groups_of

REST = "train"
"""The part that gets what the others do not."""


class PromptSides:
    """The side of every prompt."""

    def __init__(
        self, prompts: Iterable[str], shares: Mapping[str, float], seed: int = 0, similarity: float = 0.8
    ) -> None:
        """Groups the prompts and draws the sides.

        Args:
            prompts: The prompt of each row.
            shares: {part: its share of the rows}; REST gets what is left.
            seed: Another seed draws other sides.
            similarity: As in `near_duplicates.groups_of`.
        """
        self.parts = (REST, *shares)
        column = HashColumn()
        self._keys, groups = groups_of(_noting(prompts, column), similarity)
        self.prompts = len(self._keys)
        # a group is named by a row of it: its number is that row's place among the names
        is_name = np.zeros(self.prompts, bool)
        is_name[groups] = True
        number_of_name = np.cumsum(is_name, dtype=np.int32) - 1
        group_of_key = number_of_name[groups]
        self.groups = int(is_name.sum())
        del groups, is_name, number_of_name
        rows = _rows_of_groups(column, self._keys, group_of_key, self.groups)
        side_of_group = self._draw(group_of_key, rows, shares, seed)
        self._sides = side_of_group[group_of_key]

    def _draw(
        self, group_of_key: NDArray[np.int32], rows: NDArray[np.int64], shares: Mapping[str, float], seed: int
    ) -> NDArray[np.int8]:
        # a group is named by its least hash, so that no other order of the rows changes its side
        least = np.full(self.groups, np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(least, group_of_key, self._keys)
        mixed = (least ^ np.uint64(stable_hash(str(seed)))) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed ^= mixed >> np.uint64(32)
        del least  # each step is one to one, so that different groups have different numbers
        order = np.argsort(mixed).astype(np.int32)
        del mixed
        sides = np.zeros(self.groups, np.int8)
        total = int(rows.sum())
        for number, share in enumerate(shares.values(), 1):
            wanted, filled = round(total * share), 0
            for group in _by_parts(order):
                if filled >= wanted:
                    break
                if not sides[group] and filled + rows[group] <= wanted:
                    sides[group] = number
                    filled += int(rows[group])
        return sides

    def of(self, prompts: list[str]) -> list[str]:
        """Returns the part of each prompt.

        Args:
            prompts: Prompts among those that were grouped.
        """
        hashes = np.fromiter(map(stable_hash, prompts), np.uint64, len(prompts))
        return [self.parts[side] for side in self._sides[np.searchsorted(self._keys, hashes)]]


def _by_parts(values: NDArray[np.int32]) -> Iterator[int]:
    """Yields the values without a list of all of them."""
    for begin in range(0, len(values), 1 << 16):
        yield from values[begin : begin + (1 << 16)].tolist()


def _noting(prompts: Iterable[str], column: HashColumn) -> Iterable[str]:
    for prompt in prompts:
        column.append(stable_hash(prompt))
        yield prompt


def _rows_of_groups(
    column: HashColumn, keys: Hashes, group_of_key: NDArray[np.int32], groups: int
) -> NDArray[np.int64]:
    """Returns how many rows each group has."""
    rows = np.zeros(groups, np.int64)
    for hashes in column.sorted_parts():
        found, counts = np.unique(hashes, return_counts=True)
        np.add.at(rows, group_of_key[np.searchsorted(keys, found)], counts)
    return rows
