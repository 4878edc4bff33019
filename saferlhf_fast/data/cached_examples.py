"""Examples that lie in Arrow files: read one at a time, and asked about all together by their columns.

Where the in-memory loader compares texts (which pairs contradict each other), 64-bit hashes are compared
here: two different texts have one hash with a probability of n²/2⁶⁵.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from saferlhf_fast.data.files import shorten
from saferlhf_fast.data.pairs import CONTRADICTED, PairExample
from saferlhf_fast.data.report import SourceReport
from saferlhf_fast.errors import UserError

_OPEN = 128  # files that are mapped at the same time


def stable_hash(*texts: str) -> int:
    """Returns a 64-bit hash of some texts that is the same in every process.

    Args:
        texts: The texts.
    """
    digest = blake2b(digest_size=8)
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return int.from_bytes(digest.digest(), "little")


class CachedExamples(Sequence[Any]):
    """The examples of a cache, or some of them."""

    def __init__(self, paths: Sequence[Path], make: type, by_sign: bool = False) -> None:
        """Reads the columns that are asked of all examples; texts and tokens stay on the disk.

        Args:
            paths: The files of the blocks.
            make: The class of the examples.
            by_sign: Pairs with a response that is labelled safe here and unsafe elsewhere contradict too.
        """
        self._paths, self._make = list(paths), make
        self._opened: OrderedDict[int, Any] = OrderedDict()
        self.counts: list[dict[str, Any]] = []
        sizes, numbers, lengths = [], [], []
        for block in range(len(self._paths)):
            batch = self._batch(block)
            self.counts.append(json.loads(batch.schema.metadata[b"counts"]))
            sizes.append(batch.num_rows)
            # copies: views would keep every file mapped
            numbers.append(batch.column("number").to_numpy().copy())
            lengths.append(batch.column("longest").to_numpy().copy())
        self._begins = np.concatenate(([0], np.cumsum(sizes)))
        self._numbers, self._lengths = np.concatenate(numbers), np.concatenate(lengths)
        self._flagged = self._contradicted(by_sign) if make is PairExample else None
        self._places: NDArray[np.int64] = np.arange(self._begins[-1])

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> "CachedExamples": ...
    def __getitem__(self, index: int | slice) -> Any:
        """Returns an example, or some as another CachedExamples."""
        if isinstance(index, slice):
            return self._some(self._places[index])
        place = int(self._places[index])
        block = int(np.searchsorted(self._begins, place, "right")) - 1
        batch, row = self._batch(block), place - int(self._begins[block])
        values = {
            name: _value(batch.column(name), row)
            for name in self._make.__dataclass_fields__  # type: ignore[attr-defined]
            if name in batch.schema.names
        }
        if self._flagged is not None:
            values["flagged"] = bool(self._flagged[place])
        return self._make(**values)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    @property
    def longest(self) -> int:
        """Tokens of the longest example; 0 without one."""
        return int(self._lengths[self._places].max(initial=0))

    def split_by_prompt(self, fraction: float) -> "tuple[CachedExamples, CachedExamples]":
        """Holds out about `fraction` of the prompts, the same ones as `batches.split_by_prompt`.

        Args:
            fraction: Share of the prompts to hold out.

        Returns:
            (training, held out)
        """
        numbers = self._numbers[self._places]
        is_out = numbers < fraction
        if fraction and len(numbers) and numbers.min() < numbers.max():
            if not is_out.any():
                is_out = numbers == numbers.min()
            elif is_out.all():
                is_out = numbers != numbers.max()
        return self._some(self._places[~is_out]), self._some(self._places[is_out])

    def report_contradictions(self, block: int, counts: SourceReport) -> None:
        """Counts the pairs of a block whose labels others contradict.

        Args:
            block: The block.
            counts: Gets the counts.
        """
        if self._flagged is None:
            return
        begin, end = self._begins[block : block + 2]
        rows = np.flatnonzero(self._flagged[begin:end])
        if len(rows):
            counts.flagged[CONTRADICTED] += len(rows)
            where = self._batch(block).column("where")[int(rows[0])].as_py()
            counts.first.setdefault(CONTRADICTED, where)

    def _some(self, places: NDArray[np.int64]) -> "CachedExamples":
        other = object.__new__(CachedExamples)
        other.__dict__.update(self.__dict__)
        other._places = places
        return other

    def _batch(self, block: int) -> Any:
        """Returns a block, mapped into memory; the one that was not used for longest is closed."""
        import pyarrow  # type: ignore[import-untyped]

        if block in self._opened:
            self._opened.move_to_end(block)
            return self._opened[block]
        path = self._paths[block]
        try:
            reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
            if reader.num_record_batches:
                batch = reader.get_batch(0)
            else:
                batch = pyarrow.RecordBatch.from_pylist([], schema=reader.schema)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"train.cache: {path} is damaged ({shorten(error, 80)}); remove it") from error
        self._opened[block] = batch
        if len(self._opened) > _OPEN:
            self._opened.popitem(last=False)
        return batch

    def _contradicted(self, by_sign: bool) -> NDArray[np.bool_]:
        """Tells of each pair whether its labels contradict others, or its file says so."""
        flagged = self._column("flagged").astype(bool)
        flagged |= _is_in(self._column("reversed"), self._column("order"))
        if by_sign:
            for label, other in (("safe", "unsafe"), ("unsafe", "safe")):
                opposite = np.concatenate([self._known(f"{side}_{other}")[0] for side in ("first", "second")])
                for side in ("first", "second"):
                    values, places = self._known(f"{side}_{label}")
                    flagged[places[_is_in(values, opposite)]] = True
        return flagged

    def _column(self, name: str) -> NDArray[Any]:
        columns = [
            self._batch(i).column(name).to_numpy(zero_copy_only=False) for i in range(len(self._paths))
        ]
        return np.concatenate(columns)

    def _known(self, name: str) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Returns (values, places) of a column where it is not null."""
        values, places = [], []
        for block in range(len(self._paths)):
            column = self._batch(block).column(name)
            known = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
            values.append(column.drop_null().to_numpy().copy())
            places.append(known + self._begins[block])
        return np.concatenate(values), np.concatenate(places)


def _is_in(values: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tells of each value whether it is among others."""
    if not len(others):
        return np.zeros(len(values), bool)
    ascending = np.sort(others)
    found: NDArray[np.bool_] = (
        ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values
    )
    return found


def _value(column: Any, row: int) -> Any:
    """Returns one value of an Arrow column; lists of numbers come without a Python object for each scalar."""
    scalar = column[row]
    values = getattr(scalar, "values", None)
    return scalar.as_py() if values is None else values.to_numpy(zero_copy_only=False).tolist()
