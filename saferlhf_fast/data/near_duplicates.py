"""Finds near-duplicate prompts: MinHash of 5-byte pieces, in bands (locality-sensitive hashing).

64 hashes in 16 bands of 4: two prompts whose pieces overlap by 80 % (Jaccard) share a band with a probability
of 99.98 %, by 50 % with 64 %. Prompts that share a band are compared by all 64 hashes (standard error .05 at
80 %). The hashes are in a temporary file, 256 bytes for each distinct prompt.
"""

import os
import re
import tempfile
from collections.abc import Iterable
from typing import IO

import numpy as np
from numpy.typing import NDArray

from saferlhf_fast.data.hash_columns import Hashes, is_in, stable_hash

HASHES, BANDS = 64, 16
_PIECE = 5
_BATCH_BYTES = 1 << 15
_PROMPTS_AT_ONCE = 100_000
_PAIRS_AT_ONCE = 1 << 15
_WORD = re.compile(r"\w+")
_FACTORS = np.random.default_rng(20261201).integers(1, 1 << 63, HASHES, np.uint64) * np.uint64(2) + np.uint64(
    1
)

Indices = NDArray[np.int32]


def groups_of(prompts: Iterable[str], similarity: float = 0.8) -> tuple[Hashes, Indices]:
    """Groups prompts so that near-duplicates are in one group; also those that a third one links.

    Args:
        prompts: The prompts, equal ones any number of times.
        similarity: Least share of pieces that two near-duplicates have in common; 1: equal prompts only.

    Returns:
        (stable_hash of each distinct prompt [N], ascending; number of its group [N])
    """
    hashes: list[Hashes] = [np.empty(0, np.uint64)]
    seen = hashes[0]
    with tempfile.TemporaryFile(prefix="saferlhf-minhash-") as file:
        batch: dict[int, str] = {}

        def store() -> None:
            nonlocal seen, batch
            keys = np.fromiter(batch, np.uint64, len(batch))
            new = ~is_in(keys, seen)
            if similarity < 1:
                texts = [text for text, is_new in zip(batch.values(), new) if is_new]
                _signatures(texts).tofile(file)
            hashes.append(keys[new])
            seen = np.sort(np.concatenate([seen, keys[new]]))
            batch = {}

        for prompt in prompts:
            batch[stable_hash(prompt)] = prompt
            if len(batch) >= _PROMPTS_AT_ONCE:
                store()
        store()
        keys = np.concatenate(hashes)
        hashes.clear()
        seen = np.empty(0, np.uint64)
        groups = np.arange(len(keys), dtype=np.int32)
        if similarity < 1 and len(keys):
            file.flush()
            groups = _linked(Signatures(file, len(keys)), similarity)
    order = np.argsort(keys).astype(np.int32)
    return keys[order], groups[order]


class Signatures:
    """MinHashes in a file, a row for each prompt."""

    def __init__(self, file: IO[bytes], count: int) -> None:
        self._file, self.count = file, count

    def keys(self, band: int) -> Hashes:
        """Returns one number for each prompt, which is equal where a band is equal."""
        width = HASHES // BANDS
        keys = np.empty(self.count, np.uint64)
        self._file.seek(0)
        for begin in range(0, self.count, _PROMPTS_AT_ONCE):
            rows = min(_PROMPTS_AT_ONCE, self.count - begin)
            block = np.frombuffer(self._file.read(4 * HASHES * rows), np.uint32).reshape(rows, HASHES)
            part = np.ascontiguousarray(block[:, band * width : (band + 1) * width]).view(np.uint64)
            keys[begin : begin + rows] = part[:, 0] * np.uint64(0xD6E8FEB86659FD93) + (
                part[:, 1] ^ (part[:, 0] >> np.uint64(31))
            )
        return keys

    def likeness(self, left: Indices, right: Indices) -> NDArray[np.float64]:
        """Returns the share of equal hashes of pairs of prompts."""
        return np.asarray((self._rows(left) == self._rows(right)).mean(1))

    def _rows(self, places: Indices) -> NDArray[np.uint32]:
        rows = np.empty((len(places), HASHES), np.uint32)
        # reads, and no map: the kernel maps 64 KiB around each row, which would count as memory
        for row, place in zip(rows, places.tolist()):
            os.preadv(self._file.fileno(), [row.data], place * row.nbytes)
        return rows


