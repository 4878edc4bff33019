"""linear_ppo_loss: against float64 autograd, chunks, half precision, poison, ZeRO-3 in two processes,
torch.library.
"""

import importlib.util
import json

import forked
import kit
import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import BIG, OPTIONS, Case, definition
from tolerance import assert_near

from saferlhf_fast import linear_logprob, linear_ppo_loss, ppo_loss
from saferlhf_fast.kernels import dispatch, linear

pytestmark = pytest.mark.numeric

INTERPRETED = dispatch.interpreted()
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED else [BIG])
CLIP = 0.2


def leaves_of(case):
    return [tensor.detach().clone().requires_grad_() for tensor in (case.hidden, case.weight, case.bias)]


def expected_of(case, upstream=1.0, with_reference=True, **options):
    """(loss, stats, gradients of hidden, weight and bias) in float64."""
    exact = [
        tensor.detach().to("cpu", BIG).requires_grad_() for tensor in (case.hidden, case.weight, case.bias)
    ]
    loss, stats = definition(
        case, exact[0] @ exact[1].t() + exact[2], clip_ratio=CLIP, with_reference=with_reference, **options
    )
    return loss, stats, torch.autograd.grad(upstream * loss, exact)


def near(got, expected):
    """float32 and float64 by the table. Half precision relative to the largest entry: d logits are rounded to
    it on a device before the products, so an entry that is a sum of terms of both signs keeps their rounding.
    """
    if got.dtype in (torch.float32, BIG):
        assert_near(got, expected)
    elif not (INTERPRETED and got.dtype == torch.bfloat16):
        # the interpreter cuts float32 to bfloat16 where a GPU rounds
        error = (got.double().cpu() - expected).abs().max() / expected.abs().max()
        assert error <= 4 * torch.finfo(got.dtype).eps, error


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("chunk_tokens, options, dtype", naive.pairs([None, 5], OPTIONS, DTYPES))
def test_equals_float64(impl, device, dtype, options, chunk_tokens):
    if impl in ("triton", "native") and dtype == BIG:
        pytest.skip(
            f"there is no float64 version in {impl}: the dispatcher refuses it, tested in test_kernels_layout"
        )
    case = Case(dtype=dtype, device=device)
    hidden, weight, bias = leaves_of(case)
    loss, stats = linear_ppo_loss(
        hidden,
        weight,
        *case.tokens(),
        clip_ratio=CLIP,
        bias=bias,
        mask=case.mask,
        ref_logp=case.ref_logp,
        chunk_tokens=chunk_tokens,
        impl=impl,
        **options,
    )
    (3 * loss).backward()
    expected, expected_stats, gradients = expected_of(case, 3.0, **options)
    assert loss.shape == () and loss.dtype == (BIG if dtype == BIG else torch.float32)
    assert_near(loss, expected)
    for leaf, gradient in zip((hidden, weight, bias), gradients):
        assert leaf.grad.dtype == dtype
        near(leaf.grad, gradient)
    assert (hidden.grad[~case.mask] == 0).all()
    assert set(stats) == set(expected_stats)
    for name, value in stats.items():
        assert value.shape == () and not value.requires_grad
        assert_near(value, expected_stats[name], name)


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("poison", naive.POISONS)
def test_packed_is_padded_whatever_the_mask_hides(impl, device, poison):
    case = Case(device=device)
    hidden, weight, bias = leaves_of(case)
    with torch.no_grad():
        hidden[~case.mask] = poison
    ids = torch.where(case.mask, case.ids, 10**6)
    tokens = [
        torch.where(case.mask, tensor, poison) for tensor in (case.old_logp, case.advantages, case.ref_logp)
    ]
    call = dict(clip_ratio=CLIP, kl_coeff=0.1, entropy_coeff=0.1, impl=impl)
    loss, stats = linear_ppo_loss(
        hidden, weight, ids, *tokens[:2], mask=case.mask, ref_logp=tokens[2], **call
    )
    gradients = torch.autograd.grad(loss, (hidden, weight))
    packed = hidden.detach()[case.mask].requires_grad_()
    # Positions past the last offset belong to no row.
    tail = torch.full((2, packed.shape[1]), poison, device=device)
    other, _ = linear_ppo_loss(
        torch.cat([packed, tail]),
        weight,
        *(torch.cat([case.packed(tensor), case.packed(tensor)[:2]]) for tensor in case.tokens()),
        cu_seqlens=case.cu_seqlens(),
        ref_logp=torch.cat([case.packed(case.ref_logp), case.packed(case.ref_logp)[:2]]),
        **call,
    )
    assert_near(other, loss)
    one, two = torch.autograd.grad(other, (packed, weight))
    assert_near(one, gradients[0][case.mask])
    assert_near(two, gradients[1])
    assert torch.isfinite(gradients[0]).all() and (gradients[0][~case.mask] == 0).all()
    with torch.no_grad():
        again, again_stats = linear_ppo_loss(
            hidden, weight, ids, *tokens[:2], mask=case.mask, ref_logp=tokens[2], **call
        )
    assert_near(again, loss)
    for name, value in stats.items():
        assert_near(again_stats[name], value, name)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_only_what_is_wanted(impl, device):
    case = Case(lengths=(2, 1), device=device)

    def gradients(*kept):
        fresh = [leaf.detach().requires_grad_(at in kept) for at, leaf in enumerate(leaves_of(case))]
        linear_ppo_loss(
            fresh[0], fresh[1], *case.tokens(), clip_ratio=CLIP, bias=fresh[2], mask=case.mask, impl=impl
        )[0].backward()
        return [leaf.grad for leaf in fresh]

    whole = gradients(0, 1, 2)
    for kept in ((0,), (1,), (2,), (0, 1)):
        for at, gradient in enumerate(gradients(*kept)):
            assert torch.equal(gradient, whole[at]) if at in kept else gradient is None


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_that_are_never_a_target(impl, device, dtype):
    """V = 32000, normaliser 4096, a loss scale of 2^16: d weight of a row that no token has as its target is
    p times a little, and right all the same. Over 1/Z nearly every d logit is below float16's smallest
    number.
    """
    case = Case(lengths=(2, 1), hidden=4, vocabulary=32_000, dtype=dtype, device=device, slack=0)
    hidden, weight, bias = leaves_of(case)
    loss, _ = linear_ppo_loss(
        hidden,
        weight,
        *case.tokens(),
        clip_ratio=CLIP,
        bias=bias,
        mask=case.mask,
        normalizer=4096.0,
        impl=impl,
    )
    (loss * 65_536).backward()
    _, _, (d_hidden, d_weight, _) = expected_of(case, 65_536.0, with_reference=False, normalizer=4096.0)
    never = torch.ones(32_000, dtype=torch.bool)
    never[case.ids[case.mask].cpu()] = False
    exact = d_weight[never]
    share = (weight.grad.cpu().double()[never] - exact).abs().sum() / exact.abs().sum()
    assert share < (2e-3 if dtype == torch.float16 else 1e-5), share
    scale = d_hidden.abs().max()
    assert ((hidden.grad.double().cpu() - d_hidden).abs().max() / scale) < (
        4e-3 if dtype == torch.float16 else 1e-5
    )


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_micro_batches_with_a_normalizer_add_up(impl, device):
    case = Case(lengths=(2, 1, 3, 1) if INTERPRETED else (4, 3, 5, 2), device=device)
    whole = leaves_of(case)
    call = dict(clip_ratio=CLIP, advantage_scale=1.5, advantage_shift=torch.tensor(-0.25), impl=impl)
    linear_ppo_loss(whole[0], whole[1], *case.tokens(), mask=case.mask, **call)[0].backward()
    parts = leaves_of(case)
    for at in (slice(0, 1), slice(1, 4)):
        linear_ppo_loss(
            parts[0][at],
            parts[1],
            *(tensor[at] for tensor in case.tokens()),
            mask=case.mask[at],
            normalizer=torch.tensor(4.0, device=device),
            **call,
        )[0].backward()
    assert_near(parts[0].grad, whole[0].grad)
    assert_near(parts[1].grad, whole[1].grad)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_nothing_to_learn_from(impl, device):
    for lengths in ((), (0, 0)):
        case = Case(lengths=lengths, device=device)
        hidden, weight, _ = leaves_of(case)
        loss, stats = linear_ppo_loss(
            hidden, weight, *case.tokens(), clip_ratio=CLIP, mask=case.mask, impl=impl
        )
        loss.backward()
        assert loss.item() == 0 and (weight.grad == 0).all() and (hidden.grad == 0).all()
        assert all(value == 0 for value in stats.values())


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_is_linear_logprob_and_ppo_loss(impl, device):
    case = Case(lengths=(4, 2) if INTERPRETED else (30, 12), vocabulary=507, device=device)
    hidden, weight, bias = leaves_of(case)
    loss, _ = linear_ppo_loss(
        hidden, weight, *case.tokens(), clip_ratio=CLIP, bias=bias, mask=case.mask, impl=impl
    )
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    logp = linear_logprob(hidden, weight, case.ids, bias=bias, impl=impl)
    expected, _ = ppo_loss(logp, case.old_logp, case.advantages, clip_ratio=CLIP, mask=case.mask, impl=impl)
    assert_near(loss, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected, (hidden, weight, bias))):
        assert_near(one, other)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_three_products_and_no_logits_of_all_tokens(impl, device, monkeypatch):
    if impl == "reference":
        pytest.skip("the reference is the definition: it has them")
    products, plain = [], linear.product
    monkeypatch.setattr(
        linear, "product", lambda a, b, out, add=False: products.append(out.shape) or plain(a, b, out, add)
    )
    case = Case(lengths=(4, 4), device=device, slack=0)
    hidden, weight, _ = leaves_of(case)
    loss, _ = linear_ppo_loss(
        hidden, weight, *case.tokens(), clip_ratio=CLIP, mask=case.mask, chunk_tokens=3, impl=impl
    )
    made = len(products)
    loss.backward()
    # Logits and d weight of three chunks (d hidden is a plain mm), none in backward.
    assert made == len(products) == 6 and max(shape[0] for shape in products if shape[1] == 57) == 3


