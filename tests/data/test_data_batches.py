"""Batches: equal global batches for any number of ranks; the padding mask comes from the lengths."""

import subprocess
import sys

import pytest
import torch

from saferlhf_fast.data.batches import collate_left, global_batches, share


@pytest.mark.parametrize("n, size", [(1, 1), (1, 4), (7, 3), (12, 4), (63, 10)])
def test_epochs_visit_everything_once_in_a_seeded_order(n, size):
    batches = global_batches(n, size, seed=1, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1) and 1 <= len(
        batches[-1]
    ) <= size
    assert batches == global_batches(n, size, seed=1, epoch=0)
    if n > 10:
        assert batches != global_batches(n, size, seed=1, epoch=1) != global_batches(n, size, seed=2, epoch=1)
    assert global_batches(n, size, shuffle=False)[0] == list(range(min(n, size)))


def test_no_examples_give_no_batches():
    assert global_batches(0, 4) == []
    with pytest.raises(ValueError, match="at least 1"):
        global_batches(4, 0)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_are_the_global_batch(world):
    for batch in global_batches(13, 6, seed=0):
        assert sorted(i for rank in range(world) for i in share(batch, rank, world)) == sorted(batch)


def test_collate_left_masks_by_length_and_not_by_id():
    rows, pad = [[5, 2], [7], [], [2, 2, 2]], 2
    ids, mask = collate_left(rows, pad)
    assert ids.tolist() == [[2, 5, 2], [2, 2, 7], [2, 2, 2], [2, 2, 2]] and ids.dtype == torch.long
    assert mask.tolist() == [[False, True, True], [False, False, True], [False] * 3, [True] * 3]
    assert collate_left([], 0)[0].shape == (0, 0)


def test_importing_data_imports_no_heavy_library():
    code = (
        "import sys, saferlhf_fast.data; "
        "print([name for name in ('transformers', 'deepspeed', 'datasets', 'pyarrow') if name in "
        "sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
