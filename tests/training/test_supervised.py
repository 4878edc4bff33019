"""What the supervised stages log about their progress."""

import itertools

import pytest

from saferlhf_fast.data.batches import global_batches
from saferlhf_fast.training.supervised import epochs_after


@pytest.mark.parametrize("n, size", [(10, 4), (8, 4), (1, 1), (3, 8), (7, 7), (101, 10)])
def test_logged_epochs_are_the_examples_that_were_learned(n, size):
    batches = itertools.chain.from_iterable(global_batches(n, size, epoch=epoch) for epoch in range(3))
    seen = 0
    for step, batch in enumerate(batches, 1):
        seen += len(batch)
        assert epochs_after(step, n, size) == pytest.approx(seen / n)
    assert epochs_after(step, n, size) == 3
