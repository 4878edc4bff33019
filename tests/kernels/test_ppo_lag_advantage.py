"""ppo_lag_advantage: against loops written from the paper, every statistic, plain PPO, whitening, poison,
torch.library.
"""

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_near

from saferlhf_fast import gae, ppo_lag_advantage, ppo_loss
from saferlhf_fast.kernels.ppo_lag_advantage import reference, whitening

pytestmark = pytest.mark.numeric

SETTINGS = dict(kl_coeff=0.1, gamma=0.99, lam=0.95, clip_score=0.7)
TOKENS = ("logp", "ref_logp", "reward_values", "cost_values")


def inputs_of(batch, dtype=torch.float32):
    names = ("logp", "ref_logp", "reward", "cost", "reward_values", "cost_values")
    return {
        name: batch.scores(dtype) if name in ("reward", "cost") else batch.tokens(dtype) for name in names
    }


def padded(batch, inputs, poison):
    return {name: batch.padded(value, poison) if name in TOKENS else value for name, value in inputs.items()}


def by_loops(batch, inputs, multiplier, kl_coeff, gamma, lam, clip_score):
    rows = {name: batch.split(inputs[name]) for name in TOKENS}
    advantages, reward_returns, cost_returns, parts = [], [], [], []
    for row in range(len(batch.lengths)):
        logp, ref_logp = rows["logp"][row], rows["ref_logp"][row]
        r = naive.shaped_row(logp, ref_logp, inputs["reward"][row].item(), -1, kl_coeff, clip_score)
        c = naive.shaped_row(logp, ref_logp, inputs["cost"][row].item(), +1, kl_coeff, clip_score)
        a_r, ret_r = naive.gae_row(r, rows["reward_values"][row], gamma, lam)
        a_c, ret_c = naive.gae_row(c, rows["cost_values"][row], gamma, lam)
        advantages.append([(x - multiplier * y) / (1 + multiplier) for x, y in zip(a_r, a_c)])
        reward_returns.append(ret_r)
        cost_returns.append(ret_c)
        parts.append((r, c, a_r, a_c, [x - y for x, y in zip(logp, ref_logp)]))
    flat = [value for row in advantages for value in row]
    rows_with_tokens = [row for row in range(len(batch.lengths)) if batch.lengths[row]]

    def sums(part):
        return sum(sum(parts[row][part]) for row in rows_with_tokens) / len(rows_with_tokens)

    stats = {
        "count": len(flat),
        "sum": sum(flat),
        "sum_squares": sum(value * value for value in flat),
        "sequences": len(rows_with_tokens),
        "kl": naive.mean_of_row_means([part[4] for part in parts]),
        "kl_sequence": sums(4),
        "shaped_reward": sums(0),
        "shaped_cost": sums(1),
        "reward_advantage": naive.mean_of_row_means([part[2] for part in parts]),
        "cost_advantage": naive.mean_of_row_means([part[3] for part in parts]),
        "reward_return": naive.mean_of_row_means(reward_returns),
        "cost_return": naive.mean_of_row_means(cost_returns),
    }
    return [batch.join(rows) for rows in (advantages, reward_returns, cost_returns)], stats


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", naive.SIZES)
@pytest.mark.parametrize("on_tensor", [True, False])
def test_equals_the_loops(impl, device, dtype, size, on_tensor):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the Triton version takes no float64")
    batch = naive.Ragged([size, 1, 0, max(size // 2, 1)], seed=size, device=device)
    inputs = inputs_of(batch, dtype)
    multiplier = torch.tensor(1.75, device=device) if on_tensor else 1.75
    *got, stats = ppo_lag_advantage(
        **inputs, multiplier=multiplier, cu_seqlens=batch.cu_seqlens, impl=impl, **SETTINGS
    )
    expected, expected_stats = by_loops(batch, inputs, 1.75, **SETTINGS)
    for ours, theirs in zip(got, expected):
        assert ours.dtype == dtype
        assert_near(ours, theirs)
    assert stats.keys() == expected_stats.keys()
    for name, value in expected_stats.items():
        assert stats[name].shape == () and stats[name].dtype == dtype
        assert_near(stats[name], torch.tensor(float(value), dtype=torch.float64), name)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
@pytest.mark.parametrize("poison", naive.POISONS)
def test_padded_is_packed_whatever_the_mask_hides(impl, device, poison):
    batch = naive.Ragged([5, 0, 63, 1], device=device)
    inputs = inputs_of(batch)
    *packed, stats = ppo_lag_advantage(
        **inputs, multiplier=0.5, cu_seqlens=batch.cu_seqlens, impl=impl, **SETTINGS
    )
    *other, other_stats = ppo_lag_advantage(
        **padded(batch, inputs, poison), multiplier=0.5, mask=batch.mask, impl=impl, **SETTINGS
    )
    for one, two in zip(packed, other):
        assert_near(two[batch.mask], one)
        assert (two[~batch.mask] == 0).all()
    for name, value in stats.items():
        assert_near(other_stats[name], value, name)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
@pytest.mark.parametrize("masked", ["zero", "carry"])
@pytest.mark.parametrize("share", [0.5] if naive.INTERPRETED else [0.05, 0.5, 0.95])
def test_holes(impl, device, masked, share):
    """Runs of valid tokens of any length, holes of any length, in rows longer than a vector: outputs and
    statistics.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(7, 93, generator=generator) for _ in range(4)]
    scores = [torch.randn(7, generator=generator) for _ in range(2)]
    mask = torch.rand(7, 93, generator=generator) > share
    mask[3] = False
    tokens = [torch.where(mask, tensor, torch.nan).to(device) for tensor in tokens]
    scores = [tensor.to(device) for tensor in scores]
    call = dict(multiplier=0.5, mask=mask.to(device), masked=masked, **SETTINGS)
    *got, stats = ppo_lag_advantage(*tokens[:2], *scores, *tokens[2:], impl=impl, **call)
    double = [[tensor.double() for tensor in part] for part in (tokens, scores)]
    *exact, exact_stats = ppo_lag_advantage(
        *double[0][:2], *double[1], *double[0][2:], impl="reference", **call
    )
    for ours, theirs in zip((*got, *stats.values()), (*exact, *exact_stats.values())):
        assert_near(ours, theirs)


@naive.native
def test_the_number_of_threads_changes_no_bit():
    batch = naive.Ragged([9000, 1, 12_000, 5000, 9000])
    inputs, threads, results = inputs_of(batch), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            *got, stats = ppo_lag_advantage(
                **inputs, multiplier=0.5, cu_seqlens=batch.cu_seqlens, impl="native", **SETTINGS
            )
            results.append((*got, *stats.values()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_the_clamp_comes_after_the_score(impl, device):
    """logp - ref = 2, kl_coeff 1, score 9, bound 5: the last token's reward is clip(-2 + 9) = 5, not -2 +
    clip(9) = 3.
    """
    ones = torch.ones(2, device=device)
    offsets = torch.tensor([0, 2], dtype=torch.int32, device=device)
    score = torch.tensor([9.0], device=device)
    advantages, _, cost_returns, _ = ppo_lag_advantage(
        2 * ones,
        0 * ones,
        score,
        -score,
        0 * ones,
        0 * ones,
        0.0,
        kl_coeff=1.0,
        gamma=0.0,
        lam=1.0,
        clip_score=5.0,
        cu_seqlens=offsets,
        impl=impl,
    )
    assert advantages.tolist() == [-2.0, 5.0]
    assert cost_returns.tolist() == [2.0, -5.0]


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_without_cost_it_is_plain_ppo(impl, device):
    batch = naive.Ragged([7, 0, 4], device=device)
    inputs = inputs_of(batch)
    inputs |= dict(cost=None, cost_values=None)
    advantages, returns, cost_returns, stats = ppo_lag_advantage(
        **inputs, multiplier=None, cu_seqlens=batch.cu_seqlens, impl=impl, **SETTINGS
    )
    shaped = [
        naive.shaped_row(a, b, r, -1, 0.1, 0.7)
        for a, b, r in zip(
            batch.split(inputs["logp"]), batch.split(inputs["ref_logp"]), inputs["reward"].tolist()
        )
    ]
    expected = gae(
        batch.join(shaped).to(device),
        inputs["reward_values"].double(),
        cu_seqlens=batch.cu_seqlens,
        gamma=0.99,
        lam=0.95,
    )
    assert cost_returns is None and not [name for name in stats if "cost" in name]
    assert_near(advantages, expected[0])
    assert_near(returns, expected[1])
    with pytest.raises(ValueError, match="multiplier None"):
        ppo_lag_advantage(**inputs_of(batch), multiplier=None, cu_seqlens=batch.cu_seqlens, **SETTINGS)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_whitening_leaves_advantages_alone_and_ppo_loss_applies_it(impl, device):
    dtype = torch.float32 if impl == "triton" else torch.float64
    batch = naive.Ragged([40, 3, 0, 25], device=device)
    inputs = inputs_of(batch, dtype)
    call = dict(multiplier=0.5, cu_seqlens=batch.cu_seqlens, impl=impl, **SETTINGS)
    advantages, _, _, stats = ppo_lag_advantage(**inputs, whiten=True, **call)
    assert torch.equal(advantages, ppo_lag_advantage(**inputs, **call)[0])
    white = (advantages - advantages.mean()) / (advantages.var(correction=0) + 1e-8).sqrt()
    rows = dict(cu_seqlens=batch.cu_seqlens, clip_ratio=0.2)
    old = batch.tokens(dtype)
    loss, _ = ppo_loss(
        inputs["logp"],
        old,
        advantages,
        advantage_scale=stats["advantage_scale"],
        advantage_shift=stats["advantage_shift"],
        **rows,
    )
    assert_near(loss, ppo_loss(inputs["logp"], old, white, **rows)[0])
    # Two ranks: the three sums add up to the whole batch's.
    halves = [
        torch.stack([half.new_tensor(float(len(half))), half.sum(), half.square().sum()])
        for half in advantages.split([30, 38])
    ]
    scale, shift = whitening(*(halves[0] + halves[1]))
    assert_near(scale, stats["advantage_scale"])
    assert_near(shift, stats["advantage_shift"])


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_empty_batches(impl, device):
    nothing = torch.zeros(0, device=device)
    offsets = torch.zeros(1, dtype=torch.int32, device=device)
    for rows, tokens, scores in (
        (dict(cu_seqlens=offsets), nothing, nothing),
        (dict(cu_seqlens=offsets.expand(3)), nothing, torch.ones(2, device=device)),
        (
            dict(mask=torch.zeros(2, 5, dtype=torch.bool, device=device)),
            torch.full((2, 5), torch.nan, device=device),
            torch.full((2,), torch.nan, device=device),
        ),
    ):
        *got, stats = ppo_lag_advantage(
            tokens, tokens, scores, scores, tokens, tokens, 1.0, impl=impl, whiten=True, **rows, **SETTINGS
        )
        assert all((tensor == 0).all() for tensor in got)
        assert all(torch.isfinite(value) for value in stats.values()), stats
        assert stats["count"] == 0


@settings(max_examples=8 if naive.INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    multiplier=st.floats(0, 5),
    kl_coeff=st.floats(0, 1),
    impl=st.sampled_from(naive.HERE),
    whiten=st.booleans(),
)
def test_any_lengths(lengths, multiplier, kl_coeff, impl, whiten):
    batch = naive.Ragged(lengths, seed=len(lengths))
    inputs = inputs_of(batch)
    call = SETTINGS | dict(kl_coeff=kl_coeff)
    *got, _ = ppo_lag_advantage(
        **padded(batch, inputs, -100.0),
        multiplier=multiplier,
        mask=batch.mask,
        impl=impl,
        whiten=whiten,
        **call,
    )
    expected, _ = by_loops(batch, inputs, multiplier, **call)
    for ours, theirs in zip(got, expected):
        assert_near(ours[batch.mask], theirs)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_a_long_row(impl, device):
    """Every output and every sum, from bfloat16 numbers, against float64."""
    batch = naive.Ragged([naive.LONG, 3], device=device)
    inputs = {
        name: tensor if name in ("reward", "cost") else tensor.bfloat16()
        for name, tensor in inputs_of(batch).items()
    }
    call = dict(multiplier=0.5, cu_seqlens=batch.cu_seqlens, **SETTINGS)
    *got, stats = ppo_lag_advantage(**inputs, impl=impl, **call)
    *exact, exact_stats = ppo_lag_advantage(
        **{name: tensor.double() for name, tensor in inputs.items()}, impl="reference", **call
    )
    for ours, theirs in zip(got, exact):
        assert ours.dtype == torch.float32
        assert_near(ours, theirs)
    for name, value in stats.items():
        assert_near(value, exact_stats[name], name)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
@pytest.mark.parametrize("with_cost", [True, False])
def test_every_output_is_written_and_nothing_past_the_last_offset_read(impl, device, with_cost, monkeypatch):
    """Torch fills new tensors with NaN here. More rows than programs, where the number of programs can be
    set.
    """
    if naive.INTERPRETED:
        triton_impl = pytest.importorskip("saferlhf_fast.kernels.ppo_lag_advantage.triton_impl")
        monkeypatch.setattr(triton_impl, "PROGRAMS", type(triton_impl.PROGRAMS)(4))
    batch = naive.Ragged([5, 0, 140, 1, 60, 7, 2, 3, 0, 11], device=device)
    inputs = inputs_of(batch)
    if not with_cost:
        inputs |= dict(cost=None, cost_values=None)
    call = dict(multiplier=0.5 if with_cost else None, cu_seqlens=batch.cu_seqlens, **SETTINGS)
    longer = {
        name: torch.cat([tensor, tensor.new_full((700,), torch.nan)])
        if name in TOKENS and tensor is not None
        else tensor
        for name, tensor in inputs.items()
    }
    *expected, expected_stats = ppo_lag_advantage(
        **{name: None if tensor is None else tensor.double() for name, tensor in inputs.items()},
        impl="reference",
        **call,
    )
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        results = [ppo_lag_advantage(**longer, impl=impl, **call) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    (*got, stats), (*again, stats_again) = results
    for ours, same, theirs in zip(got, again, expected):
        if theirs is not None:
            assert torch.equal(ours, same) and (ours[-700:] == 0).all()
            assert_near(ours[:-700], theirs)
    for name, value in stats.items():
        assert torch.equal(value, stats_again[name])
        assert_near(value, expected_stats[name], name)


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_seventy_thousand_rows(impl, device):
    if naive.INTERPRETED:
        pytest.skip("too many for the interpreter; the next test looks at the grid")
    batch = naive.Ragged([1] * 70_000, slack=0, device=device)
    inputs = inputs_of(batch)
    packed = dict(inputs, cu_seqlens=batch.cu_seqlens)
    padded = {name: value[:, None] if name in TOKENS else value for name, value in inputs.items()}
    exact = ppo_lag_advantage(
        **{name: value.double() for name, value in inputs.items()},
        cu_seqlens=batch.cu_seqlens,
        multiplier=0.5,
        impl="reference",
        **SETTINGS,
    )
    for call in (packed, padded):
        *got, stats = ppo_lag_advantage(**call, multiplier=0.5, impl=impl, **SETTINGS)
        for ours, theirs in zip((*got, *stats.values()), (*exact[:3], *exact[3].values())):
            assert_near(ours.reshape(theirs.shape), theirs)


def test_triton_launches_once_along_x(monkeypatch):
    triton_impl = pytest.importorskip("saferlhf_fast.kernels.ppo_lag_advantage.triton_impl")
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append(grid)

    monkeypatch.setattr(triton_impl, "advantage_kernel", Recorder())
    for rows in (70_000, 1024, 3, 0):
        tokens, scores = torch.zeros(rows, 1), torch.zeros(rows)
        offsets = torch.arange(rows + 1, dtype=torch.int32)
        for shape, layout in ((tokens, (None, tokens == 0)), (tokens[:, 0], (offsets, None))):
            triton_impl.ppo_lag_advantage(
                shape, shape, scores, None, shape, None, None, *layout, 0.1, 1.0, 1.0, 5.0, False
            )
    assert launches == [(1024,)] * 4 + [(3,)] * 2 + [(1,)] * 2


def test_gradcheck_of_the_reference():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    tokens = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    scores = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    multiplier = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def call(logp, ref_logp, reward_values, cost_values, reward, cost, multiplier):
        return reference.ppo_lag_advantage(
            logp,
            ref_logp,
            reward,
            cost,
            reward_values,
            cost_values,
            multiplier,
            None,
            mask,
            0.1,
            0.9,
            0.8,
            50.0,
            False,
        )

    assert torch.autograd.gradcheck(call, (*tokens, *scores, multiplier))


@pytest.mark.parametrize("impl, device", naive.SCAN_PLACES)
def test_library_and_determinism(impl, device):
    batch = naive.Ragged([3, 2], device=device)
    inputs = list(inputs_of(batch).values())
    multiplier = torch.tensor(1.0, device=device)
    rest = (batch.cu_seqlens, None, 0.1, 1.0, 0.9, 50.0, False, impl)
    torch.library.opcheck(torch.ops.saferlhf_fast.ppo_lag_advantage, (*inputs, multiplier, *rest))
    torch.library.opcheck(
        torch.ops.saferlhf_fast.ppo_lag_advantage, (*inputs[:3], None, inputs[4], None, None, *rest)
    )

    def call(*tensors):
        return (
            ppo_lag_advantage(*tensors, multiplier, cu_seqlens=batch.cu_seqlens, impl=impl, **SETTINGS)[0] * 2
        )

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs))
