"""ppo_loss: against loops under autograd, both reductions, normaliser, whitening, poison, ties, torch.library."""

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_near

from saferlhf_fast import ppo_loss

CLIP = 0.2


def inputs_of(batch, dtype=torch.float32, spread=0.3):
    """Log-probs that differ by about `spread`, so that some ratios are clipped and some are not."""
    logp = batch.tokens(dtype) - 2
    return logp, logp + batch.tokens(dtype, spread), batch.tokens(dtype)


def by_loops(batch, logp, old_logp, advantages, token_mean=False, normalizer=None, scale=1.0, shift=0.0):
    """(loss, gradient [N], clip fraction, k3, mean ratio) in float64, the gradient from autograd of the formula."""
    leaf = logp.detach().double().cpu().requires_grad_()
    rows, clipped, divergence, ratios = [], 0, 0.0, 0.0
    pieces = zip(leaf.split(batch.lengths), batch.split(old_logp), batch.split(advantages))
    for row_logp, row_old, row_advantage in pieces:
        terms = []
        for now, before, advantage in zip(row_logp, row_old, row_advantage):
            advantage = advantage * scale + shift
            ratio = (now - before).clamp(-20, 20).exp()
            terms.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage))
            clipped += not 1 - CLIP <= ratio.item() <= 1 + CLIP
            divergence += (ratio - 1 - ratio.log()).item()
            ratios += ratio.item()
        rows.append(terms)
    loss = naive.autograd_loss(rows, token_mean, normalizer)
    loss.backward()
    count = sum(batch.lengths)
    return loss, leaf.grad, clipped / count, divergence / count, ratios / count


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", naive.SIZES)
@pytest.mark.parametrize("reduction", ["sequence-mean", "token-mean"])
def test_equals_the_loops(impl, device, dtype, size, reduction):
    batch = naive.Ragged([size, 1, 0, max(size // 2, 1)], seed=size, device=device)
    logp, old_logp, advantages = inputs_of(batch, dtype)
    logp.requires_grad_()
    loss, stats = ppo_loss(logp, old_logp, advantages, clip_ratio=CLIP, cu_seqlens=batch.cu_seqlens, reduction=reduction,
                           impl=impl)
    (3 * loss).backward()
    expected, gradient, clipped, divergence, ratio = by_loops(batch, logp, old_logp, advantages, reduction == "token-mean")
    assert loss.dtype == logp.grad.dtype == dtype and loss.shape == ()
    assert_near(loss, expected)
    assert_near(logp.grad, 3 * gradient)
    for name, value in dict(clip_fraction=clipped, approx_kl=divergence, ratio=ratio, sequences=3,
                            tokens=sum(batch.lengths), advantage=advantages.double().mean().item()).items():
        assert stats[name].shape == () and not stats[name].requires_grad
        assert_near(stats[name], torch.tensor(float(value), dtype=torch.float64), name)


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("poison", naive.POISONS)
def test_padded_is_packed_whatever_the_mask_hides(impl, device, poison):
    batch = naive.Ragged([5, 0, 300, 1], device=device)
    inputs = inputs_of(batch)
    packed_logp = inputs[0].clone().requires_grad_()
    packed, stats = ppo_loss(packed_logp, *inputs[1:], clip_ratio=CLIP, cu_seqlens=batch.cu_seqlens, impl=impl)
    packed.backward()
    logp, old_logp, advantages = (batch.padded(tensor, poison) for tensor in inputs)
    logp.requires_grad_()
    loss, other = ppo_loss(logp, old_logp, advantages, clip_ratio=CLIP, mask=batch.mask, advantage_shift=0.0, impl=impl)
    loss.backward()
    assert_near(loss, packed)
    assert_near(logp.grad[batch.mask], packed_logp.grad)
    assert (logp.grad[~batch.mask] == 0).all()
    for name, value in stats.items():
        assert_near(other[name], value, name)


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("reduction", ["sequence-mean", "token-mean"])
@pytest.mark.parametrize("on_tensor", [True, False])
def test_micro_batches_with_a_normalizer_add_up(impl, device, reduction, on_tensor):
    batch = naive.Ragged([9, 4, 0, 30], device=device)
    logp, old_logp, advantages = inputs_of(batch, torch.float64)
    call = dict(clip_ratio=CLIP, reduction=reduction, advantage_scale=1.5, advantage_shift=torch.tensor(-0.25), impl=impl)
    whole, _ = ppo_loss(logp, old_logp, advantages, cu_seqlens=batch.cu_seqlens, **call)
    assert_near(whole, by_loops(batch, logp, old_logp, advantages, reduction == "token-mean", None, 1.5, -0.25)[0])
    count = 3.0 if reduction == "sequence-mean" else 43.0
    normalizer = torch.tensor(count, device=device) if on_tensor else count
    parts = [ppo_loss(logp[at], old_logp[at], advantages[at], normalizer=normalizer, cu_seqlens=torch.tensor(
        offsets, dtype=torch.int32, device=device), **call)[0]
        for at, offsets in ((slice(0, 9), [0, 9]), (slice(9, 43), [0, 4, 4, 34]))]
    assert_near(sum(parts), whole)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_far_ratios_and_edges(impl, device):
    """Log-ratios past +-20 are clamped and carry no gradient; a NaN log-prob is not hidden."""
    logp = torch.tensor([0.0, -100.0, 0.0, float("nan")], device=device, requires_grad=True)
    old_logp = torch.tensor([-100.0, 0.0, 0.0, 0.0], device=device)
    advantages = torch.tensor([-1.0, -1.0, -1.0, 1.0], device=device)
    for index, expected in enumerate((torch.tensor(20.0).exp().item(), 0.8, 1.0)):
        offsets = torch.tensor([0, 1], dtype=torch.int32, device=device)
        at = slice(index, index + 1)
        loss, _ = ppo_loss(logp[at], old_logp[at], advantages[at], clip_ratio=CLIP, cu_seqlens=offsets, impl=impl)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        gradient, = torch.autograd.grad(loss, logp)
        assert gradient[index].item() == (1.0 if index == 2 else 0.0)
    loss, _ = ppo_loss(logp, old_logp, advantages, clip_ratio=CLIP, impl=impl)
    assert torch.isnan(loss) and torch.isnan(torch.autograd.grad(loss, logp)[0][3])


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_nothing_to_learn_from(impl, device):
    for shape in ((0, 3), (2, 0), (2, 5)):
        logp = torch.full(shape, torch.nan, device=device, requires_grad=True)
        loss, stats = ppo_loss(logp, logp, logp, clip_ratio=CLIP, mask=torch.zeros(shape, dtype=torch.bool, device=device),
                               advantage_scale=2.0, advantage_shift=1.0, impl=impl)
        loss.backward()
        assert loss.item() == 0 and (logp.grad == 0).all() and all(value == 0 for value in stats.values())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any), spread=st.floats(0, 3),
       impl=st.sampled_from(["reference", "auto"]), token_mean=st.booleans())
def test_any_lengths(lengths, spread, impl, token_mean):
    batch = naive.Ragged(lengths, seed=len(lengths))
    logp, old_logp, advantages = inputs_of(batch, spread=spread)
    full = batch.padded(logp, -100.0).requires_grad_()
    loss, _ = ppo_loss(full, batch.padded(old_logp), batch.padded(advantages), clip_ratio=CLIP, mask=batch.mask, impl=impl,
                       reduction="token-mean" if token_mean else "sequence-mean")
    loss.backward()
    expected, gradient, *_ = by_loops(batch, logp, old_logp, advantages, token_mean)
    assert_near(loss, expected)
    assert_near(full.grad[batch.mask], gradient)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_gradcheck(impl, device):
    batch = naive.Ragged([4, 0, 3], device=device)
    logp, old_logp, advantages = inputs_of(batch, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: ppo_loss(x, old_logp, advantages, clip_ratio=CLIP, cu_seqlens=batch.cu_seqlens, impl=impl)[0],
        (logp.requires_grad_(),))


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_library_and_determinism(impl, device):
    batch = naive.Ragged([3, 300], device=device)
    logp, old_logp, advantages = inputs_of(batch)
    logp.requires_grad_()
    scalar = torch.tensor(2.0, device=device)
    for extra in ((None, None, None), (scalar, scalar, scalar)):
        torch.library.opcheck(torch.ops.saferlhf_fast.ppo_loss,
                              (logp, old_logp, advantages, None, None, batch.cu_seqlens, None, CLIP, 0.0, False, 0.0,
                               False, *extra, impl))

    def call(x):
        return ppo_loss(x, old_logp, advantages, clip_ratio=CLIP, cu_seqlens=batch.cu_seqlens, impl=impl)[0] * 2

    first, second = call(logp), torch.compile(call, fullgraph=True, backend="aot_eager")(logp)
    assert torch.equal(first, second)
    assert torch.equal(*(torch.autograd.grad(loss, logp)[0] for loss in (first, second)))


def test_half_precision_and_threads():
    batch = naive.Ragged([20_000, 20_000])
    inputs = [tensor.bfloat16() for tensor in inputs_of(batch)]
    inputs[0].requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            loss, _ = ppo_loss(*inputs, clip_ratio=CLIP, cu_seqlens=batch.cu_seqlens)
            results.append((loss.detach(), torch.autograd.grad(loss, inputs[0])[0]))
    finally:
        torch.set_num_threads(before)
    assert results[0][0].dtype == torch.float32 and results[0][1].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_wrong_arguments():
    tokens = torch.zeros(4)
    for problem, arguments in (
        ("reduction: expected one of", dict(reduction="mean")),
        ("clip_ratio: expected a number >= 0", dict(clip_ratio=-1.0)),
        ("normalizer: expected a number or a 0-d tensor", dict(normalizer=torch.ones(2))),
    ):
        with pytest.raises(ValueError, match=problem):
            ppo_loss(tokens, tokens, tokens, **(dict(clip_ratio=CLIP) | arguments))
    with pytest.raises(ValueError, match="advantages: expected shape"):
        ppo_loss(tokens, tokens, tokens[:2], clip_ratio=CLIP)
