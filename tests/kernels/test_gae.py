"""gae: against Python loops, packed against padded, poisoned masks, holes, odd sizes, torch.library."""

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_near

from saferlhf_fast import gae
from saferlhf_fast.kernels.gae import reference

pytestmark = pytest.mark.numeric

SETTINGS = dict(gamma=0.97, lam=0.9)


def by_loops(batch, rewards, values, gamma, lam):
    rows = [naive.gae_row(r, v, gamma, lam) for r, v in zip(batch.split(rewards), batch.split(values))]
    return batch.join(row[0] for row in rows), batch.join(row[1] for row in rows)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", naive.SIZES)
def test_equals_the_loops(impl, device, dtype, size):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the Triton version takes no float64")
    batch = naive.Ragged([size, 1, 0, max(size // 2, 1)], seed=size, device=device)
    rewards, values = batch.tokens(dtype), batch.tokens(dtype)
    got = gae(rewards, values, cu_seqlens=batch.cu_seqlens, impl=impl, **SETTINGS)
    for ours, theirs in zip(got, by_loops(batch, rewards, values, **SETTINGS)):
        assert ours.dtype == dtype
        assert_near(ours, theirs)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
@pytest.mark.parametrize("poison", naive.POISONS)
@pytest.mark.parametrize("masked", ["zero", "carry"])
def test_padded_is_packed_whatever_the_mask_hides(impl, device, poison, masked):
    batch = naive.Ragged([5, 0, 63, 1], device=device)
    rewards, values = batch.tokens(), batch.tokens()
    packed = gae(rewards, values, cu_seqlens=batch.cu_seqlens, impl=impl, **SETTINGS)
    padded = gae(
        batch.padded(rewards, poison),
        batch.padded(values, poison),
        mask=batch.mask,
        masked=masked,
        impl=impl,
        **SETTINGS,
    )
    for ours, other in zip(padded, packed):
        assert_near(ours[batch.mask], other)
        assert (ours[~batch.mask] == 0).all()


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_the_same_bits_twice(impl, device):
    batch = naive.Ragged([252, 63, 700], device=device)
    rewards, values = batch.tokens(), batch.tokens()
    padded = batch.padded(rewards), batch.padded(values)
    for tensors, rows in (
        ((rewards, values), dict(cu_seqlens=batch.cu_seqlens)),
        (padded, dict(mask=batch.mask)),
    ):
        first, second = (gae(*tensors, impl=impl, **rows, **SETTINGS) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def verl_rule(rewards, values, mask, gamma, lam):
    """verl's loop: a masked token hands on both the next value and the running sum."""
    advantages = torch.zeros_like(rewards)
    next_value = running = 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = running
    return torch.where(mask, advantages, 0)


def safe_rlhf_rule(rewards, values, mask, gamma, lam):
    """safe-rlhf's loop: rewards and values are multiplied by the mask first."""
    rewards, values, advantages = rewards * mask, values * mask, torch.zeros_like(rewards)
    running = 0.0
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        running = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * running
        advantages[:, t] = running
    return torch.where(mask, advantages, 0)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
@pytest.mark.parametrize("masked, rule", [("carry", verl_rule), ("zero", safe_rlhf_rule)])
def test_holes(impl, device, masked, rule):
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if impl == "triton" else torch.float64
    rewards, values = (torch.randn(6, 140, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(6, 140, generator=generator) > 0.4
    mask[3] = False
    expected = rule(rewards.double(), values.double(), mask, 0.97, 0.9)
    poisoned = [torch.where(mask, tensor, torch.nan).to(device) for tensor in (rewards, values)]
    advantages, returns = gae(*poisoned, mask=mask.to(device), masked=masked, impl=impl, **SETTINGS)
    assert_near(advantages, expected)
    assert_near(returns, torch.where(mask, expected + values, 0))


@naive.native
@pytest.mark.parametrize("lam", [1.0, 0.9999, 0.99, 0.5])
def test_the_error_of_the_native_version_does_not_grow_with_the_row(lam):
    """8 ulp (of float32) of the sum of the terms' sizes, also 100,000 tokens before the end."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(100_000, generator=generator), 3 * torch.randn(100_000, generator=generator)
    exact = [rewards.double(), values.double()]
    advantages = gae(rewards, values, gamma=1.0, lam=lam, impl="native")[0].double()
    error = (advantages - gae(*exact, gamma=1.0, lam=lam, impl="native")[0]).abs()
    terms = lam * exact[0].abs() + (1 - lam) * exact[1].abs()
    sizes = gae(terms, 0 * terms, gamma=1.0, lam=lam, impl="native")[0] + exact[0].abs() + exact[1].abs()
    assert (error / sizes).max() < 8 * 2.0**-24


@naive.native
def test_a_nan_reaches_the_tokens_before_it_in_its_row_and_no_others():
    batch = naive.Ragged([40, 61, 17])
    rewards, values = batch.tokens(), batch.tokens()
    clean = gae(rewards, values, cu_seqlens=batch.cu_seqlens, impl="native", **SETTINGS)[0]
    rewards[40 + 23] = torch.nan
    advantages = gae(rewards, values, cu_seqlens=batch.cu_seqlens, impl="native", **SETTINGS)[0]
    assert advantages[40:64].isnan().all()
    assert torch.equal(advantages[:40], clean[:40]) and torch.equal(advantages[64:], clean[64:])


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_empty_batches(impl, device):
    nothing = torch.zeros(0, device=device)
    offsets = torch.zeros(1, dtype=torch.int32, device=device)
    assert gae(nothing, nothing, cu_seqlens=offsets, impl=impl, **SETTINGS)[0].shape == (0,)
    for shape in ((0, 7), (3, 0), (0, 0)):
        empty = torch.zeros(shape, device=device)
        assert gae(empty, empty, mask=empty.bool(), impl=impl, **SETTINGS)[1].shape == shape


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_a_tail_past_the_last_offset_is_masked(impl, device):
    rewards = torch.tensor([1.0, 2.0, 3.0, float("nan")], device=device)
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
    advantages, _ = gae(
        rewards, torch.zeros(4, device=device), cu_seqlens=offsets, gamma=1.0, lam=1.0, impl=impl
    )
    assert advantages.tolist() == [3.0, 2.0, 3.0, 0.0]


def test_the_reference_holds_on_long_rows():
    """131,072 tokens, gamma * lam = .9999: repeated squares of the decay in float32 are off by 1000 times the
    table.
    """
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(131_072, generator=generator) for _ in range(2))
    got = gae(rewards, values, gamma=1.0, lam=0.9999, impl="reference")
    for ours, exact in zip(got, naive.gae_row(rewards.tolist(), values.tolist(), 1.0, 0.9999)):
        assert_near(ours, torch.tensor(exact, dtype=torch.float64))


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=naive.native)])
@pytest.mark.parametrize("offsets", [[1, 4], [0, 5], [0, 3, 2, 4]])
def test_bad_offsets_are_refused_on_the_cpu(impl, offsets):
    with pytest.raises(ValueError, match=rf"gae: cu_seqlens: expected offsets .*, got \[{offsets[0]}, "):
        gae(
            torch.zeros(4),
            torch.zeros(4),
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
            impl=impl,
            **SETTINGS,
        )


@settings(max_examples=8 if naive.INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=6),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    impl=st.sampled_from(naive.HERE),
)
def test_any_lengths(lengths, gamma, lam, impl):
    batch = naive.Ragged(lengths, seed=len(lengths))
    rewards, values = batch.tokens(), batch.tokens()
    got = gae(rewards, values, cu_seqlens=batch.cu_seqlens, gamma=gamma, lam=lam, impl=impl)
    for ours, theirs in zip(got, by_loops(batch, rewards, values, gamma, lam)):
        assert_near(ours, theirs)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_bfloat16_strided_and_long(impl, device):
    values = torch.randn(9, 4, device=device).bfloat16().t()
    rewards = torch.randn(4, 18, device=device)[:, ::2]
    mask = torch.ones(4, 18, dtype=torch.bool, device=device)[:, ::2]
    got = gae(rewards, values, mask=mask, impl=impl, **SETTINGS)[0]
    expected = gae(rewards.double(), values.double(), mask=mask.contiguous(), impl="reference", **SETTINGS)[0]
    assert got.dtype == torch.float32
    assert_near(got, expected)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_long_rows(impl, device):
    """naive.LONG whole numbers with gamma = lam = 1, where every float32 sum is exact; then fractions."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randint(-3, 4, (naive.LONG,), generator=generator).float() for _ in range(2))
    advantages, returns = gae(rewards.to(device), values.bfloat16().to(device), gamma=1.0, lam=1.0, impl=impl)
    expected = rewards.flip(0).cumsum(0).flip(0)
    assert torch.equal(returns.cpu(), expected) and torch.equal(advantages.cpu(), expected - values)
    rewards, values = (torch.randn(min(naive.LONG, 20_000), generator=generator) for _ in range(2))
    got = gae(rewards.to(device), values.to(device), gamma=1.0, lam=0.95, impl=impl)
    for ours, exact in zip(got, naive.gae_row(rewards.tolist(), values.tolist(), 1.0, 0.95)):
        assert_near(ours, torch.tensor(exact, dtype=torch.float64))


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_every_output_is_written(impl, device):
    """Torch fills new tensors with NaN here: none may come through, neither of masked rows nor past the last
    offset.
    """
    numbers = torch.ones(700, device=device)
    mask = torch.zeros(7, 100, dtype=torch.bool, device=device)
    mask[2, 3:50] = True
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        for offsets in ([0], [0, 0], [0, 5, 5, 18], [0, 300, 700]):
            offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
            for got in gae(numbers, numbers / 2, cu_seqlens=offsets, impl=impl, **SETTINGS):
                assert (got[: offsets[-1]] != 0).all() and (got[offsets[-1] :] == 0).all()
        for got in gae(numbers.view(7, 100), numbers.view(7, 100) / 2, mask=mask, impl=impl, **SETTINGS):
            assert torch.isfinite(got).all() and torch.equal(got != 0, mask)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_seventy_thousand_rows(impl, device):
    if naive.INTERPRETED:
        pytest.skip("a program a row: too many for the interpreter; the next test looks at the grid")
    rewards, values = torch.randn(2, 70_000, device=device)
    offsets = torch.arange(70_001, dtype=torch.int32, device=device)
    packed = gae(rewards, values, cu_seqlens=offsets, impl=impl, **SETTINGS)
    padded = gae(rewards[:, None], values[:, None], impl=impl, **SETTINGS)
    for advantages, returns in (packed, [tensor[:, 0] for tensor in padded]):
        assert_near(advantages, rewards - values)
        assert_near(returns, rewards)


class Recorder:
    """In place of a kernel: remembers the grids and the options of its launches and runs nothing."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, options))


def test_triton_launches_rows_along_x(monkeypatch):
    triton_impl = pytest.importorskip("saferlhf_fast.kernels.gae.triton_impl")
    recorder = Recorder()
    monkeypatch.setattr(triton_impl, "gae_kernel", recorder)
    many, one = torch.zeros(70_000), torch.zeros(1)
    triton_impl.gae(many, many, torch.arange(70_001, dtype=torch.int32), None, 1.0, 1.0, False)
    triton_impl.gae(
        many[:, None], many[:, None], None, torch.ones(70_000, 1, dtype=torch.bool), 1.0, 1.0, True
    )
    triton_impl.gae(many[None], many[None], None, torch.ones(1, 70_000, dtype=torch.bool), 1.0, 1.0, False)
    triton_impl.gae(one, one, torch.zeros(1, dtype=torch.int32), None, 1.0, 1.0, True)
    assert [grid for grid, _ in recorder.launches] == [(70_000,), (70_000,), (1,), (1,)]
    assert [options["CARRY"] for _, options in recorder.launches] == [False, True, False, False]
    blocks = [(options["GROUPS"] * triton_impl.PER, options["num_warps"]) for _, options in recorder.launches]
    smallest, largest = min(triton_impl.CONFIGS.items()), max(triton_impl.CONFIGS.items())
    assert blocks == [smallest, smallest, largest, smallest]


def test_gradcheck_of_the_reference():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    inputs = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for carry in (False, True):
        assert torch.autograd.gradcheck(
            lambda r, v, carry=carry: reference.gae(r, v, None, mask, 0.9, 0.8, carry), inputs
        )


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_library(impl, device):
    batch = naive.Ragged([3, 2], device=device)
    rewards, values = batch.tokens(), batch.tokens()
    torch.library.opcheck(
        torch.ops.saferlhf_fast.gae, (rewards, values, batch.cu_seqlens, None, 1.0, 0.9, False, impl)
    )
    torch.library.opcheck(
        torch.ops.saferlhf_fast.gae,
        (batch.padded(rewards, 0.0), batch.padded(values, 0.0), None, batch.mask, 1.0, 0.9, True, impl),
    )
    compiled = torch.compile(
        lambda r, v: gae(r, v, cu_seqlens=batch.cu_seqlens, impl=impl, **SETTINGS)[0] * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    expected = gae(rewards, values, cu_seqlens=batch.cu_seqlens, impl=impl, **SETTINGS)[0] * 2
    assert torch.equal(compiled(rewards, values), expected)


def test_wrong_arguments():
    tokens = torch.zeros(4)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    for problem, arguments in (
        ("values: expected shape", dict(values=torch.zeros(5), cu_seqlens=offsets)),
        ("floating point", dict(values=torch.zeros(4, dtype=torch.int64), cu_seqlens=offsets)),
        ("got both", dict(values=tokens, cu_seqlens=offsets, mask=tokens.bool())),
        ("expected int32 offsets", dict(values=tokens, cu_seqlens=offsets[None])),
        ("masked: expected one of", dict(values=tokens, cu_seqlens=offsets, masked="skip")),
    ):
        with pytest.raises(ValueError, match=problem):
            gae(tokens, **arguments, **SETTINGS)
    with pytest.raises(ValueError, match="mask: expected dtype torch.bool"):
        gae(torch.zeros(2, 2), torch.zeros(2, 2), mask=torch.ones(2, 2), **SETTINGS)
