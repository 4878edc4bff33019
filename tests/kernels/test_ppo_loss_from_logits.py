"""ppo_loss_from_logits: against float64 autograd, in place and not, poison under the mask, half precision,
torch.library.
"""

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import BIG, OPTIONS, Case, definition
from tolerance import assert_near, assert_same

from saferlhf_fast import ppo_loss, ppo_loss_from_logits, token_logprob
from saferlhf_fast.kernels import dispatch

pytestmark = pytest.mark.numeric

INTERPRETED = dispatch.interpreted()
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED else [BIG])
CLIP = 0.2


def logits_of(case):
    """[B, T, V] in the case's dtype, off-leaf so that the op may write over it, with the leaf that it comes
    from.
    """
    leaf = (case.logits(case.hidden, case.weight, case.bias)).to(case.dtype).to(case.device).requires_grad_()
    return leaf, leaf * 1


def usable(impl, dtype):
    if impl in ("triton", "native") and dtype == BIG:
        pytest.skip(
            f"there is no float64 version in {impl}: the dispatcher refuses it, tested in test_kernels_layout"
        )


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("inplace, options, dtype", naive.pairs([True, False], OPTIONS, DTYPES))
def test_equals_float64(impl, device, dtype, options, inplace):
    usable(impl, dtype)
    case = Case(dtype=dtype, device=device)
    leaf, logits = logits_of(case)
    place = logits.data_ptr()
    loss, stats = ppo_loss_from_logits(
        logits,
        *case.tokens(),
        clip_ratio=CLIP,
        mask=case.mask,
        ref_logp=case.ref_logp,
        inplace=inplace,
        impl=impl,
        **options,
    )
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    exact = leaf.detach().to("cpu", BIG).requires_grad_()
    expected, expected_stats = definition(case, exact, clip_ratio=CLIP, **options)
    assert loss.shape == () and loss.dtype == (BIG if dtype == BIG else torch.float32)
    assert_near(loss, expected)
    assert (gradient.data_ptr() == place) == inplace and gradient.dtype == dtype
    # the interpreter cuts float32 to bfloat16 where a GPU rounds
    if not (INTERPRETED and dtype == torch.bfloat16):
        table_near(gradient, 3 * torch.autograd.grad(expected, exact)[0], dtype, inplace)
    assert (gradient[~case.mask] == 0).all()
    for name, value in stats.items():
        assert value.shape == () and not value.requires_grad
        assert_near(value, expected_stats[name], name)
    assert set(stats) == set(expected_stats)


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 257, *naive.LARGE_VOCABULARIES])
def test_vocabularies(impl, device, vocabulary):
    case = Case(lengths=(2,), hidden=3, vocabulary=vocabulary, device=device, slack=0)
    leaf, logits = logits_of(case)
    loss, _ = ppo_loss_from_logits(
        logits, *case.tokens(), clip_ratio=CLIP, mask=case.mask, entropy_coeff=0.1, impl=impl
    )
    loss.backward()
    exact = leaf.detach().to("cpu", BIG).requires_grad_()
    expected, _ = definition(case, exact, clip_ratio=CLIP, entropy_coeff=0.1, with_reference=False)
    assert_near(loss, expected)
    assert_near(leaf.grad, torch.autograd.grad(expected, exact)[0])


