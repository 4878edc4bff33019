"""token_logprob: against float64, edges of the vocabulary, confident tokens, in-place backward, Triton
without a GPU.

Triton runs in its interpreter, by tests/kernels/test_interpreter.py: with TRITON_INTERPRET=1 the places below
hold the Triton version on the CPU. That every kernel compiles is tests/kernels/test_compile.py's business.
"""

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import TABLE, assert_near, assert_same

from saferlhf_fast import ppo_loss_from_logits, token_logprob
from saferlhf_fast.kernels import dispatch

pytestmark = pytest.mark.numeric

INTERPRETED = dispatch.interpreted()
HERE = "triton" if INTERPRETED else "auto"
PLACES = naive.PLACES
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED else [torch.float64])
INFINITY = float("inf")


def by_definition(logits, ids, temperature=1.0, softcap=None):
    """(logp, entropy) in float64, one row at a time, without log_softmax; differentiable. temperature: number
    or one a row.
    """
    logp, entropy = [], []
    rows = logits.double().reshape(-1, logits.shape[-1])
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(ids.shape).reshape(-1)
    for row, id, divisor in zip(rows, ids.reshape(-1).tolist(), temperatures):
        z = (row if softcap is None else softcap * torch.tanh(row / softcap)) / divisor
        highest = z.detach().max()
        normaliser = (z - highest).exp().sum()
        logp.append(z[id] - highest - normaliser.log())
        finite = z > -INFINITY
        p = (z[finite] - highest).exp() / normaliser
        entropy.append(-(p * (z[finite] - highest - normaliser.log())).sum())
    return torch.stack(logp).reshape(ids.shape), torch.stack(entropy).reshape(ids.shape)


def example(rows, vocabulary, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=generator) * scale).to(dtype).to(device)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator).to(device)


def check(impl, dtype, rows, vocabulary, device="cpu", seed=0, scale=3.0, **options):
    """Values and gradients of one random case against float64."""
    if impl in ("triton", "native") and dtype == torch.float64:
        pytest.skip(
            f"there is no float64 version in {impl}: the dispatcher refuses it, tested in test_kernels_layout"
        )
    logits, ids = example(rows, vocabulary, dtype, device, seed, scale)
    leaf = logits.clone().requires_grad_()
    logp, entropy = token_logprob(leaf, ids, return_entropy=True, impl=impl, **options)
    upstream = torch.linspace(-1, 2, rows, device=device)
    ((logp - 0.5 * entropy) * upstream).sum().backward()
    exact = logits.cpu().double().requires_grad_()
    on_host = {
        name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in options.items()
    }
    expected_logp, expected_entropy = by_definition(exact, ids.cpu(), **on_host)
    ((expected_logp - 0.5 * expected_entropy) * upstream.cpu()).sum().backward()
    assert logp.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (logp <= 0).all()
    assert_near(logp, expected_logp)
    assert_near(entropy, expected_entropy)
    assert leaf.grad.dtype == dtype
    # triton's interpreter cuts float32 to bfloat16 where a GPU rounds: there the table's half ulp cannot
    # hold.
    if not (INTERPRETED and dtype == torch.bfloat16):
        assert_near(leaf.grad, exact.grad)
    assert_near(token_logprob(logits, ids, impl=impl, **options), expected_logp)


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize(
    "temperature, vocabulary, dtype", naive.pairs([1.0, 0.7], [1, 2, 63, 257, 507, 5003], DTYPES)
)
def test_equals_float64(impl, device, dtype, vocabulary, temperature):
    check(impl, dtype, 5, vocabulary, device, seed=vocabulary, temperature=temperature)


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("vocabulary", naive.LARGE_VOCABULARIES)
def test_real_vocabularies(impl, device, vocabulary):
    check(impl, torch.float32, 2, vocabulary, device)
    check(impl, torch.bfloat16, 1, vocabulary, device, scale=1.0)


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap, scale", [(30.0, 20.0), (5.0, 0.1), (50.0, 200.0)])
def test_softcap_and_a_temperature_per_token(impl, device, dtype, softcap, scale):
    check(
        impl,
        dtype,
        6,
        257,
        device,
        scale=scale,
        softcap=softcap,
        temperature=torch.linspace(0.5, 2, 6, device=device),
    )
    check(
        impl, dtype, 3, 63, device, scale=scale, softcap=softcap, temperature=torch.tensor(0.8, device=device)
    )


