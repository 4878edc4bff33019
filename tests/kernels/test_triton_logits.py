"""What only the Triton kernels on logits can get wrong: tiles, alignment, gradients over wider logits, splits
of the vocabulary.

On a GPU where there is one; else in triton's interpreter, by test_interpreter.py. What every implementation
must keep is in tests/kernels/test_token_logprob.py, test_ppo_loss_from_logits.py, test_linear_logprob.py and
test_linear_ppo_loss.py.
"""

import naive
import pytest
import torch
import triton
import triton.language as tl
from tolerance import FUNCTION, assert_near

from saferlhf_fast.kernels import dispatch
from saferlhf_fast.kernels.linear_logprob import reference as linear_reference
from saferlhf_fast.kernels.linear_logprob import triton_impl as linear
from saferlhf_fast.kernels.ppo_loss_from_logits import reference as policy_reference
from saferlhf_fast.kernels.ppo_loss_from_logits import triton_impl as policy
from saferlhf_fast.kernels.token_logprob import reference
from saferlhf_fast.kernels.token_logprob import triton_impl as rows

pytestmark = pytest.mark.numeric

INTERPRETED = dispatch.interpreted()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
here = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="no GPU: tests/kernels/test_interpreter.py runs these"
)
HALF = [torch.bfloat16, torch.float16]
INFINITY = float("inf")


