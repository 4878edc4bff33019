"""Reward and cost losses against their formulas, gradients by gradcheck, and the position of the score."""

import math

import pytest
import torch

from saferlhf_fast import ScoreModel, cost_loss, reward_loss
from saferlhf_fast.training.losses import token_wise

pytestmark = pytest.mark.numeric


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


BETTER, WORSE = [0.3, -1.2, 2.0], [0.1, 0.4, -3.0]


def test_reward_loss_equals_the_formula():
    expected = sum(-log_sigmoid(b - w) for b, w in zip(BETTER, WORSE)) / 3
    expected += 0.01 * sum(x * x for x in BETTER + WORSE) / 6
    value = reward_loss(torch.tensor(BETTER), torch.tensor(WORSE), regularization=0.01)
    assert math.isclose(value.item(), expected, rel_tol=1e-6)


def test_cost_loss_equals_the_formula():
    safer, unsafer, s_safer, s_unsafer = BETTER, WORSE, [-1.0, -1.0, 1.0], [1.0, -1.0, 1.0]
    expected = (
        sum(
            -log_sigmoid(u - s) - log_sigmoid(ss * s) - log_sigmoid(su * u)
            for s, u, ss, su in zip(safer, unsafer, s_safer, s_unsafer)
        )
        / 3
    )
    expected += 0.001 * sum(x * x for x in safer + unsafer) / 6
    value = cost_loss(*map(torch.tensor, (safer, unsafer, s_safer, s_unsafer)))
    assert math.isclose(value.item(), expected, rel_tol=1e-6)


def test_gradients_pass_gradcheck():
    scores = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    signs = [torch.ones(5, dtype=torch.float64), -torch.ones(5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(reward_loss, scores)
    assert torch.autograd.gradcheck(lambda a, b: cost_loss(a, b, *signs), scores)


def test_extreme_scores_stay_finite():
    huge = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = cost_loss(huge, -huge, torch.ones(2), -torch.ones(2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(huge.grad).all()


def test_score_is_read_at_the_last_real_token_on_either_side():
    scores = torch.arange(8.0).view(2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    assert ScoreModel.end_scores(scores, mask).tolist() == [1.0, 7.0]


def test_token_wise_starts_where_the_responses_differ():
    rows = [[5, 6, 7], [5, 8, 9, 4]]
    scores = [torch.tensor([9.0, 0.5, 0.7]), torch.tensor([-9.0, 0.1, 0.2, 0.3])]
    expected = reward_loss(torch.tensor([0.5, 0.7, 0.7]), torch.tensor([0.1, 0.2, 0.3]))
    assert torch.allclose(token_wise(scores, rows, 1, None, 0.001), expected)


def test_token_wise_cost_has_a_pair_s_signs_at_every_position():
    rows = [[5, 6, 7], [5, 8, 9, 4]]
    scores = [torch.tensor([9.0, 0.5, 0.7]), torch.tensor([-9.0, 0.1, 0.2, 0.3])]
    expected = cost_loss(
        torch.tensor([0.5, 0.7, 0.7]), torch.tensor([0.1, 0.2, 0.3]), -torch.ones(3), torch.ones(3)
    )
    assert torch.allclose(token_wise(scores, rows, 1, torch.tensor([[-1.0], [1.0]]), 0.001), expected)


def test_no_pair_gives_a_loss_of_zero():
    for loss in (lambda a, b: reward_loss(a, b), lambda a, b: cost_loss(a, b, a.detach(), b.detach())):
        a, b = (torch.zeros(0, requires_grad=True) for _ in range(2))
        value = loss(a, b)
        value.backward()
        assert value.item() == 0.0 and a.grad.shape == b.grad.shape == (0,)


def test_cost_loss_takes_signs_of_any_dtype_and_compiles():
    scores, signs = (
        (torch.tensor(BETTER), torch.tensor(WORSE)),
        (torch.tensor([-1.0, -1.0, 1.0]), torch.tensor([1.0, -1.0, 1.0])),
    )
    expected = cost_loss(*scores, *signs)
    for dtype in (torch.int64, torch.int8, torch.bfloat16, torch.float64):
        assert torch.equal(cost_loss(*scores, *(sign.to(dtype) for sign in signs)).float(), expected)
    compiled = torch.compile(cost_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*scores, *signs), expected)


THREE = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: reward_loss(THREE[:, None], THREE),
            r"reward_loss: better: expected \[B\], one score .* got shape \(3, 1\)",
        ),
        (
            lambda: reward_loss(THREE, THREE[:, None]),
            r"reward_loss: worse: expected shape \(3,\) as better, got \(3, 1\)",
        ),
        (lambda: reward_loss(THREE[0], THREE[0]), r"reward_loss: better: .* got shape \(\)"),
        (
            lambda: reward_loss(THREE.long(), THREE.long()),
            "reward_loss: better: expected a floating point dtype .* torch.int64",
        ),
        (
            lambda: reward_loss(THREE, THREE.to("meta")),
            "reward_loss: worse: expected device cpu as better, got meta",
        ),
        (
            lambda: cost_loss(THREE[:2], THREE, THREE, THREE),
            r"cost_loss: unsafer: expected shape \(2,\) as safer, got \(3,\)",
        ),
        (
            lambda: cost_loss(THREE.long(), THREE, THREE, THREE),
            "cost_loss: safer: expected a floating point dtype",
        ),
        (
            lambda: cost_loss(THREE, THREE, THREE[:, None], THREE),
            r"cost_loss: safer_sign: expected numbers \+1 and -1 \[3\] on cpu, got torch.float32 \[3, 1\] on "
            r"cpu",
        ),
        (lambda: cost_loss(THREE, THREE, THREE, THREE[0]), r"unsafer_sign: .* got torch.float32 \[\] on cpu"),
        (lambda: cost_loss(THREE, THREE, THREE > 0, THREE), r"safer_sign: .* got torch.bool \[3\] on cpu"),
        (
            lambda: cost_loss(THREE, THREE, THREE, THREE * 1j),
            r"unsafer_sign: .* got torch.complex64 \[3\] on cpu",
        ),
        (
            lambda: cost_loss(THREE, THREE, THREE, THREE.to("meta")),
            r"unsafer_sign: .* on cpu, got torch.float32 \[3\] on meta",
        ),
        (
            lambda: cost_loss(THREE, THREE, THREE, THREE * 0),
            r"unsafer_sign: expected \+1 \(unsafe\) or -1 \(safe\), got 0.0",
        ),
        (lambda: cost_loss(THREE, THREE, THREE.long() * 5, THREE), "safer_sign: expected .* got 5"),
        (lambda: cost_loss(THREE, THREE, THREE * float("nan"), THREE), "safer_sign: expected .* got nan"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