@pytest.mark.parametrize("impl, device", PLACES)
def test_error_is_no_worse_than_plain_torch(impl, device):
    """bfloat16 logits, many rows: ours against float64 is at most plain torch's in that dtype, plus the
    table.
    """
    logits, ids = example(40 if INTERPRETED else 200, 300, torch.bfloat16, device)
    exact, _ = by_definition(logits.cpu(), ids.cpu())
    plain = torch.log_softmax(logits, -1).gather(-1, ids[:, None]).squeeze(-1)
    ours = token_logprob(logits, ids, impl=impl)
    assert (ours.double().cpu() - exact).abs().max() <= (plain.double().cpu() - exact).abs().max() + TABLE[
        torch.float32
    ][1]


@pytest.mark.parametrize("impl, device", PLACES)
def test_minus_infinity_and_flat_rows(impl, device):
    logits, ids = example(4, 300, device=device)
    logits[0, :200] = -INFINITY  # whole blocks of impossible tokens
    logits[1, 5:] = -INFINITY
    logits[2] = -7.25  # all equal
    logits[3] = torch.where(torch.arange(300, device=device) == 299, 2.0, -INFINITY)
    ids = torch.tensor([250, 299, 0, 299], device=device)
    leaf = logits.clone().requires_grad_()
    logp, entropy = token_logprob(leaf, ids, return_entropy=True, impl=impl)
    expected_logp, expected_entropy = by_definition(logits.cpu(), ids.cpu())
    assert_near(logp, expected_logp)
    assert_near(entropy, expected_entropy)
    assert logp[1] == -INFINITY and torch.isfinite(entropy).all()
    (logp[[0, 2, 3]].sum() + entropy.sum()).backward()
    assert torch.isfinite(leaf.grad).all() and (leaf.grad[0, :200] == 0).all()


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("gap", [8.0, 12.0, 15.0, 25.0, 40.0])
def test_confident_tokens(impl, device, gap):
    """p > 0.999: logp <= 0, and the target's gradient is 1 - p to 1e-3 relative, which 1 - float(p) would
    lose.
    """
    logits = torch.zeros(1, 50, device=device)
    logits[0, 7] = gap
    leaf = logits.clone().requires_grad_()
    logp = token_logprob(leaf, torch.tensor([7], device=device), impl=impl)
    logp.sum().backward()
    rest = 49 * torch.tensor(-gap, dtype=torch.float64).exp()
    expected = rest / (1 + rest)
    assert logp.item() <= 0
    assert leaf.grad[0, 7].item() == pytest.approx(expected.item(), rel=1e-3)
    assert logp.item() == pytest.approx(-torch.log1p(rest).item(), rel=1e-3)


@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("bad", [-1, -100, 9, 2**31 - 1])
def test_ids_outside_the_vocabulary(impl, device, bad):
    logits, _ = example(3, 9, device=device)
    ids = torch.tensor([1, bad, 8], device=device)
    if impl != "triton" and device == "cpu":
        with pytest.raises(ValueError, match=f"expected 0 <= id < 9, got {bad}"):
            token_logprob(logits, ids, impl=impl)
        return
    leaf = logits.clone().requires_grad_()
    logp = token_logprob(leaf, ids, impl=impl)
    assert torch.isnan(logp).tolist() == [False, True, False]
    logp.sum().backward()
    assert torch.isnan(leaf.grad).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("impl, device", PLACES)
