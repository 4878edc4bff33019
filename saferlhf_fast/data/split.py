"""Splits rows by prompt: equal prompts, and near-duplicates of each other, are on one side.

Which side depends on the prompts and the seed only, not on the order of the rows.
"""

from collections.abc import Iterable, Mapping

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
        _, group_of_key = np.unique(groups, return_inverse=True)
        self.groups = int(group_of_key.max(initial=-1)) + 1
        rows = _rows_of_groups(column, self._keys, group_of_key, self.groups)
        side_of_group = self._draw(group_of_key, rows, shares, seed)
        self._sides = side_of_group[group_of_key]

    def _draw(
        self, group_of_key: NDArray[np.intp], rows: NDArray[np.int64], shares: Mapping[str, float], seed: int
    ) -> NDArray[np.int8]:
        # a group is named by its least hash, so that no other order of the rows changes its side
        least = np.full(self.groups, np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(least, group_of_key, self._keys)
        mixed = (least ^ np.uint64(stable_hash(str(seed)))) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        order = np.lexsort((least, mixed ^ (mixed >> np.uint64(32))))
        sides = np.zeros(self.groups, np.int8)
        total = int(rows.sum())
        for number, share in enumerate(shares.values(), 1):
            wanted, filled = round(total * share), 0
            for group in order.tolist():
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


def _noting(prompts: Iterable[str], column: HashColumn) -> Iterable[str]:
    for prompt in prompts:
        column.append(stable_hash(prompt))
        yield prompt


def _rows_of_groups(
    column: HashColumn, keys: Hashes, group_of_key: NDArray[np.intp], groups: int
) -> NDArray[np.int64]:
    """Returns how many rows each group has."""
    rows = np.zeros(groups, np.int64)
    for hashes in column.sorted_parts():
        found, counts = np.unique(hashes, return_counts=True)
        np.add.at(rows, group_of_key[np.searchsorted(keys, found)], counts)
    return rows
