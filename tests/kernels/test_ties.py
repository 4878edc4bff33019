"""Gradients where a loss has a corner: a ratio at a bound of the clip, two equal losses, a difference of 0.

Every implementation gives the same there: what docs/definitions.md says under "Ties", with what the other
libraries' formulas give by autograd (tests/support/others.py). Bounds are put exactly at the ratio that an
implementation computes, since their exps differ in the last bit.
"""

import naive
import pytest
import torch
from others import k3, surrogate
from tolerance import assert_near

from saferlhf_fast import linear_ppo_loss, ppo_loss, ppo_loss_from_logits, token_logprob, value_loss

pytestmark = pytest.mark.numeric

PLACES = [
    pytest.param(*place.values, dtype, id=f"{place.id}-{dtype}".replace("torch.", ""), marks=place.marks)
    for place in naive.PLACES
    for dtype in (torch.float32, torch.float64)
    if not (place.values[0] == "triton" and dtype == torch.float64)
]


def policy(difference, advantage, impl, device, dtype, **options):
    """(d loss / d logp, stats as numbers) of one token with logp - old_logp = difference, exactly."""
    logp, old_logp, A = (
        torch.tensor([value], dtype=dtype, device=device) for value in (difference, 0.0, advantage)
    )
    logp.requires_grad_()
    loss, stats = ppo_loss(logp, old_logp, A, impl=impl, **{"clip_ratio": 0.2, **options})
    loss.backward()
    return logp.grad.item(), {name: value.item() for name, value in stats.items()}


def by_autograd(function, value):
    """The derivative of a library's formula at a number, in float64."""
    leaf = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(leaf), leaf)[0].item()


@pytest.mark.parametrize("impl, device, dtype", PLACES)
def test_policy_ties(impl, device, dtype):
    """At a bound the gradient is that inside; beyond it by one rounding, 0."""
    where = (impl, device, dtype)
    for advantage in (1.5, -1.5, 0.0):
        for clip in (0.2, 0.0):  # 0: both bounds are at the ratio
            gradient, stats = policy(0.0, advantage, *where, clip_ratio=clip)
            assert gradient == -advantage and stats["clip_fraction"] == stats["clipped"] == 0
            zero = torch.zeros((), dtype=torch.float64)
            theirs = by_autograd(lambda x: surrogate(x, zero, zero + advantage, clip), 0.0)  # noqa: B023
            assert gradient == theirs
    for difference, advantage, bound in ((0.3, 1.5, "clip_high"), (-0.3, -1.5, "clip_ratio")):
        ratio = policy(difference, advantage, *where, clip_ratio=0.9)[1]["ratio"]
        at = abs(ratio - 1)  # exact in either dtype, and so is 1 ± at
        gradient, stats = policy(difference, advantage, *where, **{bound: at})
        assert gradient == pytest.approx(-ratio * advantage, rel=1e-6)
        assert stats["clip_fraction"] == stats["clipped"] == 0
        gradient, stats = policy(difference, advantage, *where, **{bound: at * (1 - 1e-6)})
        assert gradient == 0 and stats["clip_fraction"] == stats["clipped"] == 1
        gradient, _ = policy(difference, 0.0, *where, **{bound: at / 2})
        assert gradient == 0
    # the largest loss that the dual clip lets through
    ratio = policy(1.0, -1.5, *where)[1]["ratio"]
    gradient, stats = policy(1.0, -1.5, *where, dual_clip=ratio)
    assert gradient == pytest.approx(1.5 * ratio, rel=1e-6) and stats["dual_clipped"] == 0
    assert policy(1.0, -1.5, *where, dual_clip=ratio * (1 - 1e-6))[0] == 0
    # the limits of the log ratio
    for difference, advantage in ((20.0, -1.5), (-20.0, 1.5)):
        gradient, stats = policy(difference, advantage, *where)
        assert gradient == pytest.approx(-advantage * stats["ratio"], rel=1e-6) and gradient != 0
        assert policy(difference * (1 + 1e-6), advantage, *where)[0] == 0


def test_the_others_halve_where_two_losses_are_equal():
    """verl's dual clip at the ratio: torch.min gives half to each of two equal losses; ours and TRL's `delta`
    give all.
    """
    zero = torch.zeros((), dtype=torch.float64)
    ratio = (zero + 1.0).exp().item()
    full = by_autograd(lambda x: surrogate(x, zero, zero - 1.5, 0.2), 1.0)
    assert by_autograd(lambda x: surrogate(x, zero, zero - 1.5, 0.2, limit=20.0, dual=ratio), 1.0) == full / 2
    assert by_autograd(lambda x: 1.5 * x.exp().clamp(max=ratio), 1.0) == full
    assert by_autograd(lambda x: surrogate(x, zero, zero - 1.5, 0.2, limit=20.0), 20.0) != 0