def test_inplace_backward(impl, device):
    weight = torch.randn(6, 40, device=device, requires_grad=True)
    ids = torch.randint(0, 40, (6,), device=device)
    (expected,) = torch.autograd.grad(token_logprob(weight * 2, ids, impl=impl).sum(), weight)
    logits = weight * 2
    place = logits.data_ptr()
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss = token_logprob(logits, ids, inplace_backward=True, impl=impl).sum()
    (got,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(got, expected) and seen == [place]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)
    leaf = logits.detach().clone().requires_grad_()
    before = leaf.detach().clone()
    token_logprob(leaf, ids, inplace_backward=True, impl=impl).sum().backward()
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("impl, device", PLACES)
def test_leading_shapes_slices_and_empty_batches(impl, device):
    logits, ids = example(24, 30, device=device)
    expected = token_logprob(logits, ids, impl=impl)
    assert token_logprob(logits[0], ids[0], impl=impl) == expected[0]
    folded, folded_ids = logits.reshape(2, 3, 4, 30), ids.reshape(2, 3, 4)
    assert_same(token_logprob(folded, folded_ids.int(), impl=impl), expected.reshape(2, 3, 4))
    assert torch.equal(
        token_logprob(folded[:, 1:], folded_ids[:, 1:], impl=impl), expected.reshape(2, 3, 4)[:, 1:]
    )
    wide = torch.empty(24, 64, device=device).fill_(torch.nan)
    wide[:, ::2][:, :30] = logits
    strided = wide[:, ::2][:, :30].requires_grad_()
    logp = token_logprob(strided, ids, impl=impl)
    assert torch.equal(logp, expected)
    logp.sum().backward()
    leaf = logits.clone().requires_grad_()
    token_logprob(leaf, ids, impl=impl).sum().backward()
    assert torch.equal(strided.grad, leaf.grad)
    empty = torch.zeros(0, 30, device=device, requires_grad=True)
    logp, entropy = token_logprob(empty, ids[:0], return_entropy=True, impl=impl)
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()


