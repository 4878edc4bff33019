"""Makes batches of examples: splits by prompt, shares of ranks, padded tensors, harm labels.

Shapes: B sequences, L tokens of the longest, C categories of a taxonomy. The examples of an optimiser step
depend only on the seed, the epoch and the global batch size, not on the number of ranks nor on the passes
into which the step is divided (saferlhf_fast.models.packing). The last batch of an epoch may be smaller.
"""

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from saferlhf_fast.data.examples import PairExample, SFTExample
from saferlhf_fast.data.harm_taxonomy import TAXONOMIES
from saferlhf_fast.data.records import HarmLabel


class HasPrompt(Protocol):
    """An example of any kind."""

    @property
    def prompt_text(self) -> str:
        """The prompt as one text."""


ExampleT = TypeVar("ExampleT", bound=HasPrompt)


def split_by_prompt(
    examples: Sequence[ExampleT], fraction: float, seed: int = 0
) -> tuple[list[ExampleT], list[ExampleT]]:
    """Holds out about `fraction` of the prompts, with all of their examples.

    Whether a prompt is held out depends only on its text and the seed, so a prompt that occurs in several
    data sets is held out in all of them or in none.

    Args:
        examples: Examples of any kind.
        fraction: Share of the prompts to hold out.
        seed: Another seed holds out other prompts.

    Returns:
        (training, held out). Neither is empty if there are two prompts and 0 < fraction < 1.
    """
    if not fraction:
        return list(examples), []
    number_of: dict[str, float] = {}  # prompt -> a number from 0 to 1 that looks random
    for example in examples:
        key = " ".join(example.prompt_text.split())
        if key not in number_of:
            number_of[key] = prompt_number(key, seed)
    held_out = {key for key, number in number_of.items() if number < fraction}
    if len(number_of) > 1 and not held_out:
        held_out = {min(number_of, key=number_of.__getitem__)}
    if len(number_of) > 1 and len(held_out) == len(number_of):
        held_out.remove(max(number_of, key=number_of.__getitem__))
    is_held_out = [" ".join(example.prompt_text.split()) in held_out for example in examples]
    return (
        [example for example, out in zip(examples, is_held_out) if not out],
        [example for example, out in zip(examples, is_held_out) if out],
    )


def prompt_number(text: str, seed: int) -> float:
    """Returns a number from 0 to 1 that looks random: a prompt is held out where it is small.

    Args:
        text: The prompt; it does not matter how its words are spaced.
        seed: Another seed gives other numbers.
    """
    key = " ".join(text.split())
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def global_batches(n: int, size: int, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> list[list[int]]:
    """Returns the indices 0 … n−1 in the order of an epoch, in one list per optimiser step.

    Args:
        n: How many examples there are.
        size: Examples of a step, on all devices together; the last step may have fewer.
        seed: Seed of the order.
        epoch: Number of the epoch, from 0; each has an order of its own.
        shuffle: False keeps the order 0 … n−1.

    Raises:
        ValueError: size is below 1.
    """
    return list(batch_order(n, size, seed, epoch, shuffle))


def batch_order(
    n: int, size: int, seed: int = 0, epoch: int = 0, shuffle: bool = True
) -> Iterator[list[int]]:
    """As `global_batches`, one batch at a time: 8 bytes of memory for each example.

    Args:
        n: How many examples there are.
        size: Examples of a step.
        seed: Seed of the order.
        epoch: Number of the epoch.
        shuffle: False keeps the order 0 … n−1.

    Raises:
        ValueError: size is below 1.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    order = array("q", range(n))
    if shuffle:
        random.Random(f"order/{seed}/{epoch}").shuffle(order)
    yield from (order[start : start + size].tolist() for start in range(0, n, size))


def share(indices: Sequence[int], rank: int = 0, world: int = 1) -> Sequence[int]:
    """Returns a rank's share of a global batch: every world-th index.

    The sizes of shares differ by one at most; a share may be empty.
    """
    return indices[rank::world]


def collate_left(list_of_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads lists of token ids on the left, as generation needs them.

    Args:
        list_of_ids: B lists of ids.
        pad_id: The id of the padding.

    Returns:
        ids: [B, L] int64.
        mask: [B, L] bool, False on the padding.
    """
    # The mask comes from the lengths: made from the ids, it would be False on end-of-sequence tokens where
    # padding has the same id.
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
    """The harm labels of B responses. Unknown labels are marked; no loss may use them."""

    sign_B: torch.Tensor
    """int64: 1 unsafe, -1 safe, 0 unknown, as in the cost loss."""
    severity_B: torch.Tensor
    """int64: 0 to 3, -1 unknown."""
    categories_BC: torch.Tensor
    """bool: the response is harmful in this way; False where that is unknown."""
    known_BC: torch.Tensor
    """bool: the category is labelled."""


def collate_labels(examples: Sequence[PairExample | SFTExample], taxonomy: str = "pku") -> HarmLabels:
    """Makes the label tensors of a batch.

    Args:
        examples: Examples that were loaded with labels=True.
        taxonomy: A key of harm_taxonomy.TAXONOMIES, whose categories are the columns C. Labels of another
            taxonomy are unknown here, since a translation would be a guess (see harm_taxonomy.translate).

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
