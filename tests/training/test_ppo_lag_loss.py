"""PPOLagLoss against plain torch, and the drop-in functions without any library but torch."""

import inspect
import subprocess
import sys
import typing

import pytest
import torch
from kit import ROOT
from tolerance import assert_near

from saferlhf_fast import LagrangeMultiplier, PIDMultiplier, PPOLagLoss, pack, ppo_loss

pytestmark = pytest.mark.numeric


def plain(logp, old_logp, reward_advantages, cost_advantages, multiplier, mask, clip=0.2):
    """The formula: the mean of the token means of all rows that have a token."""
    advantages = (reward_advantages - multiplier * cost_advantages) / (1 + multiplier)
    ratio = (logp - old_logp).exp()
    term = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    rows = [term[b][mask[b]].mean() for b in range(len(mask)) if mask[b].any()]
    return torch.stack(rows).mean()


def batch(seed=0, dtype=torch.float64, rows=4, columns=7):
    generator = torch.Generator().manual_seed(seed)
    logp, noise, reward, cost = torch.randn(4, rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    mask[1] = False
    return [
        (-logp.abs()).to(dtype),
        (-logp.abs() + 0.2 * noise).to(dtype),
        reward.to(dtype),
        cost.to(dtype),
    ], mask


@pytest.mark.parametrize("multiplier", [0, 0.3, 5.0])
def test_loss_and_gradient_equal_the_formula(multiplier):
    (logp, *others), mask = batch()
    logp.requires_grad_()
    loss, stats = PPOLagLoss()(logp, *others, multiplier, mask=mask)
    expected = plain(logp, *others, multiplier, mask)
    assert_near(loss, expected)
    assert_near(torch.autograd.grad(loss, logp)[0], torch.autograd.grad(expected, logp)[0])
    assert stats["multiplier"].item() == pytest.approx(multiplier) and stats["sequences"] == mask.any(1).sum()
    assert torch.autograd.gradcheck(lambda x: PPOLagLoss(0.1)(x, *others, multiplier, mask=mask)[0], logp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_padded_inputs_give_the_same_loss(dtype):
    tensors, mask = batch(3, dtype)
    packed, cu_seqlens = pack(tensors, mask)
    criterion = PPOLagLoss(reduction="token-mean")
    of_rows, of_packed = (
        criterion(*tensors, 0.5, mask=mask)[0],
        criterion(*packed, 0.5, cu_seqlens=cu_seqlens)[0],
    )
    assert_near(of_rows, of_packed.double())
    ready = [tensor.float() for tensor in tensors]
    assert_near(
        of_rows,
        ppo_loss(
            *ready[:2], (ready[2] - 0.5 * ready[3]) / 1.5, clip_ratio=0.2, mask=mask, reduction="token-mean"
        )[0].double(),
    )


def test_lambda_may_be_a_number_a_tensor_or_a_multiplier():
    tensors, mask = batch(1, torch.float32)
    expected = PPOLagLoss()(*tensors, 0.25, mask=mask)[0]
    for rule in (
        LagrangeMultiplier(init=0.25),
        PIDMultiplier(init=0.25),
        torch.tensor(0.25),
        torch.tensor([0.25]),
        torch.tensor(0.25, dtype=torch.float64),
        torch.tensor(0.25, requires_grad=True),
    ):
        torch.testing.assert_close(PPOLagLoss()(*tensors, rule, mask=mask)[0], expected)


def test_a_tensor_lambda_under_torch_compile():
    tensors, mask = batch(1, torch.float32)
    expected = PPOLagLoss()(*tensors, torch.tensor(0.25), mask=mask)[0]
    compiled = torch.compile(PPOLagLoss(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors, torch.tensor(0.25), mask=mask)[0], expected)


def test_masked_entries_may_hold_anything():
    tensors, mask = batch(2, torch.float32)
    expected = PPOLagLoss()(*tensors, 1.0, mask=mask)[0]
    poisoned = [tensor.masked_fill(~mask, float("nan")).requires_grad_() for tensor in tensors]
    loss, _ = PPOLagLoss()(*poisoned, 1.0, mask=mask)
    loss.backward()
    assert torch.equal(loss, expected) and not poisoned[0].grad[~mask].any()
    assert all(tensor.grad is None for tensor in poisoned[1:])


def test_no_token_gives_a_loss_of_zero():
    loss, _ = PPOLagLoss()(*torch.zeros(4, 0, 3), 1.0, mask=torch.zeros(0, 3, dtype=torch.bool))
    assert loss.item() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multiplier": -0.1}, "multiplier: expected a number >= 0, got -0.1"),
        ({"multiplier": float("nan")}, "multiplier"),
        ({"multiplier": torch.tensor(-0.5)}, "multiplier: expected a number >= 0, got -0.5"),
        ({"multiplier": torch.tensor([-1])}, "multiplier: expected a number >= 0, got -1"),
        ({"multiplier": torch.tensor(float("nan"))}, "multiplier: expected a number >= 0, got nan"),
        ({"multiplier": "1"}, "multiplier: expected a number, a 0-d tensor"),
        ({"multiplier": None}, "multiplier: expected a number, a 0-d tensor"),
        ({"multiplier": torch.ones(2)}, "multiplier: expected a number or a 0-d tensor"),
        ({"cost_advantages": torch.zeros(4, 3)}, r"cost_advantages: expected shape \(4, 7\)"),
        (
            {"reward_advantages": torch.zeros(4, 7, dtype=torch.long)},
            "reward_advantages: expected a floating point dtype",
        ),
        ({"mask": torch.ones(4, 7)}, "mask: expected dtype torch.bool"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    tensors, mask = batch(0, torch.float32)
    names = ("logp", "old_logp", "reward_advantages", "cost_advantages")
    with pytest.raises(ValueError, match=message):
        PPOLagLoss()(**{**dict(zip(names, tensors)), "multiplier": 1.0, "mask": mask, **change})


def test_clip_higher_and_dual_clip_equal_the_formula():
    (logp, old_logp, reward, cost), mask = batch(5)
    old_logp = old_logp - 0.5
    advantages = (reward - 0.5 * cost) / 1.5
    ratio = (logp - old_logp).exp()
    term = -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.4) * advantages)
    term = torch.where(advantages < 0, torch.minimum(term, -2.0 * advantages), term)
    criterion = PPOLagLoss(0.1, clip_high=0.4, dual_clip=2.0, reduction="token-mean")
    assert_near(criterion(logp, old_logp, reward, cost, 0.5, mask=mask)[0], term[mask].mean())
    scaled = criterion(logp, old_logp, reward, cost, 0.5, mask=mask, advantage_scale=2.0)[0]
    assert_near(scaled, 2 * term[mask].mean())


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="expected settings out of .*clip_ratio.* got clip_rato"):
        PPOLagLoss(clip_rato=0.1)
    for settings, message in [
        ({"clip_ratio": -1}, "clip_ratio: expected a number >= 0, got -1"),
        ({"clip_high": float("nan")}, "clip_high: expected a number >= 0, got nan"),
        ({"dual_clip": 1.0}, "dual_clip: expected None or a number > 1, got 1.0"),
        ({"reduction": "foo"}, "reduction: expected one of sequence-mean, token-mean, got 'foo'"),
        ({"kl_estimator": "k2"}, "kl_estimator: expected one of k3, k1, got 'k2'"),
        ({"impl": "foo"}, "impl: expected one of auto, reference, triton, native, got 'foo'"),
        ({"impl": None}, "impl: expected one of .* got None"),
        ({"kl_coeff": "x"}, "kl_coeff: expected a finite number, got 'x'"),
        ({"kl_coeff": None}, "kl_coeff: expected a finite number, got None"),
        ({"entropy_coeff": float("nan")}, "entropy_coeff: expected a finite number, got nan"),
        ({"clip_ratio": "x"}, "clip_ratio: expected a number, got 'x'"),
        ({"clip_ratio": None}, "clip_ratio: expected a number, got None"),
        ({"clip_high": True}, "clip_high: expected None or a number, got True"),
        ({"dual_clip": [2]}, r"dual_clip: expected None or a number, got \[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            PPOLagLoss(**settings)
    assert (
        repr(PPOLagLoss(0.1, reduction="token-mean")) == "PPOLagLoss(clip_ratio=0.1, reduction='token-mean')"
    )


def test_arguments_of_a_call_are_those_of_ppo_loss():
    """The type hints allow numbers where ppo_loss takes numbers, so that a type checker accepts them."""
    tensors, mask = batch(7, torch.float32)
    ref_logp, entropy = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2))
    criterion = PPOLagLoss(0.1, kl_coeff=0.1, entropy_coeff=0.01, clip_high=float("inf"), impl="reference")
    advantages = (tensors[2] - 0.5 * tensors[3]) / 1.5
    extra = {
        "ref_logp": ref_logp,
        "entropy": entropy,
        "normalizer": 8.0,
        "advantage_scale": 0.5,
        "advantage_shift": 1,
    }
    expected, _ = ppo_loss(*tensors[:2], advantages, mask=mask, **criterion.settings, **extra)
    torch.testing.assert_close(criterion(*tensors, 0.5, mask=mask, **extra)[0], expected)
    of_forward, of_ppo_loss = (
        inspect.signature(function).parameters for function in (PPOLagLoss.forward, ppo_loss)
    )
    for name in extra:
        assert {*typing.get_args(of_forward[name].annotation)} == {
            *typing.get_args(of_ppo_loss[name].annotation)
        }
    assert not [p for p in of_forward.values() if p.kind is p.VAR_KEYWORD]


def test_drop_in_pieces_need_torch_alone():
    code = (
        "import sys; from saferlhf_fast import PPOLagLoss, LagrangeMultiplier, PIDMultiplier, pack, unpack, "
        "gae;"
        "print([name for name in ('transformers', 'deepspeed', 'datasets', 'pydantic') if name in "
        "sys.modules])"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert completed.stdout.strip() == "[]", completed.stdout + completed.stderr
