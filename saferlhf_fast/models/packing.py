"""Sequences one behind the other, without padding: what every forward pass takes, how passes are filled, and
the way there from padded rows and back.

    packed = pack_sequences(sequences, asked, device)              # lists of ids -> Packed, which every model
    here takes packed, cu_seqlens = pack(padded, mask)                        # [B, T, …] -> [N, …] and int32
    [B+1], for loops of your own padded = unpack(packed, cu_seqlens, mask=mask)                 # where they
    were padded = unpack(packed, cu_seqlens)                            # rows moved to the left, padding
    behind

A batch is cut into passes (micro-batches) by tokens, not by sequences: `pack_into_microbatches` deals
sequences to ranks and passes so that all carry about the same number of tokens and none more than a budget.
Losses are divided by counts over all passes and ranks, so no result depends on how it was cut. Every op of
this package takes packed tokens and padded rows alike. Needs torch alone.

Shapes: S sequences of a pass, M their tokens, N the asked-for ones, one behind the other; of padded rows: B
rows, T columns, N real tokens.
"""

import itertools
import math
from dataclasses import dataclass
from numbers import Complex, Integral, Real
from typing import Any

import torch


class Layout:
    """Where sequences lie in packed tokens: what attention needs to know, made once for all layers.

    lengths: host integers · runs: (sequences, length) of neighbours of one length · cu_seqlens [S+1] int32 on
    the device.
    """

    def __init__(self, lengths, device):
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
    rows_N: torch.Tensor  # int64: where in M the hidden states lie that are asked for
    # int64: the token that follows each of them, -1 at the end of a sequence
    targets_N: torch.Tensor
    counts: tuple  # asked-for tokens of each sequence, host integers

    @property
    def lengths(self):
        """Tokens of each sequence, host integers."""
        return self.layout.lengths

    @property
    def cu_seqlens(self):
        """[S+1] int32: each sequence's first asked-for token in N."""
        return torch.tensor(
            [0, *itertools.accumulate(self.counts)], dtype=torch.int32, device=self.ids_M.device
        )


def pack_sequences(sequences, asked, device):
    """-> Packed. sequences: lists of ids · asked: for each, the positions (ascending) whose hidden state is
    wanted.

    The position that predicts token t is t − 1: a response from token p on is range(p − 1, length − 1).
    ValueError for a position outside its sequence.
    """
    lengths = [len(ids) for ids in sequences]
    starts = [0, *itertools.accumulate(lengths)]
    for at, length in zip(asked, lengths):
        if len(at) and not 0 <= at[0] <= at[-1] < length:
            raise ValueError(f"asked: expected positions in 0 … {length - 1}, got {at[0]} … {at[-1]}")
    ids = list(itertools.chain.from_iterable(sequences))
    after = list(itertools.chain.from_iterable((*s[1:], -1) for s in sequences))
    rows = [start + p for start, at in zip(starts, asked) for p in at]
    made = torch.tensor([ids, after, [p for length in lengths for p in range(length)]], dtype=torch.long)
    made, rows_N = (
        made.to(device, non_blocking=True),
        torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True),
    )
    return Packed(
        made[0],
        made[2],
        Layout(lengths, device),
        rows_N,
        made[1].index_select(0, rows_N),
        tuple(len(at) for at in asked),
    )


def response_rows(prompt_length, length):
    """Positions that predict a response: the prompt's last token and all of the response but its last."""
    return range(prompt_length - 1, length - 1)


def end_row(length):
    """The last position, where a score is read."""
    return range(length - 1, length)


@dataclass(frozen=True)
class Padded:
    """The same sequences in rows of the longest, padded on the right: for architectures that cannot run
    packed.
    """

    ids_SL: torch.Tensor  # int64
    mask_SL: torch.Tensor  # int64, 1 at real tokens
    positions_SL: torch.Tensor  # int64
    flat_M: torch.Tensor  # where each packed token lies in [S·L]


def padded(packed):
    """-> Padded, made on the host from lengths: nothing is read from the device."""
    device, longest = packed.ids_M.device, packed.layout.longest
    flat = [row * longest + p for row, length in enumerate(packed.lengths) for p in range(length)]
    flat_M = torch.tensor(flat, dtype=torch.long, device=device)
    shape = (len(packed.lengths), longest)
    ids_SL, mask_SL, positions_SL = (
        torch.zeros(shape[0] * shape[1], dtype=torch.long, device=device)
        .index_copy_(0, flat_M, values)
        .view(shape)
        for values in (packed.ids_M, torch.ones_like(packed.ids_M), packed.positions_M)
    )
    return Padded(ids_SL, mask_SL, positions_SL, flat_M)


