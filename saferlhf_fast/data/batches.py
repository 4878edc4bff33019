"""Examples -> batches: splits by prompt, shares of ranks, padded tensors, harm labels.

Shapes: B sequences, L tokens of the longest, C categories of a taxonomy. Which examples make up an optimiser
step depends on the seed, the epoch and the global batch size alone, not on the number of ranks nor on how it
is cut into passes (saferlhf_fast.models.packing); the last batch of an epoch may be smaller and is kept.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saferlhf_fast.data.examples import PairExample, SFTExample
from saferlhf_fast.data.harm_taxonomy import TAXONOMIES
from saferlhf_fast.data.records import HarmLabel


def split_by_prompt(examples, fraction, seed=0):
    """(training, held out): about `fraction` of the prompts are held out, with all of their examples.

    A prompt's side depends on its text and the seed alone, so a prompt that occurs in several data sets is on
    the same side in all of them. Neither side is empty if there are two prompts and 0 < fraction < 1.
    """
    if not fraction:
        return list(examples), []
    place = {}
    for example in examples:
        key = " ".join(example.prompt_text.split())
        if key not in place:
            digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
            place[key] = int.from_bytes(digest[:8], "big") / 2**64
    held = {key for key, at in place.items() if at < fraction}
    if len(place) > 1 and not held:
        held = {min(place, key=place.get)}
    if len(place) > 1 and len(held) == len(place):
        held.remove(max(place, key=place.get))
    sides = [" ".join(example.prompt_text.split()) in held for example in examples]
    return (
        [example for example, out in zip(examples, sides) if not out],
        [example for example, out in zip(examples, sides) if out],
    )


def global_batches(n, size, seed=0, epoch=0, shuffle=True):
    """Indices 0 … n−1 in the epoch's order -> lists of `size` (the last may be shorter): one list per
    optimiser step.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    order = list(range(n))
    if shuffle:
        random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return [order[start : start + size] for start in range(0, n, size)]


def share(indices, rank=0, world=1):
    """A rank's part of a global batch: every world-th index. Parts differ by one at most and may be empty."""
    return indices[rank::world]


def collate_left(list_of_ids, pad_id):
    """Lists of ids -> (ids [B, L] int64 padded on the left, mask [B, L] bool): for generation."""
    # The mask comes from the lengths: told from the ids, it would lose the end-of-sequence token where pad
    # equals it.
    lengths = [len(ids) for ids in list_of_ids]
    width = max(lengths, default=0)
    ids_BL = torch.full((len(lengths), width), pad_id, dtype=torch.long)
    mask_BL = torch.zeros((len(lengths), width), dtype=torch.bool)
    for row, (ids, length) in enumerate(zip(list_of_ids, lengths)):
        ids_BL[row, width - length :] = torch.as_tensor(ids, dtype=torch.long)
        mask_BL[row, width - length :] = True
    return ids_BL, mask_BL


@dataclass(frozen=True, slots=True)
class HarmLabels:
    """The harm labels of B responses. What is unknown is marked as that and belongs in no loss."""

    sign_B: torch.Tensor
    """int64: 1 unsafe, -1 safe, 0 unknown, as in the cost loss."""
    severity_B: torch.Tensor
    """int64: 0 to 3, -1 unknown."""
    categories_BC: torch.Tensor
    """bool: the response is harmful in this way; False where it is unknown."""
    known_BC: torch.Tensor
    """bool: the category is labelled."""


def collate_labels(examples: Sequence[PairExample | SFTExample], taxonomy: str = "pku") -> HarmLabels:
    """Makes the label tensors of a batch; a stage that does not call it has none.

    Args:
        examples: Examples that were loaded with labels=True.
        taxonomy: A key of harm_taxonomy.TAXONOMIES, whose categories are the columns C. Labels of another
        taxonomy are
            unknown here: a translation would guess (harm_taxonomy.translate tells how far).

    Returns:
        Tensors with one row for each response: all first responses of pairs, then all second ones, which is
        the order in which the stages stack the sequences of pairs.

    Raises:
        ValueError: The taxonomy is unknown, an example has no labels, or pairs and single responses are
        mixed.
    """
    if taxonomy not in TAXONOMIES:
        raise ValueError(f"taxonomy: expected one of {', '.join(TAXONOMIES)}, got {taxonomy!r}")
    sizes = {len(example.labels) for example in examples}
    if 0 in sizes:
        raise ValueError("examples: expected harm labels, got an example without; load them with labels=True")
    if len(sizes) > 1:
        raise ValueError("examples: expected pairs or single responses, got both")
    labels = [label for column in zip(*(example.labels for example in examples)) for label in column]
    flags = [_flags_in(label, taxonomy) for label in labels]
    shape = (len(labels), len(TAXONOMIES[taxonomy]))
    return HarmLabels(
        torch.tensor([label.sign for label in labels], dtype=torch.long),
        torch.tensor(
            [-1 if label.severity is None else label.severity for label in labels], dtype=torch.long
        ),
        torch.tensor([[flag is True for flag in row] for row in flags], dtype=torch.bool).reshape(shape),
        torch.tensor([[flag is not None for flag in row] for row in flags], dtype=torch.bool).reshape(shape),
    )


def _flags_in(label: HarmLabel, taxonomy: str) -> tuple[bool | None, ...]:
    return label.categories if label.taxonomy == taxonomy else (None,) * len(TAXONOMIES[taxonomy])
