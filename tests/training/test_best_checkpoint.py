"""BestCheckpoint keeps the best or the last evaluation with its weights and reads states of old versions."""

import pytest

from saferlhf_fast.training.best_checkpoint import BestCheckpoint


def best_of(scores, keep=None, best=None):
    """A BestCheckpoint that has seen some scores, in steps 1, 2, …"""
    best = best or BestCheckpoint(lambda evaluation: [evaluation["score"]], keep)
    for step, score in enumerate(scores, 1):
        best.offer(step, {"score": score})
    return best


def test_the_best_evaluation_is_kept_with_the_weights_of_its_step():
    weights = iter("abcd")
    best = best_of([1.0, 3.0, 3.0, 2.0], lambda: next(weights))
    assert (best.step, best.evaluation, best.weights) == (
        2,
        {"score": 3.0},
        "b",
    )  # the first of two equal scores
    # weights are kept only for a new best: twice so far
    assert next(weights) == "c"


def test_without_keep_the_last_evaluation_counts():
    best = best_of([1.0, 3.0, 2.0])
    assert (best.step, best.evaluation, best.weights) == (3, {"score": 2.0}, None)


def test_a_restored_best_checkpoint_compares_with_its_earlier_best():
    restored = BestCheckpoint(lambda evaluation: [evaluation["score"]], lambda: "new")
    restored.load_state_dict(best_of([1.0, 3.0], lambda: "old").state_dict())
    restored.offer(3, {"score": 2.0})
    assert (restored.step, restored.weights) == (2, "old")
    restored.offer(4, {"score": 4.0})
    assert (restored.step, restored.weights) == (4, "new")


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
