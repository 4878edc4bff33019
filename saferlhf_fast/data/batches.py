"""Examples -> batches: splits by prompt, shares of ranks, padded tensors.

Shapes: B sequences, L tokens of the longest. Which examples make up an optimiser step depends on the seed, the epoch and
the global batch size alone, not on the number of ranks nor on how it is cut into passes (saferlhf_fast.models.packing); the last
batch of an epoch may be smaller and is kept.
"""

import hashlib
import random

import torch


def split_by_prompt(examples, fraction, seed=0):
    """(training, held out): about `fraction` of the prompts are held out, with all of their examples.

    A prompt's side depends on its text and the seed alone, so a prompt that occurs in several data sets is on the same
    side in all of them. Neither side is empty if there are two prompts and 0 < fraction < 1.
    """
    if not fraction:
        return list(examples), []
    place = {}
    for example in examples:
        key = " ".join(example.prompt_text.split())
        if key not in place:
            digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
            place[key] = int.from_bytes(digest[:8], "big") / 2 ** 64
    held = {key for key, at in place.items() if at < fraction}
    if len(place) > 1 and not held:
        held = {min(place, key=place.get)}
    if len(place) > 1 and len(held) == len(place):
        held.remove(max(place, key=place.get))
    sides = [" ".join(example.prompt_text.split()) in held for example in examples]
    return ([example for example, out in zip(examples, sides) if not out],
            [example for example, out in zip(examples, sides) if out])


def global_batches(n, size, seed=0, epoch=0, shuffle=True):
    """Indices 0 … n−1 in the epoch's order -> lists of `size` (the last may be shorter): one list per optimiser step."""
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    order = list(range(n))
    if shuffle:
        random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return [order[start:start + size] for start in range(0, n, size)]


def share(indices, rank=0, world=1):
    """A rank's part of a global batch: every world-th index. Parts differ by one at most and may be empty."""
    return indices[rank::world]


def collate_left(list_of_ids, pad_id):
    """Lists of ids -> (ids [B, L] int64 padded on the left, mask [B, L] bool): for generation."""
    # The mask comes from the lengths: told from the ids, it would lose the end-of-sequence token where pad equals it.
    lengths = [len(ids) for ids in list_of_ids]
    width = max(lengths, default=0)
    ids_BL = torch.full((len(lengths), width), pad_id, dtype=torch.long)
    mask_BL = torch.zeros((len(lengths), width), dtype=torch.bool)
    for row, (ids, length) in enumerate(zip(list_of_ids, lengths)):
        ids_BL[row, width - length:] = torch.as_tensor(ids, dtype=torch.long)
        mask_BL[row, width - length:] = True
    return ids_BL, mask_BL
