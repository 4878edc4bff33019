"""ppo_loss: against loops under autograd, KL and entropy terms, both reductions, normaliser, whitening,
layouts of memory.
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

from saferlhf_fast import ppo_loss
from saferlhf_fast.kernels.ppo_loss.reference import STATISTICS

pytestmark = pytest.mark.numeric

CLIP = 0.2
NAMES = ("logp", "old_logp", "advantages", "ref_logp", "entropy")
TERMS = {
    "surrogate": {},
    "k1": dict(kl_coeff=0.3, kl_estimator="k1"),
    "k3 and entropy": dict(kl_coeff=0.3, kl_estimator="k3", entropy_coeff=0.2),
    "high and dual clip, k3": dict(clip_high=0.4, dual_clip=1.3, kl_coeff=0.3),
}


def inputs_of(batch, dtype=torch.float32, spread=0.3, terms="surrogate"):
    """{name: packed tokens}: log-probs that differ by about `spread`, so that some ratios are clipped and
    some are not.
    """
    logp = batch.tokens(torch.float64) - 2
    tokens = dict(
        logp=logp, old_logp=logp + batch.tokens(torch.float64, spread), advantages=batch.tokens(torch.float64)
    )
    if terms != "surrogate":
        tokens["ref_logp"] = logp + batch.tokens(torch.float64, spread)
    if "entropy" in terms:
        tokens["entropy"] = batch.tokens(torch.float64).abs()
    return {name: tensor.to(dtype) for name, tensor in tokens.items()}


def by_loops(
    batch,
    tokens,
    token_mean=False,
    normalizer=None,
    scale=1.0,
    shift=0.0,
    kl_coeff=0.0,
    kl_estimator="k3",
    entropy_coeff=0.0,
    clip_high=CLIP,
    dual_clip=None,
):
    """(loss, {name: gradient [N]}, statistics) in float64, the gradients from autograd of the formula."""
    leaves = {name: tokens[name].detach().double().cpu().requires_grad_() for name in NAMES if name in tokens}
    rows, means = [], dict.fromkeys(STATISTICS, 0.0)
    for pieces in zip(*(leaf.split(batch.lengths) for leaf in leaves.values())):
        terms = []
        for values in zip(*pieces):
            token = dict(zip(leaves, values))
            advantage = token["advantages"].detach() * scale + shift
            log_ratio = (token["logp"] - token["old_logp"].detach()).clamp(-20, 20)
            ratio = log_ratio.exp()
            plain, other = -ratio * advantage, -ratio.clamp(1 - CLIP, 1 + clip_high) * advantage
            term = torch.maximum(plain, other)
            means["clipped"] += (other > plain).item()
            if dual_clip is not None and advantage < 0:
                means["dual_clipped"] += (-advantage * dual_clip < term).item()
                term = torch.minimum(term, -advantage * dual_clip)
            if "ref_logp" in token:
                gap = token["ref_logp"].detach() - token["logp"]
                kl = -gap if kl_estimator == "k1" else gap.clamp(-20, 20).exp() - gap.clamp(-20, 20) - 1
                term = term + kl_coeff * kl
                means["ref_kl"] += kl.item()
            if "entropy" in token:
                term = term - entropy_coeff * token["entropy"]
                means["entropy"] += token["entropy"].item()
            means["log_ratio"] += log_ratio.item()
            means["clip_fraction"] += not 1 - CLIP <= ratio.item() <= 1 + clip_high
            means["approx_kl"] += (ratio - 1 - ratio.log()).item()
            means["ratio"] += ratio.item()
            means["advantage"] += advantage.item()
            terms.append(term)
        rows.append(terms)
    loss = naive.autograd_loss(rows, token_mean, normalizer)
    loss.backward()
    count = sum(batch.lengths)
    statistics = {name: value / count for name, value in means.items()}
    statistics |= dict(sequences=sum(length > 0 for length in batch.lengths), tokens=count)
    return loss, {name: leaves[name].grad for name in ("logp", "entropy") if name in leaves}, statistics


@functools.cache
def case_of(size, dtype, token_mean, terms):
    """(batch, tokens, what by_loops gives for them) on the CPU; every implementation is compared with it."""
    batch = naive.Ragged([size, 1, 0, max(size // 2, 1)], seed=size)
    tokens = inputs_of(batch, dtype, terms=terms)
    return batch, tokens, by_loops(batch, tokens, token_mean, **TERMS[terms])


def call(tokens, upstream=1.0, **arguments):
    """(loss, {name: gradient}, stats) of the op; the tensors of `tokens` are not touched."""
    leaves = {
        name: tensor.detach().requires_grad_(name in ("logp", "entropy")) for name, tensor in tokens.items()
    }
    with nan_memory():
        loss, stats = ppo_loss(**leaves, clip_ratio=CLIP, **arguments)
        (upstream * loss).backward()
    return loss.detach(), {name: leaves[name].grad for name in ("logp", "entropy") if name in leaves}, stats


@pytest.mark.parametrize(
    "terms, reduction, size, impl, device, dtype",
    naive.pairs(
        TERMS,
        ["sequence-mean", "token-mean"],
        naive.SIZES,
        typed(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    ),
)
def test_equals_the_loops(impl, device, dtype, size, reduction, terms):
    batch, tokens, (expected, exact_gradients, statistics) = case_of(
        size, dtype, reduction == "token-mean", terms
    )
    tokens = {name: tensor.to(device) for name, tensor in tokens.items()}
    loss, gradients, stats = call(
        tokens,
        3,
        cu_seqlens=batch.cu_seqlens.to(device),
        reduction=reduction,
        impl=impl,
        **TERMS[terms],
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == ()
    assert_near(loss, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_near(gradient, 3 * exact_gradients[name], name)
    assert ("dual_clipped" in stats) == ("dual_clip" in TERMS[terms])
    assert ("ref_kl" in stats) == ("ref_logp" in tokens) and ("entropy" in stats) == ("entropy" in tokens)
    for name, value in stats.items():
        assert value.shape == () and not value.requires_grad
        assert_near(value, torch.tensor(float(statistics[name]), dtype=torch.float64), name)


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("poison", naive.POISONS)
@pytest.mark.parametrize("terms", TERMS)
def test_padded_is_packed_whatever_the_mask_hides(impl, device, poison, terms):
    """Positions that the mask hides and those past the last offset: not read, gradient exactly 0."""
    batch = naive.Ragged([5, 0, 600, 1], device=device)
    tokens = inputs_of(batch, terms=terms)
    packed, arguments = (
        dict(cu_seqlens=batch.cu_seqlens),
        dict(advantage_scale=2.0, advantage_shift=0.5, impl=impl),
    )
    loss, gradients, stats = call(tokens, **packed, **arguments, **TERMS[terms])
    behind = {
        name: torch.cat([tensor, torch.full((700,), poison, device=device)])
        for name, tensor in tokens.items()
    }
    padded = {name: batch.padded(tensor, poison) for name, tensor in tokens.items()}
    for other, rows, valid in ((behind, packed, slice(0, 606)), (padded, dict(mask=batch.mask), batch.mask)):
        other_loss, other_gradients, other_stats = call(other, **rows, **arguments, **TERMS[terms])
        assert_near(other_loss, loss)
        for name, gradient in other_gradients.items():
            assert_near(gradient[valid], gradients[name])
            hidden = torch.ones_like(gradient, dtype=torch.bool)
            hidden[valid] = False
            assert (gradient[hidden] == 0).all() and hidden.any()
        for name, value in stats.items():
            assert_near(other_stats[name], value, name)


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("reduction, count", [("sequence-mean", 3.0), ("token-mean", 43.0)])
def test_micro_batches_with_a_normalizer_add_up(impl, device, reduction, count):
    batch = naive.Ragged([9, 4, 0, 30], device=device)
    tokens = inputs_of(batch, exact(impl), terms="k3 and entropy")
    arguments = dict(
        reduction=reduction,
        advantage_scale=1.5,
        advantage_shift=torch.tensor(-0.25, device=device),
        impl=impl,
        **TERMS["k3 and entropy"],
    )
    whole, gradients, _ = call(tokens, cu_seqlens=batch.cu_seqlens, **arguments)
    assert_near(
        whole,
        by_loops(batch, tokens, reduction == "token-mean", None, 1.5, -0.25, **TERMS["k3 and entropy"])[0],
    )
    for normalizer in (count, torch.tensor(count, device=device)):
        parts = [
            call(
                {name: tensor[at] for name, tensor in tokens.items()},
                normalizer=normalizer,
                cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
                **arguments,
            )
            for at, offsets in ((slice(0, 9), [0, 9]), (slice(9, 43), [0, 4, 4, 34]))
        ]
        assert_near(sum(part[0] for part in parts), whole)
        for name, gradient in gradients.items():
            assert_near(torch.cat([part[1][name] for part in parts]), gradient)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_half_precision_gradients_do_not_vanish(impl, device):
    """A gradient over Z is below float16 where the loss is scaled up again: 1/Z and the upstream gradient
    meet in float32.
    """
    batch = naive.Ragged([40, 9], device=device)
    tokens = inputs_of(batch, torch.float16, terms="k3 and entropy")
    arguments = dict(
        cu_seqlens=batch.cu_seqlens, reduction="token-mean", impl=impl, **TERMS["k3 and entropy"]
    )
    _, plain, _ = call(tokens, normalizer=64.0, **arguments)
    _, scaled, _ = call(tokens, 2.0**24, normalizer=2.0**30, **arguments)
    for name, gradient in scaled.items():
        assert gradient.dtype == torch.float16 and (gradient != 0).sum() > 40
        assert torch.equal(gradient, plain[name])


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_far_ratios_and_edges(impl, device):
    """Log-ratios past +-20 are clamped and carry no gradient; a NaN log-prob is not hidden."""
    logp = torch.tensor([0.0, -100.0, 0.0, float("nan")], device=device, requires_grad=True)
    old_logp = torch.tensor([-100.0, 0.0, 0.0, 0.0], device=device)
    advantages = torch.tensor([-1.0, -1.0, -1.0, 1.0], device=device)
    offsets = torch.tensor([0, 1], dtype=torch.int32, device=device)
    for index, expected in enumerate((torch.tensor(20.0).exp().item(), 0.8, 1.0)):
        at = slice(index, index + 1)
        loss, _ = ppo_loss(
            logp[at], old_logp[at], advantages[at], clip_ratio=CLIP, cu_seqlens=offsets, impl=impl
        )
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert gradient[index].item() == (1.0 if index == 2 else 0.0)
    loss, _ = ppo_loss(logp, old_logp, advantages, clip_ratio=CLIP, impl=impl)
    assert torch.isnan(loss) and torch.isnan(torch.autograd.grad(loss, logp)[0][3])
    still = torch.zeros(1, device=device)
    for far in (100.0, -100.0):
        for estimator, kl, slope in (
            ("k3", torch.tensor(20.0).exp().item() - 21 if far > 0 else 19.0, 0.0),
            ("k1", -far, 1.0),
        ):
            leaf = still.clone().requires_grad_()
            loss, stats = ppo_loss(
                leaf,
                still,
                still,
                clip_ratio=CLIP,
                ref_logp=still + far,
                kl_coeff=1.0,
                kl_estimator=estimator,
                impl=impl,
            )
            assert loss.item() == pytest.approx(kl, rel=1e-5) and stats["ref_kl"] == loss
            assert torch.autograd.grad(loss, leaf)[0].item() == slope


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_dual_clip_and_clip_higher(impl, device):
    """Each side of each bound, one token at a time: loss, gradient and what the statistics say."""

    def one(ratio, advantage, **clip):
        leaf = torch.tensor([ratio], device=device).log().requires_grad_()
        loss, stats = ppo_loss(
            leaf,
            torch.zeros_like(leaf),
            torch.tensor([advantage], device=device),
            clip_ratio=CLIP,
            impl=impl,
            **clip,
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        said = [stats[name].item() for name in ("clip_fraction", "clipped", "dual_clipped") if name in stats]
        assert stats["log_ratio"].item() == pytest.approx(leaf.item(), abs=1e-6)
        return [pytest.approx(x, rel=1e-5) for x in (loss.item(), gradient.item(), *said)]

    bounds = dict(clip_high=0.3, dual_clip=3.0)
    assert one(1.25, 2.0) == [-2.4, 0, 1, 1]  # above 1.2
    assert one(1.25, 2.0, clip_high=0.3) == [-2.5, -2.5, 0, 0]  # below 1.3
    assert one(1.35, 2.0, **bounds) == [-2.6, 0, 1, 1, 0]
    # outside, but the plain term is the larger loss
    assert one(0.75, 2.0, **bounds) == [-1.5, -1.5, 1, 0, 0]
    assert one(0.75, -2.0, **bounds) == [1.6, 0, 1, 1, 0]
    # a bad token below the dual clip, and above it
    assert one(2.9, -2.0, **bounds) == [5.8, 5.8, 1, 0, 0]
    assert one(3.1, -2.0, **bounds) == [6.0, 0, 1, 0, 1]
    assert one(3.1, -2.0) == one(3.1, -2.0, clip_high=0.3) == [6.2, 6.2, 1, 0]
    assert one(3.1, 2.0, **bounds) == [-2.6, 0, 1, 1, 0]  # a good one knows no dual clip
    assert one(3.1, 0.0, **bounds) == [0, 0, 1, 0, 0]
    assert one(3.1, -2.0, dual_clip=float("inf")) == [6.2, 6.2, 1, 0, 0]
    assert one(1.1, 2.0, clip_high=0) == [-2.0, 0, 1, 1]


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_the_dual_clip_leaves_the_kl_and_what_is_masked_alone(impl, device):
    """Where it acts the policy term's gradient is exactly 0: what is left is the KL's."""
    logp = torch.zeros(2, 3, device=device, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]], device=device)
    old_logp, advantages = torch.full_like(logp, -2.0), torch.full_like(logp, -1.0)
    call_ = dict(
        clip_ratio=CLIP, dual_clip=3, mask=mask, ref_logp=old_logp, kl_coeff=0.5, kl_estimator="k1", impl=impl
    )
    loss, stats = ppo_loss(logp, old_logp, advantages, **call_)
    assert loss.item() == 3 + 0.5 * 2 and stats["dual_clipped"] == 1 and stats["log_ratio"] == 2
    assert torch.autograd.grad(loss, logp)[0].tolist() == [[0.25, 0.25, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("impl, device", naive.PLACES)
@pytest.mark.parametrize("which", NAMES)
def test_nan_stays_visible(impl, device, which):
    tokens = inputs_of(naive.Ragged([5], device=device), terms="k3 and entropy")
    tokens[which][3] = torch.nan
    loss, gradients, _ = call(tokens, dual_clip=1.1, impl=impl, **TERMS["k3 and entropy"])
    assert torch.isnan(loss)
    assert torch.isnan(gradients["logp"]).tolist() == [False, False, False, which != "entropy", False]


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_close_policies_keep_their_digits(impl, device):
    """exp(x) - 1 - x of a log-ratio of 1e-3 is 5e-7: in float32 a plain subtraction has no correct digit."""
    logp = torch.zeros(300, device=device)
    near = torch.full_like(logp, 1e-3)
    _, stats = ppo_loss(logp, -near, logp, clip_ratio=CLIP, ref_logp=near, impl=impl)
    for name in ("approx_kl", "ref_kl"):
        assert stats[name].item() == pytest.approx(5.0016671e-7, rel=1e-3)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_nothing_to_learn_from(impl, device):
    for shape in ((0, 3), (2, 0), (2, 5)):
        nan = torch.full(shape, torch.nan, device=device)
        loss, gradients, stats = call(
            dict.fromkeys(NAMES, nan),
            mask=torch.zeros(shape, dtype=torch.bool, device=device),
            advantage_scale=2.0,
            advantage_shift=1.0,
            impl=impl,
            **TERMS["k3 and entropy"],
        )
        assert loss == 0 and all(value == 0 for value in stats.values())
        assert all((gradient == 0).all() for gradient in gradients.values())
    tokens = inputs_of(naive.Ragged([3], device=device), terms="k3 and entropy")
    loss, gradients, _ = call(tokens, normalizer=0, impl=impl, **TERMS["k3 and entropy"])
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())
    nan = torch.full((4,), torch.nan, device=device)
    for offsets in ([0], [0, 0], [0, 0, 0]):
        loss, gradients, stats = call(
            dict.fromkeys(NAMES, nan),
            impl=impl,
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
        )
        assert loss == 0 and all(value == 0 for value in stats.values())
        assert all((gradient == 0).all() for gradient in gradients.values())


@settings(max_examples=8 if INTERPRETED else 40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    spread=st.floats(0, 3),
    impl=st.sampled_from(HERE),
    token_mean=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    packed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    terms=st.sampled_from(list(TERMS)),
)
def test_any_lengths_and_layouts(lengths, spread, impl, token_mean, layout, packed, dtype, terms):
    batch = naive.Ragged(lengths, seed=len(lengths))
    tokens = inputs_of(batch, dtype, spread, terms)
    rows = (
        dict(cu_seqlens=laid_out(batch.cu_seqlens.double(), layout).int())
        if packed
        else dict(mask=batch.mask)
    )
    given_ = {
        name: laid_out(tensor if packed else batch.padded(tensor, -100.0), layout)
        for name, tensor in tokens.items()
    }
    loss, gradients, _ = call(
        given_, impl=impl, reduction="token-mean" if token_mean else "sequence-mean", **rows, **TERMS[terms]
    )
    expected, exact_gradients, _ = by_loops(batch, tokens, token_mean, **TERMS[terms])
    assert_near(loss, expected)
    for name, gradient in gradients.items():
        assert_near(gradient if packed else gradient[batch.mask], exact_gradients[name])


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_a_long_row_and_many_rows(impl, device):
    """naive.LONG tokens in one row; more rows than a grid's second axis takes (in the interpreter fewer)."""
    long = naive.Ragged([naive.LONG, 3], device=device)
    many = naive.Ragged([index % 3 for index in range(60 if INTERPRETED else 70_001)], device=device)
    for batch in (long, many):
        tokens = inputs_of(batch)
        loss, gradients, stats = call(tokens, cu_seqlens=batch.cu_seqlens, impl=impl)
        logp, old_logp, advantages = (tensor.double().cpu() for tensor in tokens.values())
        leaf = logp.requires_grad_()
        ratio = (leaf - old_logp).exp()
        terms = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        count_B = torch.tensor(batch.lengths)
        share = (1 / count_B.clamp(min=1).double()).repeat_interleave(count_B) / (count_B > 0).sum()
        expected = (terms * share).sum()
        expected.backward()
        assert_near(loss, expected)
        assert_near(gradients["logp"], leaf.grad)
        assert stats["sequences"] == (count_B > 0).sum() and stats["tokens"] == count_B.sum()
        assert_near(stats["ratio"], ratio.mean())


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_gradcheck(impl, device):
    if impl == "triton":
        pytest.skip("Triton has no float64 version: the dispatcher refuses it")
    batch = naive.Ragged([4, 0, 3], device=device)
    for terms, arguments in TERMS.items():
        tokens = inputs_of(batch, torch.float64, terms=terms)
        inputs = [tokens[name].requires_grad_() for name in ("logp", "entropy") if name in tokens]

        def loss(logp, entropy=None, rest=tokens, arguments=arguments):
            given = {**rest, "logp": logp} | ({} if entropy is None else {"entropy": entropy})
            return ppo_loss(**given, clip_ratio=CLIP, cu_seqlens=batch.cu_seqlens, impl=impl, **arguments)[0]

        assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("impl, device", naive.PLACES)