def numbers(*shape, scale=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def some_ids(count, vocabulary, seed=1):
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact(logits, ids, grads=None, temperature=0.8, softcap=0.0):
    """(logp, entropy, lse) in float64 and, for two upstream gradients, d logits."""
    logits = logits.detach().double()
    statistics = reference.token_logprob(logits, ids, temperature, None, softcap, True)
    if grads is None:
        return statistics
    return statistics, reference.token_logprob_backward(
        logits, ids, *statistics, *grads, temperature, None, softcap, torch.empty_like(logits)
    )


def assert_close_logits(got, expected, dtype):
    """Gradients of `dtype`; the interpreter cuts float32 to bfloat16 where a GPU rounds, which doubles the
    error.
    """
    cut = 2 if INTERPRETED and dtype == torch.bfloat16 else 1
    eps = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((got.double() - expected).abs() <= cut * eps * expected.abs() + 1e-5).all()


@triton.jit
def functions_kernel(tanh_N, log1p_N, complement_N, x_N, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_N + at)
    tl.store(tanh_N + at, rows.tanh(x))
    tl.store(log1p_N + at, rows.log1p(tl.abs(x)))
    tl.store(complement_N + at, rows.one_minus_p(-tl.abs(x)))


@here
def test_functions_near_zero_and_far_from_it():
    """Relative error: what is cancelled near 0 would be gone."""
    size = torch.logspace(-12, 2, 512, dtype=torch.float64)
    x = torch.cat([size, -size]).float().to(DEVICE)
    outputs = [torch.empty_like(x) for _ in range(3)]
    functions_kernel[(1,)](*outputs, x, N=1024)
    for got, expected in zip(
        outputs, (x.double().tanh(), x.double().abs().log1p(), -(-x.double().abs()).expm1())
    ):
        assert (got.double() / expected - 1).abs().max() < FUNCTION[DEVICE]
    assert (outputs[0].abs() <= 1).all()


@here
@pytest.mark.parametrize("vocabulary", [32_000, *naive.LARGE_VOCABULARIES])
def test_real_vocabularies(vocabulary):
    """Many tiles, aligned and not; the target in the first, in the last and in between, and as the last
    column.
    """
    logits = numbers(4, vocabulary, scale=4, seed=vocabulary)
    ids = torch.tensor([3, vocabulary - 1, vocabulary // 2, vocabulary - 2], device=DEVICE)
    logits[3, ids[3]] = 25.0  # confident
    grads = numbers(4, seed=2), numbers(4, seed=3)
    expected, d_expected = exact(logits, ids, grads)
    got = rows.token_logprob(logits, ids, 0.8, None, 0.0, True)
    for mine, theirs in zip(got, expected):
        assert_near(mine, theirs)
    d_got = rows.token_logprob_backward(logits, ids, *got, *grads, 0.8, None, 0.0, torch.empty_like(logits))
    assert_near(d_got, d_expected)


@here
@pytest.mark.parametrize("lowest", [-INFINITY, torch.finfo(torch.float32).min])
def test_impossible_tokens(lowest):
    """A tile and more of them: before, between, after possible ones; all but one; as the target."""
    tile = rows.tiling(rows.WARPS, False, *[torch.empty(1, 12_000)] * 2)[0]["T"] * 16
    logits = numbers(6, 12_000, scale=3)
    logits[0, : tile + 7] = lowest
    logits[1, 100 : 100 + 2 * tile] = lowest
    logits[2, 9:] = lowest
    logits[3] = lowest
    logits[3, 11_999] = -3.0
    logits[4, 500] = lowest
    ids = torch.tensor([11_000, 50, 4, 11_999, 500, 0], device=DEVICE)
    expected, d_expected = exact(logits, ids, (None, numbers(6, seed=2)))
    got = rows.token_logprob(logits, ids, 0.8, None, 0.0, True)
    for mine, theirs in zip(got, expected):
        assert_near(mine, theirs.float() if lowest > -INFINITY else theirs)
    assert got[0][3] == 0 and got[1].isfinite().all() and (got[0][4] < -1e38)
    d_got = rows.token_logprob_backward(
        logits, ids, *got, None, numbers(6, seed=2), 0.8, None, 0.0, torch.empty_like(logits)
    )
    assert_near(d_got, d_expected)
    assert (d_got[logits == lowest] == 0).all()


@here
def test_no_number_is_made_up():
    """Nothing but -inf, nothing above FLOOR, NaN anywhere, +inf: NaN; equal logits: -log V."""
    logits = torch.full((6, 5000), -INFINITY, device=DEVICE)
    logits[1] = torch.finfo(torch.float32).min
    logits[2:] = 1.5
    logits[2, 4999], logits[3, 7], logits[4, 3000] = torch.nan, torch.nan, INFINITY
    ids = torch.tensor([3, 3, 3, 7, 5, 9], device=DEVICE)
    logp, entropy, _ = rows.token_logprob(logits, ids, 1.0, None, 0.0, True)
    assert logp.isnan().tolist() == [True] * 5 + [False] and entropy[2:5].isnan().all()
    # the cap makes infinities finite
    capped, capped_entropy, _ = rows.token_logprob(logits, ids, 1.0, None, 30.0, True)
    assert (
        capped.isnan().tolist() == [False, False, True, True, False, False]
        and capped_entropy[2:4].isnan().all()
    )
    for value, sum_of in ((logp, entropy), (capped, capped_entropy)):
        assert_near(torch.stack([-value[-1], sum_of[-1]]), torch.tensor([5000.0, 5000.0]).log())


@here
@pytest.mark.parametrize("vocabulary, others", [(50, 49), (9000, 8999), (9000, 1)])
@pytest.mark.parametrize("certainty", [1 - 1e-3, 1 - 1e-5, 1 - 1e-7])
def test_confident_tokens(vocabulary, others, certainty):
    """log p and 1 - p keep their digits at p up to 1 - 1e-7, wherever the rest of the probability lies."""
    gap = torch.tensor(others * certainty / (1 - certainty), dtype=torch.float64).log()
    logits = torch.full((1, vocabulary), -INFINITY, device=DEVICE)
    logits[0, :others] = -gap.item()
    logits[0, vocabulary - 1] = 0.0
    ids = torch.tensor([vocabulary - 1], device=DEVICE)
    (logp, entropy, _), d_expected = exact(logits, ids, (torch.ones(1, device=DEVICE), None), temperature=1.0)
    got = rows.token_logprob(logits, ids, 1.0, None, 0.0, True)
    assert got[0].item() < 0 and got[0].item() == pytest.approx(logp.item(), rel=1e-5)
    assert got[1].item() == pytest.approx(entropy.item(), rel=1e-5)
    d_got = rows.token_logprob_backward(
        logits, ids, *got, torch.ones(1, device=DEVICE), None, 1.0, None, 0.0, torch.empty_like(logits)
    )
    assert d_got[0, -1].item() == pytest.approx(d_expected[0, -1].item(), rel=1e-4)
    vectors = [torch.tensor([x], device=DEVICE) for x in (logp.item(), -1.0, 1.0)]
    policy.ppo_loss_from_logits(
        logits, ids, *vectors[:2], None, vectors[2], 0.2, 0.3, 3.0, 0.0, False, 0.0, 1.0, None, 0.0, d_got
    )
    assert d_got[0, -1].item() == pytest.approx(d_expected[0, -1].item(), rel=1e-4)


@here
@pytest.mark.parametrize("vocabulary", [9000, 9001])
def test_bits_depend_on_no_other_row(vocabulary):
    logits, ids = numbers(7, vocabulary, scale=3), some_ids(7, vocabulary)
    whole = rows.token_logprob(logits, ids, 0.7, None, 0.0, True)
    for row in (0, 3, 6):
        alone = rows.token_logprob(logits[row : row + 1], ids[row : row + 1], 0.7, None, 0.0, True)
        assert all(torch.equal(mine, theirs[row : row + 1]) for mine, theirs in zip(alone, whole))
    assert all(
        torch.equal(a, b) for a, b in zip(whole, rows.token_logprob(logits, ids, 0.7, None, 0.0, True))
    )


@here
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_padded_and_strided_rows(dtype):
    """Poison between the rows and between the columns is neither read nor written."""
    logits, ids = numbers(3, 4100, scale=2, dtype=dtype), some_ids(3, 4100)
    grads = numbers(3, seed=2), numbers(3, seed=3)
    expected, d_expected = exact(logits, ids, grads)
    for step, width in ((1, 4104), (1, 4111), (2, 8200)):
        store = torch.full((3, width), torch.nan, dtype=dtype, device=DEVICE)
        view = store[:, : 4100 * step : step]
        view.copy_(logits)
        got = rows.token_logprob(view, ids, 0.8, None, 0.0, True)
        for mine, theirs in zip(got, expected):
            assert_near(mine, theirs)
        rows.token_logprob_backward(view, ids, *got, *grads, 0.8, None, 0.0, view)
        assert_close_logits(view, d_expected, dtype)
        assert store.isnan().sum() == 3 * (width - 4100)


@here
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("vocabulary", [5, 9000, 9001] if INTERPRETED else [5, 25_000, 25_001])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_gradients_over_wider_logits(dtype, vocabulary, softcap):
    """fp32 logits, half-precision gradient in the first half of each row's own memory: several tiles, each
    over read ones.
    """
    logits, ids = numbers(3, vocabulary, scale=3), some_ids(3, vocabulary)
    grads = numbers(3, seed=2), numbers(3, seed=3)
    expected, d_expected = exact(logits, ids, grads, softcap=softcap)
    statistics = rows.token_logprob(logits, ids, 0.8, None, softcap, True)
    buffer = logits.clone()
    over = buffer.view(dtype)[:, :vocabulary]
    rows.token_logprob_backward(buffer, ids, *statistics, *grads, 0.8, None, softcap, over)
    assert_close_logits(over, d_expected, dtype)
    old_logp, advantage, weight = (
        (statistics[0] + 0.01).contiguous(),
        numbers(3, seed=4),
        torch.tensor([1.0, 0.0, 0.5]),
    )
    arguments = (
        ids,
        old_logp,
        advantage,
        old_logp - 0.3,
        weight.to(DEVICE),
        0.2,
        0.3,
        1.05,
        0.1,
        False,
        0.05,
        0.8,
        None,
        softcap,
    )
    double = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    d_expected = torch.empty(3, vocabulary, dtype=torch.float64, device=DEVICE)
    expected = policy_reference.ppo_loss_from_logits(logits.double(), *double, d_expected)
    buffer = logits.clone()
    over = buffer.view(dtype)[:, :vocabulary]
    got = policy.ppo_loss_from_logits(buffer, *arguments, over)
    for mine, theirs in zip(got, expected):
        assert_near(mine, theirs)
    assert_close_logits(over, d_expected, dtype)
    assert (over[1] == 0).all()


@here
def test_a_row_over_its_wider_logits_is_one_program_s(monkeypatch):
    """The interpreter runs programs in order and would not see two of them race: what is launched."""
    grids, kernel = [], rows.backward_kernel

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(rows, "backward_kernel", Recorder())
    logits, ids, ones = numbers(3, 9000), some_ids(3, 9000), torch.ones(3, device=DEVICE)
    for out in (
        torch.empty_like(logits),
        logits.clone().bfloat16(),
        logits.view(torch.bfloat16)[:, :9000],
        logits,
    ):
        rows.token_logprob_backward(logits, ids, ones, ones, ones, ones, None, 1.0, None, 0.0, out)
    assert grids == [(9,), (9,), (3,), (9,)]


@here
@pytest.mark.parametrize("vocabulary", [5, 8193, 17_000])
@pytest.mark.parametrize("k1", [False, True])
def test_policy_rows_in_place(vocabulary, k1):
    """Every number of warps; in place the tiles are written downwards."""
    logits, ids = numbers(3, vocabulary, scale=3), some_ids(3, vocabulary)
    old_logp = rows.token_logprob(logits, ids, 1.0, None, 0.0, False)[0] - 0.05
    arguments = (
        ids,
        old_logp,
        numbers(3, seed=4),
        old_logp + 0.3,
        torch.tensor([1.0, 0.25, 0.5], device=DEVICE),
        0.2,
        0.3,
        1.05,
        0.1,
        k1,
        0.05,
        1.0,
        torch.tensor([1.0, 0.7, 1.5], device=DEVICE),
        0.0,
    )
    double = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    d_expected = torch.empty(3, vocabulary, dtype=torch.float64, device=DEVICE)
    expected = policy_reference.ppo_loss_from_logits(logits.double(), *double, d_expected)
    for mine, theirs in zip(policy.ppo_loss_from_logits(logits, *arguments, logits), expected):
        assert_near(mine, theirs)
    assert_near(logits, d_expected)


@here
def test_rows_of_weight_zero_are_not_read():
    logits = torch.full((2, 300), torch.nan, device=DEVICE)
    logits[1] = 1.0
    nothing = torch.tensor([torch.nan, -2.0], device=DEVICE)
    ids, weight = torch.tensor([1 << 40, 5], device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)
    logp, entropy = policy.ppo_loss_from_logits(
        logits,
        ids,
        nothing,
        nothing,
        nothing,
        weight,
        0.2,
        0.2,
        INFINITY,
        0.1,
        False,
        0.1,
        1.0,
        nothing.abs(),
        0.0,
        logits,
    )
    assert logp[0] == entropy[0] == 0 and (logits[0] == 0).all()
    assert logp[1].isfinite() and logits[1].isfinite().all() and (logits[1] != 0).all()


@here
@pytest.mark.parametrize("bad", [-1, -(1 << 40), 300, (1 << 32) + 7])
def test_ids_outside_the_vocabulary(bad):
    """NaN log-prob and gradient row; the entropy needs no id. 2^32 + 7 must not pass for 7."""
    logits, ids = numbers(2, 300), torch.tensor([bad, 7], device=DEVICE)
    logp, entropy, lse = rows.token_logprob(logits, ids, 1.0, None, 0.0, True)
    assert logp.isnan().tolist() == [True, False]
    expected = exact(logits, torch.tensor([7, 7], device=DEVICE), temperature=1.0)
    assert_near(entropy, expected[1])
    assert_near(lse, expected[2])
    ones, gradient = torch.ones(2, device=DEVICE), torch.empty_like(logits)
    rows.token_logprob_backward(logits, ids, logp, entropy, lse, ones, None, 1.0, None, 0.0, gradient)
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()
    policy.ppo_loss_from_logits(
        logits, ids, ones, ones, None, ones, 0.2, 0.2, INFINITY, 0.0, False, 0.0, 1.0, None, 0.0, gradient
    )
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()
    hidden, weight = numbers(2, 16), numbers(300, 16, seed=1)
    logp, entropy, _ = linear.fused_forward(hidden, weight, ids, None, 1.0, None, 0.0)
    assert logp.isnan().tolist() == [True, False]
    assert_near(
        entropy,
        linear_reference.linear_logprob(
            hidden.double(), weight.double(), ids * 0, None, 1.0, None, 0.0, True, None, False
        )[1],
    )


def head(count, width, vocabulary, dtype, poison=0):
    """Hidden states and weight, in rows that are `poison` elements longer, of NaN; ids in every split."""
    hidden = torch.full((count, width + poison), torch.nan, dtype=dtype, device=DEVICE)
    weight = torch.full((vocabulary, width + poison), torch.nan, dtype=dtype, device=DEVICE)
    hidden[:, :width] = numbers(count, width, dtype=dtype)
    weight[:, :width] = numbers(vocabulary, width, scale=0.5, seed=1, dtype=dtype)
    ids = torch.arange(count, device=DEVICE) * 997 % vocabulary
    ids[-1] = vocabulary - 1
    return hidden[:, :width], weight[:, :width], ids


HEADS = [  # tokens, hidden size, vocabulary, poison
    (1, 8, 1, 0),
    (1, 64, 2, 0),
    (3, 33, 63, 0),
    (5, 64, 257, 0) if INTERPRETED else (130, 64, 257, 0),
    (5, 72, 1100, 8),
    (130, 24, 1030, 3) if INTERPRETED else (140, 40, 2500, 3),
    (2, 200, 3073, 0),
]


@here
@pytest.mark.parametrize("plain, shape, dtype", naive.pairs([False, True], HEADS, [torch.float32, *HALF]))
def test_fused_forward(dtype, shape, plain):
    """No multiple of a tile in tokens, hidden size or vocabulary; rows aligned (descriptors) and not; 1 to 4
    splits.
    """
    count, width, vocabulary, poison = shape
    hidden, weight, ids = head(count, width, vocabulary, dtype, poison)
    bias, temperature, softcap = None, None, 0.0
    if not plain:
        bias, softcap = numbers(2 * vocabulary, seed=5, dtype=dtype)[::2], 5.0
        temperature = torch.linspace(0.6, 1.4, count, device=DEVICE)
    got = linear.fused_forward(hidden, weight, ids, bias, 0.9, temperature, softcap)
    expected = linear_reference.linear_logprob(
        hidden.double(),
        weight.double(),
        ids,
        None if plain else bias.double(),
        0.9,
        temperature,
        softcap,
        True,
        None,
        False,
    )
    for mine, theirs in zip(got, expected):
        assert_near(mine, theirs)
    assert (got[0] <= 0).all()


@here
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float32, torch.float16], ids=str)
def test_fused_forward_of_a_token_depends_on_no_other(dtype, monkeypatch):
    """In the interpreter a tile's product is numpy's, which on AVX2 rounds a row by its place in the tile:
    made in float64 here, so that what is compared is the kernel's.
    """
    if DEVICE == "cpu":
        import numpy

        product = numpy.matmul
        monkeypatch.setattr(
            numpy, "matmul", lambda a, b, dtype: product(a, b, dtype=numpy.float64).astype(dtype)
        )
    hidden, weight, ids = head(130, 16, 1030, dtype)
    whole = linear.fused_forward(hidden, weight, ids, None, 0.9, None, 0.0)
    again = linear.fused_forward(hidden, weight, ids, None, 0.9, None, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    for at in (slice(0, 1), slice(129, 130), slice(3, 19)):
        part = linear.fused_forward(hidden[at], weight, ids[at], None, 0.9, None, 0.0)
        assert all(torch.equal(mine, theirs[at]) for mine, theirs in zip(part, whole))
    poisoned = hidden.clone()
    poisoned[7] = torch.nan
    logp = linear.fused_forward(poisoned, weight, ids, None, 0.9, None, 0.0)[0]
    assert logp[7].isnan() and torch.equal(logp[torch.arange(130) != 7], whole[0][torch.arange(130) != 7])


@here
def test_fused_forward_with_impossible_tokens_and_confident_ones():
    """A split of -inf through the bias; -inf as the target; p = 1 - 1e-6 with the target in another split
    than the rest.
    """
    hidden, weight = torch.ones(3, 16, device=DEVICE), torch.zeros(2100, 16, device=DEVICE)
    bias = torch.full((2100,), -INFINITY, device=DEVICE)
    bias[2000] = 0.0
    bias[:10] = -16.0
    ids = torch.tensor([2000, 5, 1500], device=DEVICE)
    got = linear.fused_forward(hidden, weight, ids, bias, 1.0, None, 0.0)
    expected = exact(bias.expand(3, -1), ids, temperature=1.0)
    assert got[0][2] == -INFINITY and got[1].isfinite().all()
    for mine, theirs in zip(got, expected):
        assert_near(mine, theirs)
    assert got[0][0].item() == pytest.approx(expected[0][0].item(), rel=1e-5)


@here
def test_empty_batches():
    empty, none = torch.zeros(0, 30, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    tokens = torch.zeros(0, device=DEVICE)
    assert [x.shape for x in rows.token_logprob(empty, none, 1.0, None, 0.0, True)] == [(0,)] * 3
    assert rows.token_logprob_backward(
        empty, none, tokens, tokens, tokens, tokens, None, 1.0, None, 0.0, empty
    ).shape == (0, 30)
    assert [
        x.shape
        for x in policy.ppo_loss_from_logits(
            empty,
            none,
            tokens,
            tokens,
            None,
            tokens,
            0.2,
            0.2,
            INFINITY,
            0.0,
            False,
            0.0,
            1.0,
            None,
            0.0,
            empty,
        )
    ] == [(0,)] * 2
    assert [x.shape for x in linear.fused_forward(empty, numbers(7, 30), none, None, 1.0, None, 0.0)] == [
        (0,)
    ] * 3
