"""What flows through a PPO step: Rollout -> Scored -> Advantages.

A stream is what a critic predicts: "reward", or a constraint by its name.
Shapes, as suffixes of names in every room: B sequences of this device, N response tokens of them, packed row
after row; b and n those of one pass, c (C in models/) the tokens of a chunk of whole sequences in it; M
positions of a pass, prompts included; S sequences and L longest length of a packed or padded pass; H hidden
size, V vocabulary. Ids and lengths live on the host, where sampling ended; what models say lives on the
device.
"""

from dataclasses import dataclass, field
from itertools import accumulate

import torch

from ..config.sections import COST, REWARD
from ..models.packing import end_row, pack_sequences, response_rows


@dataclass(frozen=True)
class Minibatch:
    """What one optimiser step learns from."""

    # slices of the rollout's rows, one for each forward pass; equally many on all ranks
    passes: list
    sequences: int  # with a response token, over all ranks
    tokens: int  # response tokens, over all ranks


@dataclass(frozen=True)
class Rollout:
    """Prompts and the responses that a policy gave, in the order of the passes that will read them."""

    sequences: list  # of each row its ids, a list: prompt, then response
    lengths: list  # of each row its response tokens, the end-of-sequence token included
    prompts: list  # PromptExample of each row
    texts: list  # decoded response of each row
    ended: list  # of each row: it stopped by itself, not at a limit
    order: list  # of each row its place in the global batch
    minibatches: list  # Minibatch of each optimiser step
    # (ids, response tokens) that a rank without rows in a pass runs at weight zero
    dummy: tuple
    device: torch.device
    # nats; what the engine said of its tokens, None where it is silent
    engine_logp_N: torch.Tensor | None = None
    version: int = 0  # PPO steps that the policy has made since it sampled

    size: int = 0  # sequences of the global batch
    # what frozen models said of each row while others were sampled; None: not asked yet
    frozen_scores: tuple = ()

    def __len__(self):
        return len(self.sequences)

    @property
    def passes(self):
        """Slices of rows of all forward passes, in order."""
        return [rows for minibatch in self.minibatches for rows in minibatch.passes]

    @property
    def ends(self):
        """[B+1] host integers: each row's first response token in N."""
        return [0, *accumulate(self.lengths)]

    @property
    def cu_seqlens(self):
        """[B+1] int32."""
        return torch.tensor(self.ends, dtype=torch.int32, device=self.device)

    def tokens(self, rows):
        """Slice of N that belongs to a slice of rows."""
        return slice(self.ends[rows.start], self.ends[rows.stop])

    def packed(self, rows, at_end=False):
        """-> Packed of some rows that asks for what predicts each response token, or for the last position.

        For no rows the dummy comes instead; who asks leaves its numbers out.
        """
        sequences, lengths = self.sequences[rows], self.lengths[rows]
        if not sequences:
            sequences, lengths = [self.dummy[0]], [self.dummy[1]]
        asked = [
            end_row(len(ids)) if at_end else response_rows(len(ids) - n, len(ids))
            for ids, n in zip(sequences, lengths)
        ]
        return pack_sequences(sequences, asked, self.device)


@dataclass(frozen=True)
class Scored:
    """What the models say of a rollout, at the weights they have when the batch is learned from."""

    ref_logp_N: torch.Tensor  # nats, reference
    reward_B: torch.Tensor
    costs: dict = field(default_factory=dict)  # {name of a cost: cost_B}, > 0: unsafe
    # nats, actor; None where the update's own forward passes give it
    logp_N: torch.Tensor | None = None
    values: dict = field(default_factory=dict)  # {stream: V before each response token, N}; {} there


@dataclass(frozen=True)
class Advantages:
    """What the update learns from."""

    advantages_N: torch.Tensor  # combined, (A_r − λ·A_c) / (1 + λ)
    returns: dict  # {stream: returns_N}
    stats: dict  # 0-d tensors, named by ppo_lag_advantage


@dataclass(frozen=True)
class Response:
    """What was sampled for one prompt."""

    ids: list  # up to and including the end token; no padding
    # of each id under the sampling settings, nats; None: the engine does not tell
    logp: list | None
    ended: bool  # stopped by itself (end token or stop string), not at its limit


def per_constraint(stem, name, names):
    """Name of a number of one cost out of `names`: the stem alone, with /<name> behind it where there are
    several costs.
    """
    return stem if len(names) == 1 else f"{stem}/{name}"


def per_stream(stem, stream, names):
    """Name of a number of one stream: reward_<stem>, cost_<stem>; names: of all constraints."""
    return f"{REWARD}_{stem}" if stream == REWARD else per_constraint(f"{COST}_{stem}", stream, names)
