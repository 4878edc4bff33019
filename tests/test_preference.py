"""Reward and cost losses against their formulas, gradients by gradcheck, and where a score is read."""

import math

import torch

from saferlhf_fast import ScoreModel, cost_loss, reward_loss
from saferlhf_fast.preference import token_wise


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


BETTER, WORSE = [0.3, -1.2, 2.0], [0.1, 0.4, -3.0]


def test_reward_loss_by_hand():
    expected = sum(-log_sigmoid(b - w) for b, w in zip(BETTER, WORSE)) / 3
    expected += 0.01 * sum(x * x for x in BETTER + WORSE) / 6
    got = reward_loss(torch.tensor(BETTER), torch.tensor(WORSE), regularization=0.01)
    assert math.isclose(got.item(), expected, rel_tol=1e-6)


def test_cost_loss_by_hand():
    safer, unsafer, s_safer, s_unsafer = BETTER, WORSE, [-1.0, -1.0, 1.0], [1.0, -1.0, 1.0]
    expected = sum(-log_sigmoid(u - s) - log_sigmoid(ss * s) - log_sigmoid(su * u)
                   for s, u, ss, su in zip(safer, unsafer, s_safer, s_unsafer)) / 3
    expected += 0.001 * sum(x * x for x in safer + unsafer) / 6
    got = cost_loss(*map(torch.tensor, (safer, unsafer, s_safer, s_unsafer)))
    assert math.isclose(got.item(), expected, rel_tol=1e-6)


def test_gradients():
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


def test_token_wise_starts_where_the_responses_part():
    rows = [[5, 6, 7], [5, 8, 9, 4]]
    scores = [torch.tensor([9.0, 0.5, 0.7]), torch.tensor([-9.0, 0.1, 0.2, 0.3])]
    expected = reward_loss(torch.tensor([0.5, 0.7, 0.7]), torch.tensor([0.1, 0.2, 0.3]))
    assert torch.allclose(token_wise(scores, rows, 1, None, 0.001), expected)