@pytest.mark.parametrize("impl, device", PLACES)
def test_what_all_logits_have_in_common_costs_no_digit(impl, device):
    """As close to float64 as log_softmax is on the same float32 logits, though lse is a number of their size.
    Triton works in bits, z * log2(e), whose rounding grows with z.
    """
    if impl == "triton":
        pytest.skip("rounds z * log2(e) to its own size: off by |z| * 2^-24")
    base = torch.randn(16, 500, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.arange(16) * 30
    ones = torch.ones(16)
    for offset in (0.0, 1e2, -1e4, 1e4, 1e6, 1e8, 1e30):
        logits = base + offset
        made = {}
        for name, like in (
            ("exact", logits.double()),
            ("plain", logits),
            ("ours", logits),
            ("fused", logits),
        ):
            leaf = like.clone().requires_grad_()
            if name == "ours":
                logp, entropy = token_logprob(leaf, ids, return_entropy=True, impl=impl)
            elif name == "fused":
                # At an advantage of -1 and the policy that sampled, the loss has the gradient of the
                # log-probs' sum.
                loss, _ = ppo_loss_from_logits(
                    leaf,
                    ids,
                    made["ours"][0],
                    -ones,
                    clip_ratio=0.2,
                    inplace=False,
                    impl=impl,
                    reduction="token-mean",
                    normalizer=1.0,
                )
                made[name] = torch.autograd.grad(loss, leaf)
                continue
            else:
                log_p = leaf.log_softmax(-1)
                logp, entropy = log_p.gather(1, ids[:, None])[:, 0], torch.special.entr(log_p.exp()).sum(1)
            made[name] = (
                logp.detach(),
                entropy.detach(),
                *(torch.autograd.grad(made_.sum(), leaf, retain_graph=True)[0] for made_ in (logp, entropy)),
            )

        def off(mine, exact):
            return (mine.double() - exact).abs().max().item() / max(1.0, exact.abs().max().item())

        plain = [off(*pair) for pair in zip(made["plain"], made["exact"])]
        ours = [off(*pair) for pair in zip(made["ours"], made["exact"])]
        assert all(mine <= 2 * theirs + 2e-6 for mine, theirs in zip(ours, plain)), (offset, ours, plain)
        assert off(made["fused"][0], made["exact"][2]) <= 2 * plain[2] + 2e-6, offset


@pytest.mark.parametrize("impl, device", PLACES)
def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(impl, device):
    logits, ids = example(18, 507, device=device)
    whole, entropy = token_logprob(logits, ids, return_entropy=True, impl=impl)
    for row in (0, 11, 17):
        alone, alone_entropy = token_logprob(
            logits[row : row + 1], ids[row : row + 1], return_entropy=True, impl=impl
        )
        assert alone[0] == whole[row] and alone_entropy[0] == entropy[row]
    assert_same(token_logprob(logits, ids, impl=impl), whole)  # without entropy: another kernel


@settings(max_examples=8 if INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 5),
    vocabulary=st.integers(1, 70),
    temperature=st.floats(0.1, 5),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_any_shape(rows, vocabulary, temperature, seed, scale):
    logits, ids = example(rows, vocabulary, seed=seed, scale=scale)
    logp = token_logprob(logits, ids, temperature=temperature, impl=HERE)
    assert (logp <= 0).all()
    if rows:
        # A log-prob of -600 carries the rounding of logits of that size: compare per unit of them.
        size = max(1.0, logits.abs().max().item() / temperature)
        assert_near(logp / size, by_definition(logits, ids, temperature)[0] / size)


@pytest.mark.skipif(
    INTERPRETED, reason="float64 and torch.library are the reference's and the dispatcher's business"
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck_and_library(temperature):
    logits, ids = example(6, 7, torch.float64)
    logits.requires_grad_()
    for entropy in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, entropy=entropy: token_logprob(x, ids, temperature=temperature, return_entropy=entropy),
            (logits,),
        )
        assert torch.autograd.gradcheck(
            lambda x, entropy=entropy: token_logprob(
                x, ids, softcap=4.0, temperature=torch.linspace(0.5, 2, 6), return_entropy=entropy
            ),
            (logits,),
        )
        for per_token in (None, torch.rand(6) + 0.5):
            torch.library.opcheck(
                torch.ops.saferlhf_fast.token_logprob,
                (
                    logits.detach().float().requires_grad_(),
                    ids,
                    temperature,
                    per_token,
                    8.0,
                    entropy,
                    False,
                    "auto",
                ),
            )
    compiled = torch.compile(
        lambda x: token_logprob(x * 2, ids, temperature=temperature, inplace_backward=True),
        fullgraph=True,
        backend="aot_eager",
    )
    (got,) = torch.autograd.grad(compiled(logits).sum(), logits)
    (expected,) = torch.autograd.grad(token_logprob(logits * 2, ids, temperature=temperature).sum(), logits)
    assert torch.equal(got, expected)


def test_wrong_arguments():
    logits, ids = example(3, 5)
    for problem, arguments in (
        ("ids: expected shape", (logits, ids[:2])),
        ("integer ids", (logits, ids.float())),
        ("logits", (logits.long(), ids)),
    ):
        with pytest.raises(ValueError, match=problem):
            token_logprob(*arguments)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature: expected a number > 0"):
            token_logprob(logits, ids, temperature=temperature)


@pytest.mark.parametrize("impl, device", PLACES)
def test_ids_raise_with_checks_switched_on(impl, device, monkeypatch):
    monkeypatch.setenv("SAFERLHF_CHECK", "1")
    logits, _ = example(3, 9, device=device)
    with pytest.raises(ValueError, match="expected 0 <= id < 9, got 9"):
        token_logprob(logits, torch.tensor([1, 9, 8], device=device), impl=impl)


@pytest.mark.parametrize("impl, device", PLACES)
def test_nan_stays_visible(impl, device):
    logits, ids = example(4, 300, device=device)
    logits[0, 5], logits[1, 299], logits[2] = torch.nan, INFINITY, -INFINITY
    leaf = logits.clone().requires_grad_()
    logp, entropy = token_logprob(leaf, ids, return_entropy=True, impl=impl)
    assert torch.isnan(logp).tolist() == torch.isnan(entropy).tolist() == [True, True, True, False]
    logp.sum().backward()
    assert torch.isnan(leaf.grad[0]).all() and torch.isfinite(leaf.grad[3]).all()


@pytest.mark.skipif(INTERPRETED, reason="threads are the native version's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repeats_change_no_bit(dtype):
    logits, ids = example(40, 5003, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            leaf = logits.clone().requires_grad_()
            logp, entropy = token_logprob(leaf, ids, return_entropy=True)
            (logp + entropy).sum().backward()
            results.append((logp.detach(), entropy.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@settings(max_examples=8 if INTERPRETED else 40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 70),
    offset=st.integers(0, 3),
    step=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    softcap=st.sampled_from([None, 10.0]),
)
def test_any_strides_and_offsets(rows, vocabulary, offset, step, dtype, softcap):
    """Logits that are a view with gaps between rows and columns; what lies in the gaps is NaN."""
    logits, ids = example(rows, vocabulary, dtype, seed=rows)
    room = torch.full((rows * 2, offset + vocabulary * step + 2), torch.nan, dtype=dtype)
    view = room[::2, offset : offset + vocabulary * step : step]
    view.copy_(logits)
    leaf = view.detach().requires_grad_()
    other = logits.clone().requires_grad_()
    for tensor in (leaf, other):
        logp, entropy = token_logprob(tensor, ids, return_entropy=True, softcap=softcap, impl=HERE)
        (logp + entropy).sum().backward()
    assert torch.equal(leaf.grad, other.grad)
