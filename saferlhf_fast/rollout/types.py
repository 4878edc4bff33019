"""What flows through a PPO step: Rollout -> Scored -> Advantages.

A stream is what a critic predicts: "reward", or a constraint by its name. Ids and lengths are on the host,
where sampling ended; what models compute is on the device.

Shapes are suffixes of names, one letter for each axis. The legend of every room:

    B   sequences of this device; rows of a padded batch
    N   packed tokens that something is predicted for, row after row: a rollout's response tokens, the
        requested tokens of a pass, the rows of logits of a step of sampling
    b n B and N of one pass, where both are in use
    C   tokens of a chunk of N, whose logits exist at one time; c in training/
    M   packed tokens of a pass, prompts included
    S   sequences of a pass, of a run of equal lengths, or of a call of a rollout engine
    L   columns of padded rows of ids, prompts included: the longest length
    T   columns of padded rows in the ops and in `pack`; steps of sampling
    H   hidden size
    V   vocabulary
    A   attention heads
    D   size of an attention head
    J   blocks of the vocabulary
    K   candidates for the next token: those of a block, or of a nucleus
    1   an axis of length one

A file that needs another letter, or one of these for something else (tiles and critics in kernels/,
categories in data/), explains it in its first docstring.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ..config.sections import COST, REWARD
from ..models.packing import Packed, end_row, pack_sequences, response_rows

if TYPE_CHECKING:
    from ..data.examples import PromptExample

FrozenScores = tuple[list[float], *tuple[float, ...]]
"""Of one row: reference log-probs of its response (nats), then its score by each scorer."""


@dataclass(frozen=True)
class Minibatch:
    """What one optimiser step learns from."""

    passes: list[slice]  # of the rollout's rows, one for each forward pass; equally many on all ranks
    sequences: int  # with a response token, over all ranks
    tokens: int  # response tokens, over all ranks


@dataclass(frozen=True)
class Rollout:
    """Prompts and the responses that a policy gave, in the order of the passes that will read them."""

    sequences: list[list[int]]  # ids of each row: prompt, then response
    lengths: list[int]  # response tokens of each row, the end-of-sequence token included
    prompts: "list[PromptExample]"  # of each row
    texts: list[str]  # decoded response of each row
    ended: list[bool]  # whether each row stopped by itself, not at a limit
    order: list[int]  # place of each row in the global batch
    minibatches: list[Minibatch]  # one for each optimiser step
    dummy: tuple[list[int], int]  # (ids, response tokens) of the dummy micro-batch for a pass without rows
    device: torch.device
    engine_logp_N: torch.Tensor | None = None  # nats, from the rollout engine; None where it reports none
    version: int = 0  # PPO steps that the policy has taken since it sampled

    size: int = 0  # sequences of the global batch
    # of each row, computed while other rows were sampled; None, or (): not computed yet
    frozen_scores: Sequence[FrozenScores | None] = ()
    # of each row, the mean probability of rows without a token, which sampling cut away; None: as in Response
    spare_mass: list[float] | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def passes(self) -> list[slice]:
        """Slices of rows of all forward passes, in order."""
        return [rows for minibatch in self.minibatches for rows in minibatch.passes]

    @property
    def offsets(self) -> list[int]:
        """[B+1] host integers: each row's first response token in N."""
        return [0, *accumulate(self.lengths)]

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """`offsets` on the device, int32 [B+1]."""
        return torch.tensor(self.offsets, dtype=torch.int32, device=self.device)

    def tokens(self, rows: slice) -> slice:
        """Slice of N that belongs to a slice of rows."""
        return slice(self.offsets[rows.start], self.offsets[rows.stop])

    def packed(self, rows: slice, at_end: bool = False) -> Packed:
        """Packs some rows for a forward pass.

        Args:
            rows: The rows. For none the dummy micro-batch is packed; the caller leaves its numbers out.
            at_end: Take the last position of each row, not those that predict response tokens.

        Returns:
            The packed tokens.
        """
        sequences, lengths = self.sequences[rows], self.lengths[rows]
        if not sequences:
            sequences, lengths = [self.dummy[0]], [self.dummy[1]]
        positions = [
            end_row(len(ids)) if at_end else response_rows(len(ids) - n, len(ids))
            for ids, n in zip(sequences, lengths)
        ]
        return pack_sequences(sequences, positions, self.device)


@dataclass(frozen=True)
class Scored:
    """What the models give for a rollout, at the weights they have when the update uses the batch.

    `logp_N` is None, and `values` empty, where the update's own forward passes compute them.
    """

    ref_logp_N: torch.Tensor  # nats, reference
    reward_B: torch.Tensor
    costs: dict[str, torch.Tensor] = field(default_factory=dict)  # {name of a cost: cost_B}, > 0: unsafe
    logp_N: torch.Tensor | None = None  # nats, the old log-probs: of the actor before the update
    values: dict[str, torch.Tensor] = field(default_factory=dict)  # {stream: value_N before each token}


@dataclass(frozen=True)
class Advantages:
    """What the update learns from."""

    advantages_N: torch.Tensor  # combined, (A_r − λ·A_c) / (1 + λ)
    returns: dict[str, torch.Tensor]  # {stream: returns_N}
    stats: dict[str, torch.Tensor]  # 0-d, by ppo_lag_advantage's names


@dataclass(frozen=True)
class Response:
    """What was sampled for one prompt."""

    ids: list[int]  # up to and including the end token; no padding
    logp: list[float] | None  # of each id under the sampling settings, nats; None: the engine reports none
    ended: bool  # stopped by itself (end token or stop string), not at its limit
    # of each id, the probability of the rows without a token, which sampling cut away; None: there are no
    # such rows, or the engine does not measure it
    spare_mass: list[float] | None = None


def per_constraint(stem: str, name: str, names: Collection[str]) -> str:
    """The metric name of one cost out of `names`: the stem, or <stem>/<name> where there are several."""
    return stem if len(names) == 1 else f"{stem}/{name}"


def per_stream(stem: str, stream: str, names: Collection[str]) -> str:
    """The metric name of one stream: reward_<stem>, cost_<stem>.

    Args:
        stem: What is measured.
        stream: "reward", or a constraint's name.
        names: Names of all constraints.

    Returns:
        The name; with several constraints cost_<stem>/<stream>.
    """
    return f"{REWARD}_{stem}" if stream == REWARD else per_constraint(f"{COST}_{stem}", stream, names)
