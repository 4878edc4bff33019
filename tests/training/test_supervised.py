"""What the supervised stages log about their progress."""

import itertools

import kit
import pytest

from saferlhf_fast.config.sections import Training
from saferlhf_fast.data.batches import global_batches
from saferlhf_fast.training.supervised import epochs_after, global_size, total_steps


@pytest.mark.parametrize(
    "n, batch, accumulation, ranks",
    [(10, 4, 1, 1), (10, 1, 2, 2), (8, 2, 2, 1), (1, 1, 1, 1), (3, 2, 2, 2), (7, 7, 1, 1), (101, 5, 1, 2)],
)
def test_logged_epochs_are_the_examples_that_were_learned(n, batch, accumulation, ranks):
    """Also for steps that a resumed run makes: the epoch depends on the step alone."""
    train = Training(batch_size=batch, accumulation=accumulation, epochs=3)
    size, seen = global_size(train, ranks), 0
    batches = itertools.chain.from_iterable(global_batches(n, size, epoch=epoch) for epoch in range(3))
    for step, indices in enumerate(batches, 1):
        seen += len(indices)
        assert epochs_after(step, n, size) == pytest.approx(seen / n)
    assert epochs_after(step, n, size) == 3 and total_steps(n, train, ranks) == step


def test_a_run_with_accumulation_and_a_short_last_step_logs_these_epochs(tmp_path):
    model, data = kit.make_model(tmp_path / "model"), kit.make_data(tmp_path / "data", n=10)
    for stage in ("sft", "reward", "dpo"):
        folder = kit.run(
            stage,
            tmp_path / stage,
            model=model,
            data=data["sft" if stage == "sft" else "pairs"],
            train__batch_size=2,
            train__accumulation=2,
            train__epochs=2,
            log__trackers="[]",
        )
        assert kit.losses(folder, "train/epoch") == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])
