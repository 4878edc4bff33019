"""value_loss: against loops under autograd, one critic and both, reductions, normaliser, ties, layouts of
memory.
"""

import functools

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_kit import LAYOUTS, exact, laid_out, nan_memory, typed, with_threads
from naive import HERE, INTERPRETED
from tolerance import assert_near

from saferlhf_fast import value_loss

pytestmark = pytest.mark.numeric

CLIP = 0.3


def inputs_of(batch, dtype=torch.float32):
    """Values around the old ones, some further than the clip, and returns."""
    old_values = batch.tokens(torch.float64)
    return [
        tensor.to(dtype)
        for tensor in (old_values + batch.tokens(torch.float64, 0.4), old_values, batch.tokens(torch.float64))
    ]


def both_of(batch, dtype=torch.float32):
    """[2, N] of both critics."""
    return [torch.stack(pair) for pair in zip(inputs_of(batch, dtype), inputs_of(batch, dtype))]


def by_loops(batch, values, old_values, returns, token_mean=False, normalizer=None):
    """(loss, gradient [N], clip fraction, clipped) in float64, the gradient from autograd of the formula."""
    leaf = values.detach().double().cpu().requires_grad_()
    rows, outside, larger = [], 0, 0
    for row_values, row_old, row_returns in zip(
        leaf.split(batch.lengths), batch.split(old_values), batch.split(returns)
    ):
        terms = []
        for value, old, target in zip(row_values, row_old, row_returns):
            clipped = old + (value - old).clamp(-CLIP, CLIP)
            terms.append(0.5 * torch.maximum((value - target) ** 2, (clipped - target) ** 2))
            outside += abs(value.item() - old) > CLIP
            larger += (
                abs(value.item() - old) > CLIP and ((clipped - target) ** 2 > (value - target) ** 2).item()
            )
        rows.append(terms)
    loss = naive.autograd_loss(rows, token_mean, normalizer)
    loss.backward()
    return loss, leaf.grad, outside / sum(batch.lengths), larger / sum(batch.lengths)