@pytest.mark.parametrize("impl, device", [place for place in naive.PLACES if place.values[0] == "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_on_a_device(impl, device, dtype):
    usable(impl, dtype)
    from saferlhf_fast.kernels import scaling_triton

    tensor = torch.randn(3, 1711).to(dtype).to(device)
    for factor in (1.0, 0.37):
        expected = (tensor.float() * factor).to(dtype)
        got = scaling_triton.scale(tensor.clone(), torch.tensor(factor, device=device))
        # An ulp of bfloat16: the interpreter cuts where a GPU rounds.
        assert (got - expected).abs().max() <= 2**-7 * expected.abs().max()
        assert factor != 1.0 or torch.equal(got, tensor)


def table_near(gradient, expected, dtype, inplace):
    """Half precision is rounded once in the forward pass and once more by the upstream factor of 3."""
    assert_near(gradient, expected) if dtype in (torch.float32, BIG) else torch.testing.assert_close(
        gradient.double().cpu(), expected, rtol=2.5 * torch.finfo(dtype).eps, atol=2e-5
    )


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("poison", naive.POISONS)
def test_packed_is_padded_and_masked_rows_are_not_read(impl, device, poison):
    case = Case(device=device)
    leaf, logits = logits_of(case)
    with torch.no_grad():
        logits[~case.mask] = poison
    ids = torch.where(case.mask, case.ids, -7)
    tokens = [
        torch.where(case.mask, tensor, poison) for tensor in (case.old_logp, case.advantages, case.ref_logp)
    ]
    call = dict(clip_ratio=CLIP, kl_coeff=0.1, entropy_coeff=0.1, impl=impl)
    packed_logits = logits[case.mask] * 1
    loss, stats = ppo_loss_from_logits(logits, ids, *tokens[:2], mask=case.mask, ref_logp=tokens[2], **call)
    (gradient,) = torch.autograd.grad(loss, logits)
    other, other_stats = ppo_loss_from_logits(
        packed_logits,
        case.packed(case.ids),
        case.packed(case.old_logp),
        case.packed(case.advantages),
        ref_logp=case.packed(case.ref_logp),
        cu_seqlens=case.cu_seqlens(),
        **call,
    )
    (packed,) = torch.autograd.grad(other, packed_logits)
    assert_near(other, loss)
    assert torch.equal(gradient[case.mask], packed) and (gradient[~case.mask] == 0).all()
    for name, value in stats.items():
        assert_near(other_stats[name], value, name)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_is_token_logprob_and_ppo_loss(impl, device):
    """The docstring's three lines, the same loss in every bit and within the table in the gradient."""
    case = Case(lengths=(4, 2) if INTERPRETED else (30, 12), vocabulary=507, device=device)
    leaf, logits = logits_of(case)
    loss, _ = ppo_loss_from_logits(
        logits, *case.tokens(), clip_ratio=CLIP, mask=case.mask, entropy_coeff=0.1, impl=impl
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    logp, entropy = token_logprob(leaf, case.ids, return_entropy=True, impl=impl)
    expected, _ = ppo_loss(
        logp,
        case.old_logp,
        case.advantages,
        entropy=entropy,
        entropy_coeff=0.1,
        clip_ratio=CLIP,
        mask=case.mask,
        impl=impl,
    )
    assert_same(loss, expected)
    assert_near(gradient, torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_the_logits_stay_where_they_are_needed(impl, device):
    case = Case(device=device)
    leaf, logits = logits_of(case)
    call = dict(clip_ratio=CLIP, mask=case.mask, impl=impl)
    before = leaf.detach().clone()
    first, _ = ppo_loss_from_logits(leaf, *case.tokens(), **call)  # a leaf is not written over
    with torch.no_grad():
        # nor is anything without a gradient
        second, stats = ppo_loss_from_logits(logits, *case.tokens(), **call)
    assert torch.equal(leaf, before) and torch.equal(logits, before)
    assert not second.requires_grad
    assert_same(first, second)
    loss, _ = ppo_loss_from_logits(logits, *case.tokens(), **call)
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    kept = leaf * 1
    useful = kept.exp()  # saves its result, not its input: unharmed
    loss, _ = ppo_loss_from_logits(kept, *case.tokens(), **call)
    (loss + 0 * useful.sum()).backward()
    saved = leaf * 1
    square = saved * saved  # needs its input again
    loss, _ = ppo_loss_from_logits(saved, *case.tokens(), **call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square.sum()).backward()


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_edges(impl, device):
    for lengths in ((), (0, 0), (1,)):
        case = Case(lengths=lengths, device=device)
        leaf, logits = logits_of(case)
        loss, stats = ppo_loss_from_logits(logits, *case.tokens(), clip_ratio=CLIP, mask=case.mask, impl=impl)
        loss.backward()
        assert torch.isfinite(leaf.grad).all() and (leaf.grad[~case.mask] == 0).all()
        if sum(lengths) == 0:
            assert loss.item() == 0 and all(value == 0 for value in stats.values())
    case = Case(device=device, vocabulary=300)
    leaf, logits = logits_of(case)
    ids = case.ids.clone()
    with torch.no_grad():
        logits[0, 0, :] = -torch.inf
        logits[0, 0, :5] = 1.0
        ids[0, 0] = 3
        logits[0, 1, 7] = torch.nan
    loss, stats = ppo_loss_from_logits(
        logits, ids, *case.tokens()[1:], clip_ratio=CLIP, mask=case.mask, entropy_coeff=0.1, impl=impl
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isnan(loss) and torch.isnan(gradient[0, 1]).all() and torch.isfinite(gradient[0, 0]).all()


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_ids_outside_the_vocabulary(impl, device):
    case = Case(device=device)
    leaf, logits = logits_of(case)
    ids = case.ids.clone()
    ids[0, 1] = 57
    call = dict(clip_ratio=CLIP, mask=case.mask, impl=impl)
    if device == "cpu" and not INTERPRETED:
        with pytest.raises(ValueError, match="ppo_loss_from_logits: ids: expected 0 <= id < 57, got 57"):
            ppo_loss_from_logits(logits, ids, *case.tokens()[1:], **call)
        return
    loss, _ = ppo_loss_from_logits(logits, ids, *case.tokens()[1:], **call)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isnan(loss) and torch.isnan(gradient[0, 1]).all() and torch.isfinite(gradient[0, 0]).all()


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_half_precision_keeps_small_gradients(impl, device):
    """float16, V = 32000, a normaliser of 4096: over 1/Z nearly all of d logits would flush to zero; ours are
    right.
    """
    case = Case(lengths=(2, 1), hidden=4, vocabulary=32_000, dtype=torch.float16, device=device, slack=0)
    leaf, logits = logits_of(case)
    loss, _ = ppo_loss_from_logits(
        logits, *case.tokens(), clip_ratio=CLIP, mask=case.mask, normalizer=4096.0, impl=impl
    )
    (gradient,) = torch.autograd.grad(loss * 65_536, logits)  # what a loss scaler does
    exact = leaf.detach().to("cpu", BIG).requires_grad_()
    expected, _ = definition(case, exact, clip_ratio=CLIP, normalizer=4096.0)
    (expected,) = torch.autograd.grad(expected * 65_536, exact)
    counted = case.mask.cpu() & (expected.abs().sum(-1) > 0)
    naively = expected[counted] / 65_536
    assert (naively.half() == 0).double().mean() > 0.9  # the trap
    error = (gradient.double().cpu()[counted] - expected[counted]).abs()
    assert (error <= 2e-3 * expected[counted].abs() + 2**-24).all()


@settings(max_examples=6 if INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 4 if INTERPRETED else 9), min_size=1, max_size=4),
    vocabulary=st.integers(1, 70),
    seed=st.integers(0, 99),
    token_mean=st.booleans(),
    kl=st.sampled_from(["k1", "k3"]),
    entropy_coeff=st.sampled_from([0.0, 0.3]),
)
def test_any_lengths(lengths, vocabulary, seed, token_mean, kl, entropy_coeff):
    case = Case(lengths=lengths, vocabulary=vocabulary, seed=seed)
    leaf, logits = logits_of(case)
    options = dict(
        clip_ratio=CLIP,
        kl_coeff=0.2,
        kl_estimator=kl,
        entropy_coeff=entropy_coeff,
        reduction="token-mean" if token_mean else "sequence-mean",
    )
    loss, _ = ppo_loss_from_logits(logits, *case.tokens(), mask=case.mask, ref_logp=case.ref_logp, **options)
    loss.backward()
    exact = leaf.detach().to("cpu", BIG).requires_grad_()
    expected, _ = definition(case, exact, **options)
    assert_near(loss, expected)
    if sum(lengths):
        assert_near(leaf.grad, torch.autograd.grad(expected, exact)[0])


@pytest.mark.skipif(
    INTERPRETED, reason="float64 and torch.library are the reference's and the dispatcher's business"
)
def test_gradcheck_library_and_compile():
    case = Case(dtype=BIG, lengths=(3, 1), vocabulary=7)
    leaf, _ = logits_of(case)
    call = dict(clip_ratio=CLIP, mask=case.mask, ref_logp=case.ref_logp, kl_coeff=0.1, entropy_coeff=0.1)
    assert torch.autograd.gradcheck(lambda x: ppo_loss_from_logits(x, *case.tokens(), **call)[0], (leaf,))
    flat = leaf.detach().float().reshape(-1, 7).requires_grad_()
    vectors = [case.ids, *(tensor.float() for tensor in (case.old_logp, case.advantages, case.ref_logp))]
    one = torch.tensor(2.0)
    for gradient in (True, False):
        torch.library.opcheck(
            torch.ops.saferlhf_fast.ppo_loss_from_logits,
            (
                flat if gradient else flat.detach(),
                False,
                gradient,
                *vectors,
                None,
                case.mask,
                CLIP,
                0.3,
                3.0,
                0.1,
                True,
                0.1,
                1.0,
                None,
                0.0,
                False,
                one,
                one,
                one,
                "auto",
            ),
        )

    def loss_of(x):
        return ppo_loss_from_logits(x * 2, *case.tokens(), **call)[0] * 2

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    first, second = loss_of(leaf), compiled(leaf)
    assert torch.equal(first, second)
    assert_near(*(torch.autograd.grad(loss, leaf)[0] for loss in (first, second)))


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_same_inputs_same_bits(impl, device):
    case = Case(lengths=(4, 2) if INTERPRETED else (40, 9), vocabulary=507, device=device)
    results = []
    for _ in range(2):
        leaf, logits = logits_of(case)
        loss, _ = ppo_loss_from_logits(
            logits, *case.tokens(), clip_ratio=CLIP, mask=case.mask, entropy_coeff=0.1, impl=impl
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_wrong_arguments():
    case = Case()
    _, logits = logits_of(case)
    for problem, change in (
        ("reduction: expected one of", dict(reduction="mean")),
        ("kl_estimator: expected one of", dict(kl_estimator="k2")),
        ("ref_logp: expected the reference's log-probs", dict(kl_coeff=0.1)),
        ("softcap: expected", dict(softcap=0.0)),
        ("temperature: expected", dict(temperature=0.0)),
        ("clip_ratio: expected", dict(clip_ratio=-1.0)),
        ("mask: expected dtype torch.bool", dict(mask=case.mask.int())),
        ("clip_high: expected", dict(clip_high=-0.1)),
        ("dual_clip: expected None or a number > 1", dict(dual_clip=0.5)),
    ):
        with pytest.raises(ValueError, match=problem):
            ppo_loss_from_logits(logits, *case.tokens(), **(dict(clip_ratio=CLIP, mask=case.mask) | change))
    with pytest.raises(ValueError, match="old_logp: expected shape"):
        ppo_loss_from_logits(logits[:, :1], case.ids[:, :1], case.old_logp, case.advantages, clip_ratio=CLIP)
    with pytest.raises(ValueError, match="ids: expected shape"):
        ppo_loss_from_logits(logits, case.ids[:, :1], case.old_logp, case.advantages, clip_ratio=CLIP)
