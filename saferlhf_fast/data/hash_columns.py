"""Columns of 64-bit hashes that are too long for memory: appended to a file, and counted a part at a time.

Two different texts have one hash with a probability of n²/2⁶⁵: 3·10⁻⁶ among 10 million texts.
"""

import tempfile
from array import array
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
_BUFFERED = 1 << 17  # hashes in memory before they are written: 1 MiB
_SORTED_AT_ONCE = 1 << 24  # hashes: 128 MiB

Hashes = NDArray[np.uint64]


def stable_hash(text: str, key: str = "") -> int:
    """Returns a 64-bit hash that is the same in every process, unlike Python's own.

    Args:
        text: The text.
        key: Another key gives an independent hash.
    """
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key.encode()).digest()
    return int.from_bytes(digest, "little")


class HashColumn:
    """A column of hashes."""

    def __init__(self) -> None:
        """Opens a file without a name, which ends with the process."""
        self._file = tempfile.TemporaryFile(prefix="saferlhf-hashes-")
        self._buffer = array("Q")
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._buffer)

    def append(self, value: int) -> None:
        """Appends a hash; bits above 64 are cut off, and negative numbers are taken modulo 2⁶⁴."""
        self._buffer.append(value & MASK)
        if len(self._buffer) >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Writes what is in memory."""
        self._file.seek(0, 2)
        self._buffer.tofile(self._file)
        self._written += len(self._buffer)
        self._buffer = array("Q")

    def sorted_parts(self) -> Iterator[Hashes]:
        """Yields all hashes in ascending order, in parts that do not share a value."""
        self.flush()
        parts = 1 << max(0, -(-len(self) // _SORTED_AT_ONCE) - 1).bit_length()
        bits = parts.bit_length() - 1
        for part in range(parts):
            chosen = [
                chunk if not bits else chunk[chunk >> np.uint64(64 - bits) == part]
                for chunk in self._chunks()
            ]
            values = np.concatenate(chosen) if chosen else np.empty(0, np.uint64)
            del chosen
            values.sort()
            yield values

    def _chunks(self) -> Iterator[Hashes]:
        self._file.seek(0)
        while content := self._file.read(1 << 23):
            yield np.frombuffer(content, np.uint64)

    def distinct(self) -> int:
        """Returns how many different hashes there are."""
        return sum(len(_starts(values)) for values in self.sorted_parts())

    def repeated(self) -> int:
        """Returns how many hashes are there before: all but the first of each value."""
        return len(self) - self.distinct()

    def contradictions(self) -> tuple[int, int]:
        """Counts values that occur with both lowest bits, where the lowest bit is a label.

        Returns:
            (values, hashes with such a value)
        """
        values_found = hashes_found = 0
        for hashes in self.sorted_parts():
            keys = hashes >> np.uint64(1)
            starts = _starts(keys)
            ends = np.append(starts[1:], len(keys))
            both = hashes[starts] != hashes[ends - 1] if len(keys) else np.empty(0, bool)
            values_found += int(both.sum())
            hashes_found += int((ends - starts)[both].sum())
        return values_found, hashes_found

    def unique(self) -> Hashes:
        """Returns the different hashes in ascending order, in memory: 8 bytes for each."""
        return np.concatenate([values[_starts(values)] for values in self.sorted_parts()])

    def found_in(self, others: Hashes) -> int:
        """Returns how many hashes of this column are among `others`, which are in ascending order."""
        return sum(int(is_in(values, others).sum()) for values in self.sorted_parts())


def is_in(values: Hashes, ascending: Hashes) -> NDArray[np.bool_]:
    """Tells for each value whether it is among others, which are in ascending order."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[places] == values


def _starts(values: Hashes) -> NDArray[np.intp]:
    """Returns where runs of equal values begin."""
    if not len(values):
        return np.empty(0, np.intp)
    return np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