def pack_into_microbatches(lengths, budget, world=1):
    """Deals sequences to ranks and passes -> for each rank a list of passes, each a list of indices, shortest
    first.

    lengths: tokens of each sequence of the *global* batch · budget: most tokens of a pass; a longer sequence
    has one of its own. All ranks have equally many passes, as collectives demand; some may be empty. Longest
    first, each to the pass with the fewest tokens: passes and ranks then carry about as much. The same input
    gives the same answer on every rank.
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


def _deal(order, lengths, budget, bins):
    """Indices of each of `bins` passes, or None where one would burst; more passes than sequences never
    burst.
    """
    load, dealt = [0] * bins, [[] for _ in range(bins)]
    for i in order:
        at = min(range(bins), key=load.__getitem__)
        if load[at] and load[at] + lengths[i] > budget:
            return None
        load[at] += lengths[i]
        dealt[at].append(i)
    return dealt


def pack(
    padded: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...], mask: torch.Tensor
) -> tuple[Any, torch.Tensor]:
    """The real tokens of padded rows, one row behind the other: [B, T, …] -> (packed [N, …], cu_seqlens int32
    [B+1]).

    padded: a tensor of any dtype, or a list or tuple of them (then packed is a tuple). mask: [B, T], boolean
    or integers 0 and 1, on the tensors' device; in any pattern: padding on either side, holes, rows without a
    token. cu_seqlens[b] is the place of row b's first token in N. Differentiable; masked entries get gradient
    0. N is known to the host only once it has counted: on a device this waits for it. Raises ValueError for
    shapes, dtypes or devices that do not fit.
    """
    tensors = list(padded) if isinstance(padded, (list, tuple)) else [padded]
    mask = boolean("pack", mask)
    for i, tensor in enumerate(tensors):
        name = "padded" if tensor is padded else f"padded[{i}]"
        if tensor.shape[:2] != mask.shape:
            raise ValueError(
                f"pack: {name}: expected shape [B, T, …] with the mask's [B, T] = {list(mask.shape)}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != mask.device:
            raise ValueError(f"pack: {name}: expected device {mask.device} as mask, got {tensor.device}")
    at_N = mask.reshape(-1).nonzero().squeeze(1)
    packed = tuple(
        tensor.reshape(mask.numel(), *tensor.shape[2:]).index_select(0, at_N) for tensor in tensors
    )
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(mask.sum(1), 0, dtype=torch.int32, out=cu_seqlens[1:])
    return (packed if isinstance(padded, (list, tuple)) else packed[0]), cu_seqlens


def unpack(
    packed: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...],
    cu_seqlens: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    width: int | None = None,
    fill: float = 0,
) -> Any:
    """Packed tokens in padded rows: [N, …] and int32 [B+1] -> [B, T, …]; the inverse of `pack` when given its
    mask.

    packed: a tensor, or a list or tuple of them (then the result is a tuple). mask: [B, T], boolean or
    integers 0 and 1, with as many ones in each row as cu_seqlens says; row b's tokens go to its ones, in
    order. Without it they go to the left of rows that are `width` wide (default: as long as the longest).
    fill: what stands at every other place; the dtype has to hold it: an int exactly, a float as nearly as the
    dtype can. Differentiable. On a device this waits for the lengths. Raises ValueError for what does not
    fit.
    """
    tensors = list(packed) if isinstance(packed, (list, tuple)) else [packed]
    offsets = _offsets(cu_seqlens)
    device, lengths_B = (
        cu_seqlens.device,
        torch.tensor([b - a for a, b in zip(offsets, offsets[1:])], dtype=torch.long),
    )
    for i, tensor in enumerate(tensors):
        name = "packed" if tensor is packed else f"packed[{i}]"
        if tensor.dim() < 1 or tensor.shape[0] != offsets[-1]:
            raise ValueError(
                f"unpack: {name}: expected shape [N, …] with N = cu_seqlens[-1] = {offsets[-1]}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"unpack: {name}: expected device {device} as cu_seqlens, got {tensor.device}")
        _holds(name, tensor.dtype, fill)
    longest = int(lengths_B.max()) if len(lengths_B) else 0
    if mask is None:
        width = longest if width is None else width
        if isinstance(width, bool) or not hasattr(width, "__index__"):
            raise ValueError(f"unpack: width: expected a whole number of columns, got {width!r}")
        if width < longest:
            raise ValueError(f"unpack: width: expected at least the longest row's {longest}, got {width}")
        mask = (torch.arange(width) < lengths_B[:, None]).to(device)
    elif width is not None:
        raise ValueError("unpack: expected mask or width, got both")
    else:
        mask = boolean("unpack", mask)
        if mask.device != device:
            raise ValueError(f"unpack: mask: expected device {device} as cu_seqlens, got {mask.device}")
        counts = mask.sum(1).tolist()
        if counts != lengths_B.tolist():
            row = next((b for b, (ones, n) in enumerate(zip(counts, lengths_B.tolist())) if ones != n), None)
            raise ValueError(
                f"unpack: mask: expected {len(lengths_B)} rows, got {len(counts)}"
                if row is None
                else f"unpack: mask: expected {int(lengths_B[row])} ones in row {row}, got {counts[row]}"
            )
    at_N = mask.reshape(-1).nonzero().squeeze(1)
    padded = tuple(
        tensor.new_full((mask.numel(), *tensor.shape[1:]), fill)
        .index_copy(0, at_N, tensor)
        .reshape(*mask.shape, *tensor.shape[1:])
        for tensor in tensors
    )
    return padded if isinstance(packed, (list, tuple)) else padded[0]


def _holds(name, dtype, fill):
    """ValueError for a fill that is no number, and for one that `dtype` would wrap, overflow or, an int,
    round.
    """
    if isinstance(fill, torch.Tensor) and fill.numel() == 1 and not fill.is_meta:
        fill = fill.item()
    if not isinstance(fill, Complex if dtype.is_complex else Real):
        raise ValueError(
            f"unpack: fill: expected a {'' if dtype.is_complex else 'real '}number for {name} of dtype "
            f"{dtype}, "
            f"got {fill!r}"
        )
    if dtype.is_complex:
        for part in (fill.real, fill.imag):
            _holds(name, dtype.to_real(), part)
    elif dtype.is_floating_point:
        _fits(name, dtype, fill)
    else:
        if not isinstance(fill, Integral) and not float(fill).is_integer():
            raise ValueError(f"unpack: fill: expected an integer for {name} of dtype {dtype}, got {fill}")
        least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        if not least <= fill <= most:
            raise ValueError(
                f"unpack: fill: expected {least} … {most} for {name} of dtype {dtype}, got {_shown(fill)}"
            )


def _fits(name, dtype, fill):
    """ValueError for a real fill beyond a floating point dtype, and for an int between two of its numbers: it
    stands for a mark that somebody will look for, as -100, and would not be found.
    """
    most = torch.finfo(dtype).max
    if isinstance(fill, Integral) and abs(fill) > most or math.isfinite(fill) and abs(fill) > most:
        raise ValueError(
            f"unpack: fill: expected at most {most:g} either way for {name} of dtype {dtype}, got "
            f"{_shown(fill)}"
        )
    if isinstance(fill, Integral):
        held = int(torch.tensor(float(fill), dtype=torch.float64).to(dtype).item())
        if held != fill:
            raise ValueError(
                f"unpack: fill: expected an integer that {dtype} holds for {name}, got {fill}, "
                f"which would become {held}"
            )


def _shown(fill):
    """A number as a message has it: one of hundreds of digits by its size."""
    return (
        str(fill)
        if not isinstance(fill, Integral) or abs(fill) < 10**30
        else f"a number of {int(fill).bit_length()} bits"
    )


def boolean(op, mask):
    """A mask [B, T] as booleans; integers must be 0 and 1.

    Its values are read: a mask without any (on meta) is refused.
    """
    if mask.dim() != 2 or mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise ValueError(
            f"{op}: mask: expected booleans (or integers 0 and 1) [B, T], got {mask.dtype} {list(mask.shape)}"
        )
    if mask.is_meta:
        raise ValueError(f"{op}: mask: expected a device with values, got meta")
    if mask.dtype == torch.bool:
        return mask
    ones = mask != 0
    if not torch.equal(ones, mask == 1):
        raise ValueError(f"{op}: mask: expected booleans or integers 0 and 1, got other integers")
    return ones


def _offsets(cu_seqlens):
    """Offsets as host integers, checked: from 0 on, never falling."""
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"unpack: cu_seqlens: expected int32 offsets [B+1], got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}"
        )
    if cu_seqlens.is_meta:
        raise ValueError("unpack: cu_seqlens: expected a device with values, got meta")
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or any(b < a for a, b in zip(offsets, offsets[1:])):
        raise ValueError(
            f"unpack: cu_seqlens: expected offsets that start at 0 and never fall, got {offsets[:8]}"
        )
    return offsets