def test_library_and_determinism(impl, device):
    batch = naive.Ragged([3, 700], device=device)
    tokens = inputs_of(batch, terms="k3 and entropy")
    logp, old_logp, advantages, ref_logp, entropy = tokens.values()
    logp.requires_grad_()
    entropy.requires_grad_()
    scalar = torch.tensor(2.0, device=device)
    for terms, scalars in (
        ((None, None), (None, None, None)),
        ((ref_logp, entropy), (scalar, scalar, scalar)),
    ):
        torch.library.opcheck(
            torch.ops.saferlhf_fast.ppo_loss,
            (
                logp,
                old_logp,
                advantages,
                *terms,
                batch.cu_seqlens,
                None,
                CLIP,
                0.3,
                3.0,
                0.1,
                False,
                0.1,
                False,
                *scalars,
                impl,
            ),
        )

    def loss(x, entropy):
        return (
            ppo_loss(
                x,
                old_logp,
                advantages,
                clip_ratio=CLIP,
                cu_seqlens=batch.cu_seqlens,
                ref_logp=ref_logp,
                entropy=entropy,
                impl=impl,
                **TERMS["k3 and entropy"],
            )[0]
            * 2
        )

    losses = [
        loss(logp, entropy),
        loss(logp, entropy),
        torch.compile(loss, fullgraph=True, backend="aot_eager")(logp, entropy),
    ]
    gradients = [torch.autograd.grad(value, (logp, entropy)) for value in losses]
    for again in (1, 2):
        assert torch.equal(losses[0], losses[again])
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[again]))


