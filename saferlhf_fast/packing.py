"""Sequences one behind the other, without padding: what every forward pass takes, and how passes are filled.

A batch is cut into passes (micro-batches) by tokens, not by sequences: `fill` deals sequences to ranks and passes so that
all carry about the same number of tokens and none more than a budget. Losses are divided by counts over all passes and ranks,
so no result depends on how it was cut.

Shapes: S sequences of a pass, M their tokens, N the asked-for ones, one behind the other.
"""

import itertools
from dataclasses import dataclass

import torch

from .attention import Layout


@dataclass(frozen=True)
class Packed:
    """What one forward pass takes."""

    ids_M: torch.Tensor                  # int64
    positions_M: torch.Tensor            # int64: 0, 1, … in each sequence
    layout: Layout                       # where sequences begin and end
    rows_N: torch.Tensor                 # int64: where in M the hidden states lie that are asked for
    targets_N: torch.Tensor              # int64: the token that follows each of them, -1 at the end of a sequence
    counts: tuple                        # asked-for tokens of each sequence, host integers

    @property
    def lengths(self):
        """Tokens of each sequence, host integers."""
        return self.layout.lengths

    @property
    def cu_seqlens(self):
        """[S+1] int32: each sequence's first asked-for token in N."""
        return torch.tensor([0, *itertools.accumulate(self.counts)], dtype=torch.int32, device=self.ids_M.device)


def pack(sequences, asked, device):
    """-> Packed. sequences: lists of ids · asked: for each, the positions (ascending) whose hidden state is wanted.

    The position that predicts token t is t − 1: a response from token p on is range(p − 1, length − 1). ValueError for a
    position outside its sequence.
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
    made, rows_N = made.to(device, non_blocking=True), torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True)
    return Packed(made[0], made[2], Layout(lengths, device), rows_N, made[1].index_select(0, rows_N),
                  tuple(len(at) for at in asked))


def response_rows(prompt_length, length):
    """Positions that predict a response: the prompt's last token and all of the response but its last."""
    return range(prompt_length - 1, length - 1)


def end_row(length):
    """The last position, where a score is read."""
    return range(length - 1, length)


@dataclass(frozen=True)
class Padded:
    """The same sequences in rows of the longest, padded on the right: for architectures that cannot run packed."""

    ids_SL: torch.Tensor                 # int64
    mask_SL: torch.Tensor                # int64, 1 at real tokens
    positions_SL: torch.Tensor           # int64
    flat_M: torch.Tensor                 # where each packed token lies in [S·L]


def padded(packed):
    """-> Padded, made on the host from lengths: nothing is read from the device."""
    device, longest = packed.ids_M.device, packed.layout.longest
    flat = [row * longest + p for row, length in enumerate(packed.lengths) for p in range(length)]
    flat_M = torch.tensor(flat, dtype=torch.long, device=device)
    shape = (len(packed.lengths), longest)
    ids_SL, mask_SL, positions_SL = (
        torch.zeros(shape[0] * shape[1], dtype=torch.long, device=device).index_copy_(0, flat_M, values).view(shape)
        for values in (packed.ids_M, torch.ones_like(packed.ids_M), packed.positions_M))
    return Padded(ids_SL, mask_SL, positions_SL, flat_M)


def fill(lengths, budget, world=1):
    """Deals sequences to ranks and passes -> for each rank a list of passes, each a list of indices, shortest first.

    lengths: tokens of each sequence of the *global* batch · budget: most tokens of a pass; a longer sequence has one of its
    own. All ranks have equally many passes, as collectives demand; some may be empty. Longest first, each to the pass with
    the fewest tokens: passes and ranks then carry about as much. The same input gives the same answer on every rank.
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
    """Indices of each of `bins` passes, or None where one would burst; more passes than sequences never burst."""
    load, dealt = [0] * bins, [[] for _ in range(bins)]
    for i in order:
        at = min(range(bins), key=load.__getitem__)
        if load[at] and load[at] + lengths[i] > budget:
            return None
        load[at] += lengths[i]
        dealt[at].append(i)
    return dealt