@functools.cache
def case_of(size, dtype, token_mean):
    """(batch, inputs, what by_loops gives for them) on the CPU; every implementation is compared with it."""
    batch = naive.Ragged([size, 1, 0, max(size // 2, 1)], seed=size)
    inputs = inputs_of(batch, dtype)
    # A difference of two rounded numbers may lie on the clip itself: float32 decides on which side.
    exact = inputs if dtype == torch.float64 else [tensor.float() for tensor in inputs]
    return batch, inputs, by_loops(batch, *exact, token_mean)


def call(values, old_values, returns, upstream=1.0, **arguments):
    """(loss, gradient, stats) of the op; `values` is not touched. upstream: a number, or one per critic."""
    leaf = values.detach().requires_grad_()
    with nan_memory():
        loss, stats = value_loss(leaf, old_values, returns, clip_value=CLIP, **arguments)
        (upstream * loss).sum().backward()
    return loss.detach(), leaf.grad, stats


@pytest.mark.parametrize(
    "reduction, size, impl, device, dtype",
    naive.pairs(
        ["sequence-mean", "token-mean"],
        naive.SIZES,
        typed(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    ),
)
def test_equals_the_loops(impl, device, dtype, size, reduction):
    batch, inputs, (expected, exact_gradient, *shares) = case_of(size, dtype, reduction == "token-mean")
    inputs = [tensor.to(device) for tensor in inputs]
    loss, gradient, stats = call(
        *inputs, 3, cu_seqlens=batch.cu_seqlens.to(device), reduction=reduction, impl=impl
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == ()
    assert gradient.dtype == dtype
    assert_near(loss, expected)
    assert_near(gradient, 3 * exact_gradient)
    value, _, target = (tensor.double() for tensor in inputs)
    for name, number in dict(
        clip_fraction=shares[0],
        clipped=shares[1],
        value=value.mean().item(),
        error=(value - target).square().mean().item(),
        sequences=3,
        tokens=sum(batch.lengths),
        **{"return": target.mean().item()},
    ).items():
        assert stats[name].shape == () and not stats[name].requires_grad
        assert_near(stats[name], torch.tensor(float(number), dtype=torch.float64), name)


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("poison", naive.POISONS)
def test_both_critics_padded_and_packed(impl, device, poison):
    """[2, N] and [2, B, T] give what two calls give; the upstream gradient of each critic is its own; poison
    is not read.
    """
    batch = naive.Ragged([5, 0, 600, 1], device=device)
    both = both_of(batch)
    behind = [torch.cat([tensor, torch.full((2, 700), poison, device=device)], dim=1) for tensor in both]
    padded = [torch.stack([batch.padded(tensor, poison) for tensor in pair]) for pair in both]
    upstream = torch.tensor([1.0, -2.0], device=device)
    of_critic = [by_loops(batch, *(tensor[index] for tensor in both)) for index in range(2)]
    for tensors, rows, valid in (
        (both, dict(cu_seqlens=batch.cu_seqlens), slice(0, 606)),
        (behind, dict(cu_seqlens=batch.cu_seqlens), slice(0, 606)),
        (padded, dict(mask=batch.mask), batch.mask),
    ):
        loss, gradient, stats = call(*tensors, upstream, impl=impl, **rows)
        assert loss.shape == (2,)
        for index, prefix in enumerate(("reward_", "cost_")):
            expected, exact_gradient, outside, larger = of_critic[index]
            assert_near(loss[index], expected)
            assert_near(stats[prefix + "clip_fraction"], torch.tensor(outside))
            assert_near(stats[prefix + "clipped"], torch.tensor(larger))
            assert_near(stats[prefix + "value"], both[0][index].double().mean())
            assert_near(stats[prefix + "return"], both[2][index].double().mean())
            assert_near(gradient[index][valid], exact_gradient * upstream[index].item())
            hidden = torch.ones_like(gradient[index], dtype=torch.bool)
            hidden[valid] = False
            assert (gradient[index][hidden] == 0).all()
        assert stats["sequences"] == 3 and stats["tokens"] == 606


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("reduction, count", [("sequence-mean", 3.0), ("token-mean", 43.0)])
def test_micro_batches_with_a_normalizer_add_up(impl, device, reduction, count):
    batch = naive.Ragged([9, 4, 0, 30], device=device)
    inputs = inputs_of(batch, exact(impl))
    arguments = dict(reduction=reduction, impl=impl)
    whole, gradient, _ = call(*inputs, cu_seqlens=batch.cu_seqlens, **arguments)
    for normalizer in (count, torch.tensor(count, device=device)):
        parts = [
            call(
                *(tensor[at] for tensor in inputs),
                normalizer=normalizer,
                cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
                **arguments,
            )
            for at, offsets in ((slice(0, 9), [0, 9]), (slice(9, 43), [0, 4, 4, 34]))
        ]
        assert_near(sum(part[0] for part in parts), whole)
        assert_near(torch.cat([part[1] for part in parts]), gradient)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_half_precision_gradients_do_not_vanish(impl, device):
    """1/Z and the upstream gradient meet in float32: either alone would take float16 to 0 or to infinity."""
    batch = naive.Ragged([40, 9], device=device)
    inputs = inputs_of(batch, torch.float16)
    arguments = dict(cu_seqlens=batch.cu_seqlens, reduction="token-mean", impl=impl)
    _, plain, _ = call(*inputs, normalizer=64.0, **arguments)
    _, scaled, _ = call(*inputs, 2.0**24, normalizer=2.0**30, **arguments)
    assert scaled.dtype == torch.float16 and (scaled != 0).sum() > 20
    assert torch.equal(scaled, plain)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_without_a_clip(impl, device):
    """clip_value=inf: half the plain mean square, however far the old values are, and whatever they are."""
    batch = naive.Ragged([5, 0, 300], device=device)
    values, old_values, returns = both_of(batch)
    for old in (old_values, old_values + 1e8, old_values * torch.nan):
        leaf = values.clone().requires_grad_()
        loss, stats = value_loss(
            leaf,
            old,
            returns,
            clip_value=float("inf"),
            cu_seqlens=batch.cu_seqlens,
            impl=impl,
            reduction="token-mean",
        )
        expected = (values.double() - returns.double()).square().mean(1) / 2
        assert_near(loss, expected)
        assert_near(torch.autograd.grad(loss.sum(), leaf)[0], (values - returns) / 305)
        for name, critic in (("reward_", 0), ("cost_", 1)):
            assert stats[name + "clip_fraction"] == stats[name + "clipped"] == 0
            assert_near(stats[name + "error"], 2 * expected[critic])


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_ties_follow_autograd(impl, device):
    """Inside the range both squares are one and the gradient is whole; equal squares outside it share, as in
    autograd.
    """
    batch = naive.Ragged([3], device=device)
    old_values = torch.zeros(3, device=device)
    values = torch.tensor([0.25, 1.0, 1.0], device=device, requires_grad=True)
    returns = torch.tensor([0.0, 0.75, 5.0], device=device)
    loss, _ = value_loss(values, old_values, returns, clip_value=0.5, cu_seqlens=batch.cu_seqlens, impl=impl)
    loss.backward()
    leaf = values.detach().clone().requires_grad_()
    clipped = old_values + (leaf - old_values).clamp(-0.5, 0.5)
    expected = 0.5 * torch.maximum((leaf - returns) ** 2, (clipped - returns) ** 2).mean()
    expected.backward()
    assert_near(values.grad, leaf.grad)
    assert values.grad[0] != 0 and values.grad[1] != 0 and values.grad[2] == 0


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_stays_visible(impl, device, which):
    inputs = inputs_of(naive.Ragged([5], device=device))
    inputs[which][3] = torch.nan
    loss, gradient, _ = call(*inputs, impl=impl)
    assert torch.isnan(loss) and torch.isnan(gradient).tolist() == [False, False, False, which != 1, False]


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_nothing_to_learn_from(impl, device):
    for shape in ((0, 3), (2, 0), (2, 5), (2, 2, 5), (2, 0, 3)):
        nan = torch.full(shape, torch.nan, device=device)
        mask = torch.zeros(shape[-2:], dtype=torch.bool, device=device)
        loss, gradient, stats = call(nan, nan, nan, mask=mask, impl=impl)
        assert (loss == 0).all() and (gradient == 0).all() and all(value == 0 for value in stats.values())
    loss, gradient, _ = call(*inputs_of(naive.Ragged([3], device=device)), normalizer=0, impl=impl)
    assert loss == 0 and (gradient == 0).all()
    nan = torch.full((2, 4), torch.nan, device=device)
    for offsets in ([0], [0, 0], [0, 0, 0]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
        loss, gradient, stats = call(nan, nan, nan, cu_seqlens=cu_seqlens, impl=impl)
        assert (loss == 0).all() and (gradient == 0).all() and all(value == 0 for value in stats.values())


@settings(max_examples=8 if INTERPRETED else 40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    impl=st.sampled_from(HERE),
    token_mean=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    packed=st.booleans(),
    critics=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_lengths_and_layouts(lengths, impl, token_mean, layout, packed, critics, dtype):
    batch = naive.Ragged(lengths, seed=len(lengths))
    both = [tensor[:critics] for tensor in both_of(batch, dtype)]
    given_ = (
        both if packed else [torch.stack([batch.padded(row, -100.0) for row in tensor]) for tensor in both]
    )
    if critics == 1:
        given_ = [tensor[0] for tensor in given_]
    rows = (
        dict(cu_seqlens=laid_out(batch.cu_seqlens.double(), layout).int())
        if packed
        else dict(mask=batch.mask)
    )
    loss, gradient, _ = call(
        *(laid_out(tensor, layout) for tensor in given_),
        impl=impl,
        reduction="token-mean" if token_mean else "sequence-mean",
        **rows,
    )
    gradient = gradient if packed else gradient[..., batch.mask]
    for index in range(critics):
        expected, exact_gradient, *_ = by_loops(
            batch, *(tensor[index].float() for tensor in both), token_mean
        )
        assert_near(loss.reshape(-1)[index], expected)
        assert_near(gradient.reshape(critics, -1)[index], exact_gradient)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_a_long_row_and_many_rows(impl, device):
    """naive.LONG tokens in one row; more rows than a grid's second axis takes (in the interpreter fewer)."""
    long = naive.Ragged([naive.LONG, 3], device=device)
    many = naive.Ragged([index % 3 for index in range(60 if INTERPRETED else 70_001)], device=device)
    for batch in (long, many):
        both = both_of(batch)
        loss, gradient, stats = call(*both, cu_seqlens=batch.cu_seqlens, impl=impl)
        values, old_values, returns = (tensor.double().cpu() for tensor in both)
        leaf = values.requires_grad_()
        clipped = old_values + (leaf - old_values).clamp(-CLIP, CLIP)
        terms = 0.5 * torch.maximum((leaf - returns) ** 2, (clipped - returns) ** 2)
        count_B = torch.tensor(batch.lengths)
        share = (1 / count_B.clamp(min=1).double()).repeat_interleave(count_B) / (count_B > 0).sum()
        expected = (terms * share).sum(1)
        expected.sum().backward()
        assert_near(loss, expected)
        assert_near(gradient, leaf.grad)
        assert stats["sequences"] == (count_B > 0).sum() and stats["tokens"] == count_B.sum()
        assert_near(stats["cost_value"], values[1].mean())


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_gradcheck(impl, device):
    if impl == "triton":
        pytest.skip("Triton has no float64 version: the dispatcher refuses it")
    batch = naive.Ragged([4, 0, 3], device=device)
    values, old_values, returns = both_of(batch, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: value_loss(x, old_values, returns, clip_value=CLIP, cu_seqlens=batch.cu_seqlens, impl=impl)[
            0
        ],
        (values.requires_grad_(),),
    )


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_library_and_determinism(impl, device):
    batch = naive.Ragged([3, 700], device=device)
    values, old_values, returns = both_of(batch)
    values.requires_grad_()
    for normalizer in (None, torch.tensor(2.0, device=device)):
        torch.library.opcheck(
            torch.ops.saferlhf_fast.value_loss,
            (values, old_values, returns, batch.cu_seqlens, None, CLIP, True, normalizer, impl),
        )

    def loss(x):
        return value_loss(x, old_values, returns, clip_value=CLIP, cu_seqlens=batch.cu_seqlens, impl=impl)[0]

    losses = [loss(values), loss(values), torch.compile(loss, fullgraph=True, backend="aot_eager")(values)]
    gradients = [torch.autograd.grad(value.sum(), values)[0] for value in losses]
    for again in (1, 2):
        assert torch.equal(losses[0], losses[again]) and torch.equal(gradients[0], gradients[again])


@pytest.mark.skipif(INTERPRETED, reason="threads are the business of the CPU's versions")
@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=naive.native)])
def test_threads_change_no_bit(impl):
    batch = naive.Ragged([20_000, 100_000, 7])
    both = both_of(batch, torch.bfloat16)
    one, two = with_threads(lambda: call(*both, cu_seqlens=batch.cu_seqlens, impl=impl))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert all(torch.equal(one[2][name], two[2][name]) for name in one[2])


def test_wrong_arguments():
    values = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="one critic or two in front"):
        value_loss(
            values, values, values, clip_value=CLIP, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)
        )
    with pytest.raises(ValueError, match="clip_value: expected a number >= 0"):
        value_loss(values, values, values, clip_value=float("nan"))
    with pytest.raises(ValueError, match="returns: expected shape"):
        value_loss(values, values, values[:2], clip_value=CLIP)