@pytest.mark.skipif(INTERPRETED, reason="threads are the business of the CPU's versions")
@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=naive.native)])
def test_threads_change_no_bit(impl):
    batch = naive.Ragged([20_000, 100_000, 7])
    tokens = inputs_of(batch, torch.bfloat16, terms="k3 and entropy")
    one, two = with_threads(
        lambda: call(tokens, cu_seqlens=batch.cu_seqlens, impl=impl, **TERMS["k3 and entropy"])
    )
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(one[part][name], two[part][name]) for part in (1, 2) for name in one[part])


def test_wrong_arguments():
    tokens = torch.zeros(4)
    for problem, arguments in (
        ("reduction: expected one of", dict(reduction="mean")),
        ("kl_estimator: expected one of k3, k1", dict(kl_estimator="k2")),
        ("clip_ratio: expected a number >= 0", dict(clip_ratio=-1.0)),
        ("clip_high: expected a number >= 0, got nan", dict(clip_high=float("nan"))),
        ("dual_clip: expected None or a number > 1, got 1", dict(dual_clip=1)),
        ("dual_clip: expected None or a number > 1, got nan", dict(dual_clip=float("nan"))),
        ("ref_logp: expected a tensor, since its coefficient is 0.1", dict(kl_coeff=0.1)),
        ("entropy: expected a tensor, since its coefficient is -0.1", dict(entropy_coeff=-0.1)),
        ("ref_logp: expected shape", dict(ref_logp=tokens[:3])),
        ("entropy: expected a floating point dtype", dict(entropy=tokens.long())),
        ("normalizer: expected a number or a 0-d tensor", dict(normalizer=torch.ones(2))),
    ):
        with pytest.raises(ValueError, match=problem):
            ppo_loss(tokens, tokens, tokens, **(dict(clip_ratio=CLIP) | arguments))
    with pytest.raises(ValueError, match="advantages: expected shape"):
        ppo_loss(tokens, tokens, tokens[:2], clip_ratio=CLIP)
