"""linear_logprob: against float64 logits, any upstream, chunks, a vocabulary in shards, torch.library,
checkpointing.
"""

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import BIG, Case
from tolerance import TABLE, assert_near

from saferlhf_fast import linear_logprob, token_logprob
from saferlhf_fast.kernels import dispatch, linear

pytestmark = pytest.mark.numeric

INTERPRETED = dispatch.interpreted()
HERE = "triton" if INTERPRETED else "auto"
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED else [BIG])

OPTIONS = [
    dict(),
    dict(temperature=0.7),
    dict(softcap=3.0, temperature="per token"),
    dict(chunk_tokens=3),
    dict(chunk_tokens=1, softcap=2.0),
]


def definition(hidden, weight, bias, ids, temperature=1.0, softcap=None):
    """(logp, entropy) in float64."""
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    divisor = temperature.cpu().to(BIG)[..., None] if isinstance(temperature, torch.Tensor) else temperature
    log_p = torch.log_softmax(z / divisor, -1)
    return log_p.gather(-1, ids.cpu()[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def inputs_of(dtype, device="cpu", tokens=(2, 5), hidden=8, vocabulary=57, seed=0):
    case = Case(
        lengths=(tokens[1],) * tokens[0],
        hidden=hidden,
        vocabulary=vocabulary,
        dtype=dtype,
        seed=seed,
        device=device,
        slack=0,
    )
    return [tensor.requires_grad_() for tensor in (case.hidden, case.weight, case.bias)], case.ids


def half_ulp(dtype):
    """A gradient in half precision: one rounding, and that of d logits where the product takes them in that
    precision.
    """
    return dict(rtol=4 * torch.finfo(dtype).eps, atol=2e-2 * 8 * torch.finfo(dtype).eps)


def near(got, expected, impl=""):
    if got.dtype in (torch.float32, BIG):
        assert_near(got, expected)
    elif not (INTERPRETED and got.dtype == torch.bfloat16):
        scale = expected.abs().max().item() + 1e-30
        torch.testing.assert_close(
            got.double().cpu() / scale, expected.double().cpu() / scale, **half_ulp(got.dtype)
        )


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("options, with_bias, dtype", naive.pairs(OPTIONS, [True, False], DTYPES))
def test_equals_float64(impl, device, dtype, with_bias, options):
    if impl in ("triton", "native") and dtype == BIG:
        pytest.skip(
            f"there is no float64 version in {impl}: the dispatcher refuses it, tested in test_kernels_layout"
        )
    (hidden, weight, bias), ids = inputs_of(dtype, device)
    options = dict(options)
    if options.get("temperature") == "per token":
        options["temperature"] = torch.linspace(0.5, 2, ids.numel(), device=device).reshape(ids.shape)
    bias = bias if with_bias else None
    logp, entropy = linear_logprob(hidden, weight, ids, bias=bias, return_entropy=True, impl=impl, **options)
    upstream = torch.linspace(-1, 2, ids.numel(), device=device).reshape(ids.shape)
    leaves = [hidden, weight] + ([bias] if with_bias else [])
    exact = [leaf.detach().to("cpu", BIG).requires_grad_() for leaf in leaves]
    options.pop("chunk_tokens", None)
    expected = definition(*exact[:2], exact[2] if with_bias else None, ids, **options)
    ((logp - 0.5 * entropy) * upstream).sum().backward()
    ((expected[0] - 0.5 * expected[1]) * upstream.cpu()).sum().backward()
    assert logp.dtype == entropy.dtype == (BIG if dtype == BIG else torch.float32) and (logp <= 0).all()
    assert_near(logp, expected[0])
    assert_near(entropy, expected[1])
    for leaf, other in zip(leaves, exact):
        assert leaf.grad.dtype == dtype
        near(leaf.grad, other.grad, impl)
    with torch.no_grad():  # where the fused forward may run
        assert_near(linear_logprob(hidden, weight, ids, bias=bias, impl=impl, **options), expected[0])


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize(
    "vocabulary", [1, 2, 63, 257, 1000] + ([] if INTERPRETED else naive.LARGE_VOCABULARIES)
)
def test_vocabularies(impl, device, vocabulary):
    (hidden, weight, bias), ids = inputs_of(
        torch.float32, device, tokens=(1, 3), hidden=5, vocabulary=vocabulary
    )
    exact = [leaf.detach().to("cpu", BIG).requires_grad_() for leaf in (hidden, weight, bias)]
    logp, entropy = linear_logprob(hidden, weight, ids, bias=bias, return_entropy=True, impl=impl)
    expected = definition(*exact, ids)
    (logp + entropy).sum().backward()
    (expected[0] + expected[1]).sum().backward()
    assert_near(logp, expected[0])
    assert_near(entropy, expected[1])
    for leaf, other in zip((hidden, weight, bias), exact):
        near(leaf.grad, other.grad)
    with torch.no_grad():
        logp, entropy = linear_logprob(hidden, weight, ids, bias=bias, return_entropy=True, impl=impl)
    assert_near(logp, expected[0])
    assert_near(entropy, expected[1])


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("dtype", [torch.float16] + ([] if INTERPRETED else [torch.bfloat16]), ids=str)
def test_error_is_no_worse_than_plain_torch(impl, device, dtype):
    """Log-prob and gradients in half precision: ours against float64 is at most plain torch's in that dtype,
    plus the table.
    """
    (hidden, weight, _), ids = inputs_of(
        dtype, device, tokens=(2, 9) if INTERPRETED else (4, 25), hidden=64, vocabulary=507
    )
    exact = [leaf.detach().to("cpu", BIG).requires_grad_() for leaf in (hidden, weight)]
    upstream = torch.linspace(-1, 2, ids.numel()).reshape(ids.shape)
    expected, _ = definition(*exact, None, ids)
    (expected * upstream).sum().backward()
    ours = linear_logprob(hidden, weight, ids, impl=impl)
    plain = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, ids[..., None]).squeeze(-1)
    errors = []
    for logp in (ours, plain):
        made = torch.autograd.grad((logp * upstream.to(logp)).sum(), (hidden, weight))
        errors.append(
            [
                (a.double().cpu() - b).abs().max()
                for a, b in zip((logp.detach(), *made), (expected.detach(), exact[0].grad, exact[1].grad))
            ]
        )
    for mine, theirs in zip(*errors):
        assert mine <= theirs + TABLE[torch.float32][1], errors


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_only_what_is_wanted(impl, device):
    """No d hidden, no d weight, no d bias, no log-prob gradient, nothing at all; same gradients as with
    everything.
    """
    leaves, ids = inputs_of(torch.float32, device, tokens=(1, 3))

    def gradients(*kept, output=2):
        fresh = [leaf.detach().clone().requires_grad_(at in kept) for at, leaf in enumerate(leaves)]
        logp, entropy = linear_logprob(fresh[0], fresh[1], ids, bias=fresh[2], return_entropy=True, impl=impl)
        (
            logp.sum() if output == 0 else entropy.sum() if output == 1 else logp.sum() + entropy.sum()
        ).backward()
        return [leaf.grad for leaf in fresh]

    whole = gradients(0, 1, 2)
    for kept in ((0,), (1,), (2,), (0, 2)):
        for at, gradient in enumerate(gradients(*kept)):
            assert torch.equal(gradient, whole[at]) if at in kept else gradient is None
    separate = [a + b for a, b in zip(gradients(0, 1, 2, output=0), gradients(0, 1, 2, output=1))]
    for one, other in zip(separate, whole):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not linear_logprob(*leaves[:2], ids, impl=impl).requires_grad


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_no_logits_of_all_tokens(impl, device, monkeypatch):
    """Chunks are as long as the workspace allows, and as long as they are told to be."""
    if impl == "reference":
        pytest.skip("the reference is the definition: it has them")
    assert [at.stop - at.start for at in linear.chunks(100, 32_000, None, torch.device("cpu"))] == [100]
    assert (
        max(at.stop - at.start for at in linear.chunks(5000, 32_000, None, torch.device("cpu"))) * 32_000 * 4
        <= 64 << 20
    )
    assert (
        max(at.stop - at.start for at in linear.chunks(9000, 128_256, None, torch.device("cuda")))
        * 128_256
        * 4
        <= 1 << 30
    )
    seen, plain = [], linear.Head.buffer
    monkeypatch.setattr(
        linear.Head, "buffer", lambda head, slices: seen.append(plain(head, slices)) or seen[-1]
    )
    (hidden, weight, _), ids = inputs_of(torch.float32, device, tokens=(3, 5))
    linear_logprob(hidden, weight, ids, chunk_tokens=7, impl=impl).sum().backward()
    assert [tuple(buffer.shape) for buffer in seen] == [(7, 57), (7, 57)]


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_edges(impl, device):
    (hidden, weight, bias), ids = inputs_of(torch.float32, device)
    empty = linear_logprob(hidden[:0], weight, ids[:0], impl=impl)
    assert empty.shape == (0, 5)
    empty.sum().backward()
    assert (weight.grad == 0).all()
    assert linear_logprob(hidden[0, 0], weight, ids[0, 0], impl=impl).shape == ()
    with torch.no_grad():
        bias[:50] = -torch.inf  # impossible tokens, through the bias
    ids = torch.full_like(ids, 55)
    logp, entropy = linear_logprob(hidden, weight, ids, bias=bias, return_entropy=True, impl=impl)
    (logp + entropy).sum().backward()
    assert torch.isfinite(logp).all() and torch.isfinite(entropy).all() and torch.isfinite(hidden.grad).all()
    with torch.no_grad():
        again, _ = linear_logprob(hidden, weight, ids, bias=bias, return_entropy=True, impl=impl)
    assert_near(again, logp)
    ids[0, 0] = 57
    if device == "cpu" and not INTERPRETED:
        with pytest.raises(ValueError, match="linear_logprob: ids: expected 0 <= id < 57, got 57"):
            linear_logprob(hidden, weight, ids, impl=impl)
    else:
        with torch.no_grad():
            assert torch.isnan(linear_logprob(hidden, weight, ids, impl=impl)).sum() == 1
        assert torch.isnan(linear_logprob(hidden, weight, ids, impl=impl)).sum() == 1


@pytest.mark.skipif(INTERPRETED, reason="numpy's products in the interpreter say nothing about a GPU's")
def test_rows_and_repeats():
    """Same inputs, same bits; with a given chunk the rows are the chunk's alone: other chunks change none of
    its bits.
    """
    (hidden, weight, _), ids = inputs_of(torch.float32, tokens=(4, 16), hidden=32, vocabulary=507)
    with torch.no_grad():
        whole = linear_logprob(hidden, weight, ids, chunk_tokens=16)
        assert torch.equal(whole, linear_logprob(hidden, weight, ids, chunk_tokens=16))
        assert torch.equal(whole[1:3], linear_logprob(hidden[1:3], weight, ids[1:3], chunk_tokens=16))
        near(linear_logprob(hidden, weight, ids, chunk_tokens=5), whole)


@settings(max_examples=8 if INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    chunk=st.integers(1, 12),
    transposed=st.booleans(),
    seed=st.integers(0, 50),
)
def test_any_shape_and_layout(tokens, width, vocabulary, chunk, transposed, seed):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=random)
    weight = (
        torch.randn(width, vocabulary, generator=random).t()
        if transposed
        else torch.randn(vocabulary, width, generator=random)
    )
    ids = torch.randint(vocabulary, (tokens,), generator=random)
    hidden.requires_grad_()
    logp = linear_logprob(hidden, weight, ids, chunk_tokens=chunk, impl=HERE)
    expected, _ = definition(hidden.detach().double(), weight.double(), None, ids)
    assert_near(logp, expected)
    logp.sum().backward()
    assert hidden.grad.shape == hidden.shape