@pytest.mark.parametrize("impl, device, dtype", PLACES)
def test_kl_ties(impl, device, dtype):
    """k3 has slope 0 at a gap of 0, and at its limits that inside; k1 has slope 1 everywhere."""

    def slope(gap, estimator):
        ref_logp = torch.tensor([gap], dtype=dtype, device=device)
        options = dict(ref_logp=ref_logp, kl_coeff=1.0, kl_estimator=estimator)
        return policy(0.0, 0.0, impl, device, dtype, **options)[0]

    zero = torch.zeros((), dtype=torch.float64)
    for gap in (0.0, 20.0, -20.0):
        assert slope(gap, "k1") == 1
        theirs = by_autograd(lambda x: k3(x, zero + gap, limit=20.0), 0.0)  # noqa: B023
        assert slope(gap, "k3") == pytest.approx(theirs, rel=1e-6, abs=0)
    assert slope(20.001, "k3") == slope(-20.001, "k3") == 0
    assert by_autograd(lambda x: x.abs(), 0.0) == 0  # verl's "abs", which no op here has


def value(now, old, goal, impl, device, dtype, clip):
    """(d loss / d value over value - return, stats as numbers) of one token."""
    values, old_values, returns = (torch.tensor([x], dtype=dtype, device=device) for x in (now, old, goal))
    values.requires_grad_()
    loss, stats = value_loss(values, old_values, returns, clip_value=clip, impl=impl)
    loss.backward()
    error = now - goal
    return values.grad.item() / error if error else values.grad.item(), {
        k: v.item() for k, v in stats.items()
    }


@pytest.mark.parametrize("impl, device, dtype", PLACES)
def test_value_ties(impl, device, dtype):
    """All numbers are exact in binary: differences, bounds and squares are, too."""
    where = (impl, device, dtype)

    def share(clip, now, old, goal):
        """The same by autograd; `clip` gives the clipped value."""
        error = now - goal
        by = by_autograd(
            lambda x: 0.5 * torch.maximum((x - goal) ** 2, (clip(x, x * 0 + old) - goal) ** 2), now
        )
        return by / error if error else by

    def clamped(x, old):  # OpenRLHF, TRL; safe-rlhf clamps between old - c and old + c
        return old + (x - old).clamp(-0.5, 0.5)

    def by_bounds(x, old):  # safe-rlhf
        return torch.clamp(x, (old - 0.5).detach(), (old + 0.5).detach())

    def of_minimum(x, old):  # verl
        return torch.max(torch.min(x, (old + 0.5).detach()), (old - 0.5).detach())

    cases = {
        (1.0, 1.0, 3.0): (1.0, 1.0),  # the value has not moved
        (1.5, 1.0, 3.0): (1.0, 0.75),  # it is at the upper bound
        (0.5, 1.0, 3.0): (1.0, 0.75),  # at the lower one
        (2.0, 1.0, 1.75): (0.5, 0.5),  # beyond it, and both squares are 1/16
        (0.0, 1.0, 0.25): (0.5, 0.5),
        (3.0, 1.0, 3.0): (0.0, 0.0),  # it equals the return, the clipped one does not
        (1.25, 1.0, 1.25): (0.0, 0.0),  # both equal the return
    }
    for case, (ours, verl) in cases.items():
        got, stats = value(*case, *where, 0.5)
        assert got == ours and share(clamped, *case) == share(by_bounds, *case) == ours, case
        assert share(of_minimum, *case) == verl, case
        assert stats["clip_fraction"] == (abs(case[0] - case[1]) > 0.5)
    assert value(1.0, 1.0, 3.0, *where, 0.0)[0] == 1  # both bounds are at the value


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_ties_of_logits(impl, device):
    """Ratios of 1 between bounds of 0 give the gradient of token_logprob; a saturated softcap gives 0."""
    logits = torch.randn(6, 37, generator=torch.Generator().manual_seed(0)).to(device)
    ids, A = torch.arange(6, device=device), torch.linspace(-1, 1, 6, device=device)
    leaf, plain = (logits.clone().requires_grad_() for _ in range(2))
    logp = token_logprob(plain, ids, impl=impl)
    loss, stats = ppo_loss_from_logits(leaf, ids, logp.detach(), A, clip_ratio=0.0, impl=impl)
    loss.backward()
    (-(logp * A).mean()).backward()
    assert stats["clip_fraction"] == stats["clipped"] == 0
    assert_near(leaf.grad, plain.grad)
    weight = torch.eye(37, device=device)
    hidden = logits.clone().requires_grad_()
    loss, stats = linear_ppo_loss(hidden, weight, ids, logp.detach(), A, clip_ratio=0.0, impl=impl)
    loss.backward()
    assert stats["clip_fraction"] == 0
    assert_near(hidden.grad, plain.grad)
    capped = (logits.sign() * 1e4).requires_grad_()
    logp, entropy = token_logprob(capped, ids, softcap=2.0, return_entropy=True, impl=impl)
    (logp.sum() + entropy.sum()).backward()
    assert logp.isfinite().all() and (capped.grad == 0).all()