def _signatures(texts: list[str]) -> NDArray[np.uint32]:
    """Returns the MinHash of each text [N, HASHES]."""
    signatures = np.empty((len(texts), HASHES), np.uint32)
    pieces = [_normal(text) for text in texts]
    begin = size = 0
    for i, piece in enumerate(pieces):
        size += len(piece) + _PIECE
        if size >= _BATCH_BYTES or i + 1 == len(pieces):
            signatures[begin : i + 1] = _batch_signatures(pieces[begin : i + 1])
            begin, size = i + 1, 0
    return signatures


def _normal(text: str) -> bytes:
    """Returns a text's words in small letters; at least one piece long."""
    words = " ".join(_WORD.findall(text.lower())) or text
    return words.encode("utf-8", "surrogatepass").ljust(_PIECE)


def _batch_signatures(texts: list[bytes]) -> NDArray[np.uint32]:
    data = np.frombuffer((b" " * (_PIECE - 1)).join(texts) + b" " * _PIECE, np.uint8).astype(np.uint64)
    count = len(data) - _PIECE + 1
    pieces = data[:count].copy()
    for i in range(1, _PIECE):
        pieces |= data[i : count + i] << np.uint64(8 * i)
    pieces *= np.uint64(0x9E3779B97F4A7C15)
    pieces ^= pieces >> np.uint64(29)
    lengths = np.array([len(text) for text in texts])
    starts = np.concatenate(([0], np.cumsum(lengths + _PIECE - 1)[:-1]))
    # between a text's last piece and the next text are pieces of two texts: every second range
    bounds = np.stack([starts, starts + lengths - _PIECE + 1], 1).reshape(-1)
    hashed = (pieces[None] * _FACTORS[:, None]) >> np.uint64(32)
    return np.minimum.reduceat(hashed, bounds, axis=1)[:, ::2].T.astype(np.uint32)


def _linked(signatures: Signatures, similarity: float) -> Indices:
    """Returns the group of each row of the signatures."""
    parents = np.arange(signatures.count, dtype=np.int32)
    for band in range(BANDS):
        keys = signatures.keys(band)
        order = np.argsort(keys, kind="stable").astype(np.int32)
        keys = keys[order]
        same = np.concatenate(([False], keys[1:] == keys[:-1]))
        del keys
        places = np.flatnonzero(same).astype(np.int32)
        # a run of neighbours that are the same begins before the first of them
        begins = np.flatnonzero(~same).astype(np.int32)
        for begin in range(0, len(places), _PAIRS_AT_ONCE):
            here = places[begin : begin + _PAIRS_AT_ONCE]
            first = begins[np.searchsorted(begins, here) - 1]
            for others in (here - 1, first):  # the neighbour, and the first of the band's group
                _link(parents, order[here], order[others], signatures, similarity)
    return _roots(parents)


def _link(parents: Indices, left: Indices, right: Indices, signatures: Signatures, similarity: float) -> None:
    """Joins the groups of the pairs that are similar."""
    roots_left, roots_right = _root(parents, left), _root(parents, right)
    apart = roots_left != roots_right
    left, right = left[apart], right[apart]
    alike = signatures.likeness(left, right) >= similarity
    for a, b in zip(left[alike].tolist(), right[alike].tolist()):
        while parents[a] != a:
            a = parents[a]
        while parents[b] != b:
            b = parents[b]
        parents[max(a, b)] = min(a, b)


def _root(parents: Indices, rows: Indices) -> Indices:
    """Returns the roots of some rows."""
    while True:
        above = parents[rows]
        if np.array_equal(above, rows):
            return rows
        rows = above


def _roots(parents: Indices) -> Indices:
    while True:
        above = parents[parents]
        if np.array_equal(above, parents):
            return parents
        parents[:] = above