@pytest.mark.skipif(
    INTERPRETED, reason="float64 and torch.library are the reference's and the dispatcher's business"
)
def test_gradcheck_library_compile_and_checkpointing():
    leaves, ids = inputs_of(BIG, tokens=(2, 3), hidden=4, vocabulary=7)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, ids, bias=b, softcap=3.0, return_entropy=True), leaves
    )
    small = [
        leaf.detach().float().reshape(-1, 4) if at == 0 else leaf.detach().float()
        for at, leaf in enumerate(leaves)
    ]
    flat = [leaf.requires_grad_() for leaf in small]
    for bias, temperatures in ((None, None), (flat[2], torch.rand(6) + 0.5)):
        torch.library.opcheck(
            torch.ops.saferlhf_fast.linear_logprob,
            (flat[0], flat[1], ids.reshape(-1), bias, 1.0, temperatures, 0.0, True, 4, True, "", "auto"),
        )
    compiled = torch.compile(
        lambda h, w: linear_logprob(h * 2, w, ids).sin().sum(), fullgraph=True, backend="aot_eager"
    )
    plain = linear_logprob(leaves[0] * 2, leaves[1], ids).sin().sum()
    assert_near(compiled(*leaves[:2]), plain)
    for one, other in zip(
        torch.autograd.grad(compiled(*leaves[:2]), leaves[:2]), torch.autograd.grad(plain, leaves[:2])
    ):
        assert_near(one, other)
    checkpointed = torch.utils.checkpoint.checkpoint(
        lambda h, w: linear_logprob(h * 2, w, ids).sin().sum(), *leaves[:2], use_reentrant=False
    )
    for one, other in zip(
        torch.autograd.grad(checkpointed, leaves[:2]),
        torch.autograd.grad(linear_logprob(leaves[0] * 2, leaves[1], ids).sin().sum(), leaves[:2]),
    ):
        assert torch.equal(one, other)


def test_is_token_logprob_of_the_product():
    (hidden, weight, bias), ids = inputs_of(torch.float32, tokens=(1, 4), hidden=8, vocabulary=507)
    with torch.no_grad():
        assert_near(
            linear_logprob(hidden, weight, ids, bias=bias, impl=HERE),
            token_logprob(hidden @ weight.t() + bias, ids, impl=HERE),
        )


def test_wrong_arguments():
    (hidden, weight, bias), ids = inputs_of(torch.float32)
    for problem, arguments, options in (
        ("expected hidden \\[..., H\\] and weight \\[V, H\\]", (hidden, weight.t(), ids), {}),
        ("ids: expected shape", (hidden, weight, ids[:1]), {}),
        ("integer ids", (hidden, weight, ids.float()), {}),
        ("weight: expected torch.float32", (hidden, weight.half(), ids), {}),
        ("bias: expected shape", (hidden, weight, ids), dict(bias=bias[:3])),
        ("chunk_tokens: expected None or an integer >= 1", (hidden, weight, ids), dict(chunk_tokens=0)),
        ("temperature: expected", (hidden, weight, ids), dict(temperature=torch.ones(3))),
    ):
        with pytest.raises(ValueError, match=problem):
            linear_logprob(*arguments, **options)
