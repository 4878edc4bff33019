"""Our definitions beside other projects': equal where docs/definitions.md says "same", and different as it
says there.

The others' formulas are in tests/support/others.py. B rows, T tokens a row, V vocabulary.
"""

import re
from pathlib import Path

import pytest
import torch
from others import (
    check_against_packages,
    chunked_logp,
    entropy_lse,
    entropy_p_log_p,
    gae_carried,
    gae_zeroed,
    k3,
    log_softmax_gather,
    mean_of_means,
    nll_with_ignored,
    sample_whitened,
    shaped,
    surrogate,
    value_error,
)
from tolerance import assert_near

from saferlhf_fast import gae, linear_logprob, ppo_lag_advantage, ppo_loss, token_logprob, value_loss

pytestmark = pytest.mark.numeric

INFINITY = float("inf")


def logits_and_ids(*shape, vocabulary=37, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64) * 4).to(dtype)
    return logits, torch.randint(0, vocabulary, shape, generator=generator)


def batch(rows=5, width=9, seed=0, holes=False, scale=1.0):
    """(mask, five float64 tensors [B, T]); rows of 1..T valid tokens; `holes`: some inside a row are not."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0] = width
    mask = torch.arange(width) < lengths[:, None]
    if holes:
        mask &= torch.rand(rows, width, generator=generator) < 0.7
        mask[:, 0] = True
    return mask, *(torch.randn(5, rows, width, generator=generator, dtype=torch.float64) * scale)


# --- token_logprob
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_same(temperature):
    logits, ids = logits_and_ids(4, 6)
    logp, entropy = token_logprob(logits, ids, temperature=temperature, return_entropy=True)
    assert_near(logp, log_softmax_gather(logits / temperature, ids))
    assert_near(logp, chunked_logp(logits, ids, 10, temperature))
    assert_near(entropy, entropy_p_log_p(logits / temperature))
    assert_near(entropy, entropy_lse(logits / temperature))


def test_softcap_same():
    """The cap comes before the temperature."""
    logits, ids = logits_and_ids(4, 6)
    assert_near(
        token_logprob(logits, ids, temperature=0.7, softcap=5.0), chunked_logp(logits, ids, 10, 0.7, 5.0)
    )


def test_linear_same():
    """linear_logprob is token_logprob of hidden @ weight.T + bias: what TRL's chunked path computes, the cap
    included.
    """
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((12, 5), (37, 5), (37,))
    )
    ids = torch.arange(12)
    logp = linear_logprob(hidden, weight, ids, bias=bias, temperature=0.7, softcap=5.0)
    assert_near(logp, chunked_logp(hidden @ weight.T + bias, ids, 10, 0.7, 5.0))
    ids[3] = 37
    with pytest.raises(ValueError, match="expected 0 <= id < 37"):
        linear_logprob(hidden, weight, ids)


def test_logp_dtype():
    """bfloat16 logits: ours is float32, theirs (on a CPU; safe-rlhf's anywhere) bfloat16, off by up to half
    an ulp of it.
    """
    logits, ids = logits_and_ids(40, dtype=torch.bfloat16)
    exact, theirs = log_softmax_gather(logits.double(), ids), log_softmax_gather(logits, ids)
    ours = token_logprob(logits, ids)
    assert ours.dtype == torch.float32 and theirs.dtype == torch.bfloat16
    assert_near(ours, exact)
    assert (theirs.double() - exact).abs().max() > 100 * (ours.double() - exact).abs().max()


def test_entropy_of_impossible_tokens():
    logits, ids = logits_and_ids(3)
    logits[1, 5:9] = -INFINITY
    ids[1] = 0
    _, entropy = token_logprob(logits, ids, return_entropy=True)
    rest = torch.cat([logits[1, :5], logits[1, 9:]])
    assert_near(entropy[1], entropy_p_log_p(rest))
    for theirs in (entropy_p_log_p, entropy_lse):
        assert theirs(logits).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("id", [-100, -1, 37, 10**6])
def test_ids_outside_the_vocabulary(id):
    """TRL's chunked path answers with a number (the target is 0 where no chunk has it); ours never does."""
    logits, ids = logits_and_ids(3)
    ids[1] = id
    assert chunked_logp(logits, ids, 10).isfinite().all()
    # Liger's -100; ours has no ignored id
    assert nll_with_ignored(logits, torch.tensor([3, -100, 5]))[1] == 0
    with pytest.raises(ValueError, match="expected 0 <= id < 37"):
        token_logprob(logits, ids)
    with pytest.raises(RuntimeError):
        log_softmax_gather(logits, ids)


def test_empty_batch():
    """Row loops stack an empty list; ours gives [0]."""
    logits, ids = logits_and_ids(0)
    assert token_logprob(logits, ids).shape == (0,)
    with pytest.raises(RuntimeError, match="non-empty"):
        torch.stack([row.logsumexp(-1) for row in logits])


def test_alignment():
    """Ours scores ids[t] with logits[t]. Liger's triton_grpo_loss takes [B, L + 1, V] and drops the last
    column itself.
    """
    logits, ids = logits_and_ids(2, 7)
    assert_near(
        token_logprob(logits[:, :-1], ids[:, 1:]), log_softmax_gather(logits, ids.roll(-1, 1))[:, :-1]
    )


# --- gae
# ----------------------------------------------------------------------------------------------------------


def test_gae_same():
    """Rows of one run from the first column on: all three agree at valid tokens, ours is 0 elsewhere."""
    mask, rewards, values, *_ = batch()
    ours = gae(rewards, values, gamma=0.97, lam=0.9, mask=mask)
    zeroed, carried = (
        gae_zeroed(values, rewards, mask, 0, 0.97, 0.9),
        gae_carried(rewards, values, mask, 0.97, 0.9),
    )
    for mine, ref, verl in zip(ours, zeroed, carried):
        assert_near(mine[mask], ref[mask])
        assert_near(mine[mask], verl[mask])
        assert (mine[~mask] == 0).all()
    assert (carried[1][~mask] != 0).all()  # verl leaves the value there


def test_gae_of_a_response():
    """safe-rlhf's `start` leaves the prompt's columns out: the same as giving ours the response alone."""
    mask, rewards, values, *_ = batch()
    mask[:, 3] = True
    expected = gae_zeroed(values, rewards, mask, 3, 1.0, 0.95)
    ours = gae(rewards[:, 3:], values[:, 3:], gamma=1.0, lam=0.95, mask=mask[:, 3:])
    for mine, ref in zip(ours, expected):
        assert_near(mine[mask[:, 3:]], ref[mask[:, 3:]])


def test_gae_holes():
    """A masked token between valid ones: "zero" is safe-rlhf's, "carry" verl's, and they differ."""
    mask, rewards, values, *_ = batch(holes=True)
    zero, carry = (
        gae(rewards, values, gamma=0.97, lam=0.9, mask=mask, masked=m)[0] for m in ("zero", "carry")
    )
    assert_near(zero[mask], gae_zeroed(values, rewards, mask, 0, 0.97, 0.9)[0][mask])
    assert_near(carry[mask], gae_carried(rewards, values, mask, 0.97, 0.9)[0][mask])
    assert (zero - carry).abs().max() > 0.01


def test_gae_poison():
    """NaN in a masked entry: multiplied by a mask of 0 it stays NaN; ours never reads it."""
    mask, rewards, values, *_ = batch()
    values[~mask] = torch.nan
    assert gae(rewards, values, gamma=1.0, lam=0.95, mask=mask)[0].isfinite().all()
    assert gae_zeroed(values, rewards, mask, 0, 1.0, 0.95)[0].isnan().any()
    assert gae_carried(rewards, values, mask, 1.0, 0.95)[0].isnan().any()


# --- ppo_lag_advantage
# --------------------------------------------------------------------------------------------


def lagrangian(mask, logp, ref_logp, values, cost_values, reward, cost, clip=50.0, multiplier=0.6):
    return ppo_lag_advantage(
        logp,
        ref_logp,
        reward,
        cost,
        values,
        cost_values,
        multiplier,
        kl_coeff=0.3,
        gamma=1.0,
        lam=0.95,
        clip_score=clip,
        mask=mask,
        whiten=True,
    )


def test_ppo_lag_same():
    """Shaping of both streams, both scans and the combination are safe-rlhf's."""
    mask, logp, ref_logp, values, cost_values, scores = batch()
    reward, cost = scores[:, 0] * 9, scores[:, 1] * 9
    A, reward_returns, cost_returns, _ = lagrangian(
        mask, logp, ref_logp, values, cost_values, reward, cost, clip=5.0
    )
    A_r, ret_r = gae_zeroed(values, shaped(reward, logp, ref_logp, mask, 0.3, 5.0, 1), mask, 0, 1.0, 0.95)
    A_c, ret_c = gae_zeroed(cost_values, shaped(cost, logp, ref_logp, mask, 0.3, 5.0, -1), mask, 0, 1.0, 0.95)
    for mine, ref in ((A, (A_r - 0.6 * A_c) / 1.6), (reward_returns, ret_r), (cost_returns, ret_c)):
        assert_near(mine[mask], ref[mask])


def test_clamp_order():
    """The clamp comes after the score is added (safe-rlhf). Clamping the score first, as others do, is
    another reward.
    """
    mask, logp, ref_logp, values = (
        torch.ones(1, 1, dtype=torch.bool),
        *torch.tensor([[[9.0]], [[-1.0]], [[0.0]]]),
    )
    A = ppo_lag_advantage(
        logp,
        ref_logp,
        torch.tensor([6.0]),
        None,
        values,
        None,
        None,
        kl_coeff=0.3,
        gamma=1.0,
        lam=1.0,
        clip_score=5.0,
        mask=mask,
    )[0]
    assert A.item() == pytest.approx(6 - 0.3 * 10)
    assert shaped(torch.tensor([6.0]), logp, ref_logp, mask, 0.3, 5.0, 1).item() == pytest.approx(3.0)
    score_first = torch.tensor(6.0).clamp(-5, 5) - 0.3 * 10
    assert score_first.item() == pytest.approx(2.0)


def test_row_without_a_token():
    """safe-rlhf looks for the last valid token and finds none; ours leaves the row out."""
    mask, logp, ref_logp, values, cost_values, scores = batch()
    mask[2] = False
    A, *_, stats = lagrangian(mask, logp, ref_logp, values, cost_values, scores[:, 0], scores[:, 1])
    assert A.isfinite().all() and stats["sequences"] == 4
    with pytest.raises(IndexError):
        shaped(scores[:, 0], logp, ref_logp, mask, 0.3, 50.0, 1)


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")
def test_whitening():
    """Ours divides by the population's deviation, verl and TRL by the sample's: a factor of sqrt((n - 1) /
    n).
    """
    mask, logp, ref_logp, values, cost_values, scores = batch()
    A, *_, stats = lagrangian(mask, logp, ref_logp, values, cost_values, scores[:, 0], scores[:, 1])
    ours, n = A * stats["advantage_scale"] + stats["advantage_shift"], int(mask.sum())
    assert_near(ours[mask] * ((n - 1) / n) ** 0.5, sample_whitened(A, mask)[mask])
    assert ours[mask].var(unbiased=False).item() == pytest.approx(1.0, abs=1e-6)
    one = torch.zeros_like(mask)
    one[0, 0] = True
    A, *_, stats = lagrangian(one, logp, ref_logp, values, cost_values, scores[:, 0], scores[:, 1])
    assert (A * stats["advantage_scale"] + stats["advantage_shift"])[one].item() == pytest.approx(
        0.0, abs=1e-3
    )
    assert sample_whitened(A, one).isnan().all()  # verl raises there


# --- ppo_loss
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sequence-mean", "token-mean"])
def test_policy_loss_same(reduction):
    """Loss, gradient: safe-rlhf, TRL and Liger (no limit) and verl (limit) agree where |log ratio| < 20."""
    mask, logp, old_logp, advantage, *_ = batch(scale=0.4)
    leaf, theirs = (logp.clone().requires_grad_() for _ in range(2))
    loss, _ = ppo_loss(leaf, old_logp, advantage, clip_ratio=0.2, mask=mask, reduction=reduction)
    per_token = surrogate(theirs, old_logp, advantage, 0.2, limit=20.0)
    expected = mean_of_means(per_token, mask) if reduction == "sequence-mean" else per_token[mask].mean()
    assert_near(loss, expected)
    loss.backward()
    expected.backward()
    assert_near(leaf.grad, theirs.grad)
    assert_near(surrogate(logp, old_logp, advantage, 0.2), per_token)


def test_log_ratio_limit():
    """exp(100) overflows float32 where nothing bounds it; ours is exp(20) with gradient 0, as verl's."""
    logp, old_logp, advantage = torch.tensor([[[0.0]], [[-100.0]], [[-1.0]]])
    leaf, theirs = (logp.clone().requires_grad_() for _ in range(2))
    loss, _ = ppo_loss(leaf, old_logp, advantage, clip_ratio=0.2)
    loss.backward()
    verl = surrogate(theirs, old_logp, advantage, 0.2, limit=20.0).mean()
    verl.backward()
    assert_near(loss, verl)
    assert leaf.grad.item() == theirs.grad.item() == 0
    assert surrogate(logp, old_logp, advantage, 0.2).isinf().all()


def test_dual_clip():
    """verl bounds the loss of a bad action at 3 |A|, ours where dual_clip says so; safe-rlhf's, TRL's and
    Liger's grow with the ratio.
    """
    logp, old_logp, advantage = torch.tensor([[[0.0]], [[-2.0]], [[-1.0]]])
    loss, _ = ppo_loss(logp, old_logp, advantage, clip_ratio=0.2)
    assert_near(loss, surrogate(logp, old_logp, advantage, 0.2).mean())
    assert loss.item() == pytest.approx(7.389, abs=1e-3)
    assert surrogate(logp, old_logp, advantage, 0.2, limit=20.0, dual=3.0).item() == 3.0
    mask, logp, old_logp, advantage, *_ = batch(scale=1.5)
    leaf, theirs = (logp.clone().requires_grad_() for _ in range(2))
    loss, stats = ppo_loss(
        leaf, old_logp, advantage, clip_ratio=0.2, dual_clip=3.0, mask=mask, reduction="token-mean"
    )
    expected = surrogate(theirs, old_logp, advantage, 0.2, limit=20.0, dual=3.0)[mask].mean()
    assert_near(loss, expected)
    loss.backward()
    expected.backward()
    assert_near(leaf.grad, theirs.grad)
    assert stats["dual_clipped"] > 0


def test_mean_with_an_empty_row():
    """safe-rlhf's mean of row means is NaN then; ours and verl's leave the row out."""
    mask, logp, old_logp, advantage, *_ = batch(scale=0.4)
    mask[1] = False
    kept = [0, 2, 3, 4]
    per_token = surrogate(logp, old_logp, advantage, 0.2)
    loss, _ = ppo_loss(logp, old_logp, advantage, clip_ratio=0.2, mask=mask)
    assert_near(loss, mean_of_means(per_token[kept], mask[kept]))
    assert mean_of_means(per_token, mask).isnan()


def test_statistics_of_the_policy():
    """clip_fraction: ours counts ratios outside the clip, verl those where the clipped term is the larger
    loss: our clipped. approx_kl: ours is k3, verl's ppo_kl k1: our -log_ratio.
    """
    mask, logp, old_logp, advantage, *_ = batch(scale=0.4)
    _, stats = ppo_loss(logp, old_logp, advantage, clip_ratio=0.2, mask=mask)
    ratio, A = (logp - old_logp).exp()[mask], advantage[mask]
    outside = (ratio - 1).abs() > 0.2
    verl = -A * ratio.clamp(0.8, 1.2) > -A * ratio
    assert_near(stats["clip_fraction"], outside.double().mean())
    assert_near(stats["clipped"], verl.double().mean())
    assert_near(stats["log_ratio"], (logp - old_logp)[mask].mean())
    assert verl.sum() < outside.sum() and (outside | ~verl).all()
    assert_near(stats["approx_kl"], k3(old_logp, logp)[mask].mean())
    assert (stats["approx_kl"] - (old_logp - logp)[mask].mean()).abs() > 0.01


def kl_term(logp, ref_logp, estimator):
    """Ours: (kl, d kl / d logp) of each token, from the loss of one token after another with advantage 0."""
    leaf = logp.clone().requires_grad_()
    zero = torch.zeros(1, dtype=logp.dtype)
    kl = torch.stack(
        [
            ppo_loss(
                one, one.detach(), zero, clip_ratio=0.2, ref_logp=ref, kl_coeff=1.0, kl_estimator=estimator
            )[0]
            for one, ref in zip(leaf.reshape(-1, 1), ref_logp.reshape(-1, 1))
        ]
    ).reshape(logp.shape)
    kl.sum().backward()
    return kl.detach(), leaf.grad


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_same(estimator):
    """Value and gradient of the KL term where the gap is small."""
    _, logp, ref_logp, *_ = batch(scale=0.4)
    theirs = logp.clone().requires_grad_()
    expected = theirs - ref_logp if estimator == "k1" else k3(theirs, ref_logp)
    expected.sum().backward()
    kl, d_kl = kl_term(logp, ref_logp, estimator)
    assert_near(kl, expected)
    assert_near(d_kl, theirs.grad)
    if estimator == "k3":
        assert_near(kl, k3(logp, ref_logp, limit=20.0, ceiling=10.0))


def test_kl_limits():
    """k3 of a gap of 5 is 142: ours, TRL's and Liger's say so, verl says 10. A gap of 100 is inf without a
    limit.
    """
    gap = torch.tensor([5.0, 100.0])
    kl, d_kl = kl_term(torch.zeros(2), gap, "k3")
    assert kl[0].item() == pytest.approx(k3(torch.zeros(1), gap[:1]).item(), rel=1e-6)
    assert kl[1].isfinite() and d_kl[1] == 0 and d_kl[0] < -100
    assert k3(torch.zeros(2), gap)[1].isinf()
    assert k3(torch.zeros(2), gap, limit=20.0, ceiling=10.0).tolist() == [10.0, 10.0]


# --- value_loss
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sequence-mean", "token-mean"])
def test_value_loss_same(reduction):
    mask, values, old_values, returns, *_ = batch()
    leaf, theirs = (values.clone().requires_grad_() for _ in range(2))
    loss, stats = value_loss(leaf, old_values, returns, clip_value=0.5, mask=mask, reduction=reduction)
    error = value_error(theirs, old_values, returns, 0.5)
    expected = 0.5 * (mean_of_means(error, mask) if reduction == "sequence-mean" else error[mask].mean())
    assert_near(loss, expected)
    loss.backward()
    expected.backward()
    assert_near(leaf.grad, theirs.grad)
    assert_near(stats["clip_fraction"], ((values - old_values).abs() > 0.5)[mask].double().mean())
    # verl's clip fraction: where the clipped square is the larger one
    larger = error > (values - returns) ** 2
    assert larger[mask].double().mean() < stats["clip_fraction"]
    assert_near(stats["clipped"], larger[mask].double().mean())


# --- the formulas themselves
# --------------------------------------------------------------------------------------


def test_formulas_are_theirs():
    """Where TRL, Liger or verl are installed: tests/support/others.py gives what they give."""
    logits, ids = logits_and_ids(4, 6, dtype=torch.float32)
    mask, *tensors = batch()
    if not check_against_packages(logits, ids, mask, *(x.float() for x in tensors)):
        pytest.skip("none of the other packages is installed")


def test_the_document_names_every_test():
    here = Path(__file__)
    files = (here, here.parents[1] / "integrations" / "test_trl_extras.py")
    tests = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.M)}
    document = (here.parents[2] / "docs" / "definitions.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+)`", document)) == tests - {"test_the_document_names_every_test"}
