"""BestCheckpoint: the best or the last is kept, with its weights; checkpoints of before, in both of their
forms, are read.
"""

import pytest

from saferlhf_fast.training.best_checkpoint import BestCheckpoint


def offered(scores, keep=None, best=None):
    """A BestCheckpoint that was offered some scores, in steps 1, 2, …"""
    best = best or BestCheckpoint(lambda evaluation: [evaluation["score"]], keep)
    for step, score in enumerate(scores, 1):
        best.offer(step, {"score": score})
    return best


def test_the_best_evaluation_is_kept_with_the_weights_of_its_step():
    kept = iter("abcd")
    best = offered([1.0, 3.0, 3.0, 2.0], lambda: next(kept))
    assert (best.step, best.evaluation, best.weights) == (2, {"score": 3.0}, "b")  # the first of equals
    # nothing was kept in vain
    assert next(kept) == "c"


def test_without_keep_the_last_evaluation_counts():
    best = offered([1.0, 3.0, 2.0])
    assert (best.step, best.evaluation, best.weights) == (3, {"score": 2.0}, None)


def test_a_restored_best_checkpoint_compares_with_its_earlier_best():
    again = BestCheckpoint(lambda evaluation: [evaluation["score"]], lambda: "new")
    again.load_state_dict(offered([1.0, 3.0], lambda: "old").state_dict())
    again.offer(3, {"score": 2.0})
    assert (again.step, again.weights) == (2, "old")
    again.offer(4, {"score": 4.0})
    assert (again.step, again.weights) == (4, "new")


@pytest.mark.parametrize(
    "older, expected",
    [
        (
            {"value": 0.5, "values": {"eval/loss": 0.5}, "step": 4},
            {"step": 4, "evaluation": {"eval/loss": 0.5}, "weights": None},
        ),
        ({"value": None, "values": None, "step": None}, {"step": None, "evaluation": None, "weights": None}),
        (
            {
                "best": [1, 2.0],
                "rows": [{"reward": 2.0}],
                "step": 3,
                "state": {"w": 1},
                "multiplier_then": 0.5,
            },
            {"step": 3, "evaluation": {"rows": [{"reward": 2.0}], "multiplier": 0.5}, "weights": {"w": 1}},
        ),
        (
            {"best": None, "rows": None, "step": None, "state": None, "multiplier_then": None},
            {"step": None, "evaluation": {"rows": None, "multiplier": None}, "weights": None},
        ),
    ],
)
def test_states_of_earlier_versions_are_read(older, expected):
    best = BestCheckpoint(lambda evaluation: [0.0], lambda: "new")
    best.load_state_dict(older)
    assert best.state_dict() == expected
    best.offer(9, {"rows": [], "multiplier": 1.0})
    assert best.step == (9 if older["step"] is None else older["step"])
