"""Finds near-duplicate prompts: MinHash of 5-byte pieces, in bands (locality-sensitive hashing).

64 hashes in 16 bands of 4: two prompts whose pieces overlap by 80 % (Jaccard) share a band with a probability
of 99.98 %, by 50 % with 64 %. Prompts that share a band are compared by all 64 hashes (standard error .05 at
80 %). The hashes are in a temporary file, 256 bytes for each distinct prompt.
"""

import re
import tempfile
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from saferlhf_fast.data.hash_columns import Hashes, is_in, stable_hash

HASHES, BANDS = 64, 16
_PIECE = 5
_BATCH_BYTES = 1 << 15
_PROMPTS_AT_ONCE = 100_000
_PAIRS_AT_ONCE = 1 << 16
_WORD = re.compile(r"\w+")
_FACTORS = np.random.default_rng(20261201).integers(1, 1 << 63, HASHES, np.uint64) * np.uint64(2) + np.uint64(
    1
)

Indices = NDArray[np.int64]


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
        groups = np.arange(len(keys))
        if similarity < 1 and len(keys):
            file.flush()
            groups = _linked(np.memmap(file, np.uint32, "r", shape=(len(keys), HASHES)), similarity)
    order = np.argsort(keys)
    return keys[order], groups[order]


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


def _linked(signatures: NDArray[np.uint32], similarity: float) -> Indices:
    """Returns the group of each row of the signatures."""
    parents = np.arange(len(signatures))
    width = HASHES // BANDS
    for band in range(BANDS):
        part = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width]).view(np.uint64)
        keys = part[:, 0] * np.uint64(0xD6E8FEB86659FD93) + (part[:, 1] ^ (part[:, 0] >> np.uint64(31)))
        order = np.argsort(keys, kind="stable")
        same = np.concatenate(([False], keys[order][1:] == keys[order][:-1]))
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        places = np.flatnonzero(same)
        for begin in range(0, len(places), _PAIRS_AT_ONCE):
            here = places[begin : begin + _PAIRS_AT_ONCE]
            for others in (here - 1, first[here]):  # the neighbour, and the first of the band's group
                _link(parents, order[here], order[others], signatures, similarity)
    return _roots(parents)


def _link(
    parents: Indices, left: Indices, right: Indices, signatures: NDArray[np.uint32], similarity: float
) -> None:
    """Joins the groups of the pairs that are similar."""
    roots = _roots(parents)
    apart = roots[left] != roots[right]
    left, right = left[apart], right[apart]
    alike = (signatures[left] == signatures[right]).mean(1) >= similarity
    for a, b in zip(left[alike].tolist(), right[alike].tolist()):
        while parents[a] != a:
            a = parents[a]
        while parents[b] != b:
            b = parents[b]
        parents[max(a, b)] = min(a, b)


def _roots(parents: Indices) -> Indices:
    while True:
        above = parents[parents]
        if np.array_equal(above, parents):
            return parents
        parents[:] = above
