"""Sequences one behind the other, without padding: what every forward pass takes, and how passes are filled.

    packed = pack_sequences(sequences, positions, device)    # lists of ids -> Packed, which every model takes

A batch is cut into passes (micro-batches) by tokens, not by sequences: `pack_into_microbatches` deals
sequences to ranks and passes so that all have about the same number of tokens and none more than a budget.
Losses are divided by counts over all passes and ranks, so no result depends on how the batch was cut. The
way from padded rows to packed tokens and back is in padding.py. Needs torch alone.

Shapes: legend in rollout/types.py; N counts the positions whose hidden state is wanted, one behind the
other.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .padding import boolean as boolean
from .padding import pack as pack
from .padding import unpack as unpack


class Layout:
    """Where sequences begin and end in packed tokens: what attention needs, computed once for all layers.

    Attributes:
        lengths: Tokens of each sequence, host integers.
        runs: (sequences, length) of neighbours of one length.
        longest: Tokens of the longest sequence; 0 without any.
        cu_seqlens: [S+1] int32 on the device.
    """

    def __init__(self, lengths: Iterable[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.runs = [(len(list(same)), length) for length, same in itertools.groupby(self.lengths)]
        self.longest = max(self.lengths, default=0)
        self.cu_seqlens = torch.tensor(
            [0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device
        )


@dataclass(frozen=True)
class Packed:
    """What one forward pass takes."""

    ids_M: torch.Tensor  # int64
    positions_M: torch.Tensor  # int64: 0, 1, … in each sequence
    layout: Layout  # where sequences begin and end
    rows_N: torch.Tensor  # int64: places in M of the hidden states that are wanted
    targets_N: torch.Tensor  # int64: the token that follows each of them, -1 at the end of a sequence
    counts: tuple[int, ...]  # requested tokens of each sequence, host integers
    types_M: torch.Tensor | None = None  # int64: token types, 1 in the second text of a pair; None: all 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, host integers."""
        return self.layout.lengths

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """[S+1] int32: each sequence's first requested token in N."""
        return torch.tensor(
            [0, *itertools.accumulate(self.counts)], dtype=torch.int32, device=self.ids_M.device
        )

    @property
    def sequence_N(self) -> torch.Tensor:
        """int64 [N]: the sequence of each requested token."""
        numbers = [row for row, count in enumerate(self.counts) for _ in range(count)]
        return torch.tensor(numbers, dtype=torch.long).to(self.ids_M.device, non_blocking=True)


def pack_sequences(
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    device: torch.device,
    seconds: Sequence[int | None] | None = None,
) -> Packed:
    """Packs sequences for one forward pass.

    The position that predicts token t is t − 1: a response from token p on is range(p − 1, length − 1).

    Args:
        sequences: Token ids of each sequence.
        positions: For each sequence the positions, ascending, whose hidden state is wanted.
        device: Where the tensors go.
        seconds: For each sequence the place from which tokens have the type 1, as the second text of a pair
            has in some encoders; None where there is none.

    Returns:
        The packed tokens.

    Raises:
        ValueError: A position is outside its sequence.
    """
    lengths = [len(ids) for ids in sequences]
    starts = [0, *itertools.accumulate(lengths)]
    for wanted, length in zip(positions, lengths):
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < length:
            raise ValueError(
                f"positions: expected positions in 0 … {length - 1}, got {wanted[0]} … {wanted[-1]}"
            )
    ids = list(itertools.chain.from_iterable(sequences))
    after = list(itertools.chain.from_iterable((*s[1:], -1) for s in sequences))
    rows = [start + p for start, wanted in zip(starts, positions) for p in wanted]
    columns = torch.tensor([ids, after, [p for length in lengths for p in range(length)]], dtype=torch.long)
    columns, rows_N = (
        columns.to(device, non_blocking=True),
        torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True),
    )
    return Packed(
        columns[0],
        columns[2],
        Layout(lengths, device),
        rows_N,
        columns[1].index_select(0, rows_N),
        tuple(len(wanted) for wanted in positions),
        _token_types(lengths, seconds, device),
    )


def _token_types(
    lengths: Sequence[int], seconds: Sequence[int | None] | None, device: torch.device
) -> torch.Tensor | None:
    """types_M, or None where every type is 0."""
    if seconds is None or all(second is None for second in seconds):
        return None
    types = [
        int(second is not None and p >= second)
        for length, second in zip(lengths, seconds)
        for p in range(length)
    ]
    return torch.tensor(types, dtype=torch.long).to(device, non_blocking=True)


def response_rows(prompt_length: int, length: int) -> range:
    """Positions that predict a response: the prompt's last token and all of the response but its last."""
    return range(prompt_length - 1, length - 1)


def end_row(length: int) -> range:
    """The last position, where a score is read."""
    return range(length - 1, length)


@dataclass(frozen=True)
class Padded:
    """The same sequences in rows, padded on the right: for architectures that cannot run packed."""

    ids_SL: torch.Tensor  # int64
    mask_SL: torch.Tensor  # int64, 1 at real tokens
    positions_SL: torch.Tensor  # int64
    flat_M: torch.Tensor  # int64: the place of each packed token in [S·L]
    types_SL: torch.Tensor | None = None  # int64: token types


def padded(packed: Packed) -> Padded:
    """The rows of packed sequences, computed on the host from lengths: nothing is read from the device."""
    device, longest = packed.ids_M.device, packed.layout.longest
    flat = [row * longest + p for row, length in enumerate(packed.lengths) for p in range(length)]
    flat_M = torch.tensor(flat, dtype=torch.long, device=device)
    shape = (len(packed.lengths), longest)

    def in_rows(values_M: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(shape[0] * shape[1], dtype=torch.long, device=device)
        return zeros.index_copy_(0, flat_M, values_M).view(shape)

    return Padded(
        in_rows(packed.ids_M),
        in_rows(torch.ones_like(packed.ids_M)),
        in_rows(packed.positions_M),
        flat_M,
        None if packed.types_M is None else in_rows(packed.types_M),
    )


def pack_into_microbatches(lengths: Sequence[int], budget: int, world: int = 1) -> list[list[list[int]]]:
    """Deals sequences to ranks and passes.

    The longest go first, each to the pass with the fewest tokens, so that passes and ranks get about as much.
    The same input gives the same answer on every rank. All ranks have equally many passes, as collectives
    demand; some may be empty.

    Args:
        lengths: Tokens of each sequence of the *global* batch.
        budget: Most tokens of a pass; a longer sequence gets a pass of its own.
        world: Number of ranks.

    Returns:
        For each rank a list of passes, each a list of indices, shortest sequence first.

    Raises:
        ValueError: The budget is below one token.
    """
    if budget < 1:
        raise ValueError(f"budget: expected at least one token, got {budget}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    passes = max(1, -(-sum(lengths) // (budget * world)))
    while True:
        dealt = _deal(order, lengths, budget, passes * world)
        if dealt is not None:
            return [[dealt[p * world + rank][::-1] for p in range(passes)] for rank in range(world)]
        passes += 1


def _deal(order: Sequence[int], lengths: Sequence[int], budget: int, bins: int) -> list[list[int]] | None:
    """Indices of each of `bins` passes, or None where one would exceed the budget.

    With more passes than sequences none ever does.
    """
    load = [0] * bins
    dealt: list[list[int]] = [[] for _ in range(bins)]
    for i in order:
        lightest = min(range(bins), key=load.__getitem__)
        if load[lightest] and load[lightest] + lengths[i] > budget:
            return None
        load[lightest] += lengths[i]
        dealt[lightest].append(i)
    return dealt