@settings(max_examples=6 if INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 4 if INTERPRETED else 9), min_size=1, max_size=4),
    vocabulary=st.integers(1, 70),
    seed=st.integers(0, 99),
    chunk=st.integers(1, 20),
    token_mean=st.booleans(),
    kl=st.sampled_from(["k1", "k3"]),
)
def test_any_lengths(lengths, vocabulary, seed, chunk, token_mean, kl):
    case = Case(lengths=lengths, vocabulary=vocabulary, seed=seed)
    hidden, weight, bias = leaves_of(case)
    options = dict(kl_coeff=0.2, kl_estimator=kl, reduction="token-mean" if token_mean else "sequence-mean")
    loss, _ = linear_ppo_loss(
        hidden,
        weight,
        *case.tokens(),
        bias=bias,
        clip_ratio=CLIP,
        mask=case.mask,
        ref_logp=case.ref_logp,
        chunk_tokens=chunk,
        **options,
    )
    loss.backward()
    if sum(lengths):
        expected, _, gradients = expected_of(case, **options)
        assert_near(loss, expected)
        for leaf, gradient in zip((hidden, weight, bias), gradients):
            assert_near(leaf.grad, gradient)


@pytest.mark.skipif(
    INTERPRETED, reason="float64 and torch.library are the reference's and the dispatcher's business"
)
def test_gradcheck_library_compile_and_checkpointing():
    case = Case(dtype=BIG, lengths=(3, 1), hidden=4, vocabulary=7)
    leaves = leaves_of(case)
    call = dict(clip_ratio=CLIP, mask=case.mask, ref_logp=case.ref_logp, kl_coeff=0.1, entropy_coeff=0.1)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_ppo_loss(h, w, *case.tokens(), bias=b, **call)[0], leaves
    )
    flat = [leaf.detach().float().requires_grad_() for leaf in leaves]
    flat[0] = flat[0].detach().reshape(-1, 4).requires_grad_()
    vectors = [case.ids, *(tensor.float() for tensor in (case.old_logp, case.advantages, case.ref_logp))]
    one = torch.tensor(2.0)
    for wanted in ([True, True, True], [True, False, False], [False, False, False]):
        tensors = [leaf if want else leaf.detach() for leaf, want in zip(flat, wanted)]
        torch.library.opcheck(
            torch.ops.saferlhf_fast.linear_ppo_loss,
            (
                *tensors,
                wanted,
                4,
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

    def loss_of(h, w):
        return linear_ppo_loss(torch.tanh(h), w, *case.tokens(), **call)[0] * 2

    plain = torch.autograd.grad(loss_of(*leaves[:2]), leaves[:2])
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for other in (
        torch.autograd.grad(compiled(*leaves[:2]), leaves[:2]),
        torch.autograd.grad(
            torch.utils.checkpoint.checkpoint(loss_of, *leaves[:2], use_reentrant=False), leaves[:2]
        ),
    ):
        for one, two in zip(plain, other):
            assert_near(two, one)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_same_inputs_same_bits(impl, device):
    case = Case(lengths=(3, 2) if INTERPRETED else (40, 9), vocabulary=507, device=device)
    results = []
    for _ in range(2):
        leaves = leaves_of(case)
        loss, _ = linear_ppo_loss(
            leaves[0],
            leaves[1],
            *case.tokens(),
            clip_ratio=CLIP,
            mask=case.mask,
            chunk_tokens=3 if INTERPRETED else 16,
            impl=impl,
        )
        loss.backward()
        results.append((loss.detach(), leaves[0].grad, leaves[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_wrong_arguments():
    case = Case()
    hidden, weight, bias = leaves_of(case)
    for problem, change in (
        ("reduction: expected one of", dict(reduction="mean")),
        ("bias: expected shape", dict(bias=bias[:2])),
        ("ref_logp: expected the reference's log-probs", dict(kl_coeff=0.1)),
        ("chunk_tokens: expected", dict(chunk_tokens=0)),
        ("mask: expected dtype torch.bool", dict(mask=case.mask.int())),
        ("clip_high: expected", dict(clip_high=-0.1)),
        ("dual_clip: expected None or a number > 1", dict(dual_clip=0.5)),
    ):
        with pytest.raises(ValueError, match=problem):
            linear_ppo_loss(
                hidden, weight, *case.tokens(), **(dict(clip_ratio=CLIP, mask=case.mask) | change)
            )
    ids = case.ids.clone()
    ids[0, 0] = -1
    if not INTERPRETED:
        with pytest.raises(ValueError, match="linear_ppo_loss: ids: expected 0 <= id < 57, got -1"):
            linear_ppo_loss(hidden, weight, ids, *case.tokens()[1:], clip_ratio=CLIP, mask=case.mask)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """On the CPU, GPU or not: two processes would need two of them."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    out = tmp_path_factory.mktemp("head") / "out.json"
    done = forked.run([kit.SUPPORT / "head_worker.py", out], processes=2, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.skipif(INTERPRETED, reason="DeepSpeed and gloo, without Triton")
@pytest.mark.parametrize("kind", ["", " ppo"])
@pytest.mark.parametrize("stage", [0, 3])
def test_zero_stages_against_plain_logits(two_processes, kind, stage):
    """Three steps in two processes: cross-entropy, and the PPO loss, of logits and of our ops in the head's
    own forward.
    """
    ours, plain = two_processes["steps"][f"ours{kind}/{stage}"], two_processes["steps"][f"plain{kind}/0"]
    assert len(ours) == len(plain) > 3
    assert ours == pytest.approx(plain, rel=2e-4, abs=2e-5)


@pytest.mark.skipif(INTERPRETED, reason="gloo, without Triton")
def test_a_vocabulary_in_shards(two_processes):
    assert max(two_processes["shards"]["differences"]) < 1e-5
    assert two_processes["shards"]["all_nan"]
