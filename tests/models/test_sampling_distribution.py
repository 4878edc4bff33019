"""One definition of the sampled distribution: picking tokens from it, and the log-probs that scoring gives
them.
"""

import pytest
import torch
from tolerance import assert_near

from saferlhf_fast.config.stages import Sampling
from saferlhf_fast.models.sampling_distribution import (
    Context,
    context_of,
    pick,
    plain,
    sampling_logits,
    sampling_logprob,
    uniforms,
)

pytestmark = pytest.mark.numeric

SETTINGS = {
    "temperature": Sampling(temperature=0.7),
    "top_p": Sampling(top_p=0.9),
    "top_k": Sampling(top_k=5),
    "penalty": Sampling(repetition_penalty=1.3),
    "all": Sampling(temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.3),
}


def test_plain():
    assert plain(Sampling()) and plain(SETTINGS["temperature"])
    assert not any(plain(SETTINGS[name]) for name in ("top_p", "top_k", "penalty"))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("size", [7, 63, 1000, 5003])
def test_warp_is_transformers_distribution(name, size):
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    sampling = SETTINGS[name]
    draw = torch.Generator().manual_seed(size)
    logits = torch.randn(6, size, generator=draw) * 3
    seen = torch.randint(size, (6, 4), generator=draw)
    theirs = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        theirs.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        theirs.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        theirs.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p != 1:
        theirs.append(TopPLogitsWarper(sampling.top_p))
    got, expected = sampling_logits(logits, sampling, seen).softmax(-1), theirs(seen, logits).softmax(-1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert ((got == 0) == (expected == 0)).all()


def test_a_small_nucleus_of_a_large_vocabulary_is_found_without_a_sort():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6000, generator=draw) * 12
    kept = sampling_logits(logits, Sampling(top_p=0.8)) > -torch.inf
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    for row in range(3):
        count = int((probabilities[row].cumsum(-1) < 0.8).sum()) + 1
        assert count < 1024 and sorted(order[row, :count].tolist()) == kept[row].nonzero()[:, 0].tolist()


def test_equally_likely_tokens_are_in_the_nucleus_or_out_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, -9.0]])
    assert (sampling_logits(logits, Sampling(top_p=0.6)) > -torch.inf).tolist() == [
        [True, True, True, True, False]
    ]


@pytest.mark.parametrize("size", [1, 63, 252, 256, 257, 1500])
def test_pick_takes_the_first_token_whose_sum_exceeds_the_number(size):
    draw = torch.Generator().manual_seed(size)
    scores = torch.randn(40, size, generator=draw) * 2
    scores[:, size // 3 : size // 2] = -torch.inf
    number = torch.rand(40, generator=draw, dtype=torch.float64)
    number[:3] = torch.tensor([0.0, 1 - 1e-16, 0.5], dtype=torch.float64)
    logp = scores.double().log_softmax(-1)
    upto = logp.exp().cumsum(-1)
    expected = torch.searchsorted(upto, number[:, None], right=True)[:, 0].clamp(max=size - 1)
    token, got = pick(scores.clone(), number)
    # A number nearer to an edge than fp32 can tell may fall to either side of it.
    clear = ((upto - number[:, None]).abs() > 1e-6).all(-1)
    assert clear.sum() >= 30 or size == 1
    assert (token == expected)[clear].all()
    assert (scores.gather(1, token[:, None]) > -torch.inf).all()
    assert_near(got, logp.gather(1, token[:, None])[:, 0])


def test_picked_tokens_have_their_probabilities():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(20_000, 1)
    token, _ = pick(
        scores.clone(), torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    share = torch.bincount(token, minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=4 * 0.5 / 20_000**0.5)


def test_a_diverged_model_still_gives_tokens_and_says_so_in_their_log_probs():
    scores = torch.zeros(3, 300)
    scores[0, 5], scores[1, 5] = torch.nan, torch.inf
    token, logp = pick(scores, torch.tensor([0.5, 0.5, 0.5]))
    assert ((token >= 0) & (token < 300)).all() and logp.isnan().tolist() == [True, True, False]


def test_numbers_follow_from_the_seed_alone():
    alone, several = uniforms([7], [3]), uniforms([9, 7], [50, 40])
    assert torch.equal(alone[0], several[1, :3]) and not torch.equal(several[0, :40], several[1, :40])
    assert several.min() >= 0 and several.max() < 1


def packed(dtype=torch.float32, lengths=(9, 4, 6), first=(4, 1, 5), vocabulary=41, hidden=8):
    """Hidden states, weight, bias, targets and context of three packed sequences whose later tokens are asked
    for.
    """
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(vocabulary, (sum(lengths),), generator=draw)
    starts = [0, lengths[0], lengths[0] + lengths[1]]
    rows = torch.tensor([s + p for s, f, n in zip(starts, first, lengths) for p in range(f - 1, n - 1)])
    states = torch.randn(len(rows), hidden, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, hidden, generator=draw, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=draw, dtype=torch.float64).to(dtype)
    seen = [ids[s : s + p + 1] for s, f, n in zip(starts, first, lengths) for p in range(f - 1, n - 1)]
    return states, weight, bias, ids[rows + 1], context_of(ids, lengths, rows), seen


def dense(hidden, weight, bias, softcap, scale, targets, sampling, seen):
    """The formula in the inputs' dtype, one row at a time, with transformers' order of settings."""
    out = []
    for h, target, before in zip(hidden, targets, seen):
        logits = scale * (h @ weight.t() + bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        factor = torch.ones_like(logits)
        for token in before.tolist():
            factor[token] = (
                sampling.repetition_penalty if logits[token] < 0 else 1 / sampling.repetition_penalty
            )
        logits = logits * factor / sampling.temperature
        kept = torch.ones_like(logits, dtype=torch.bool)
        if sampling.top_k:
            kept &= logits >= logits.sort(descending=True).values[sampling.top_k - 1]
        order = logits.masked_fill(~kept, -torch.inf).argsort(descending=True)
        before_it = torch.zeros_like(logits)
        probabilities = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        before_it[order] = probabilities[order].cumsum(-1) - probabilities[order]
        kept &= before_it < sampling.top_p
        kept[target] = True
        out.append(logits[target] - logits[kept].logsumexp(-1))
    return torch.stack(out)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (4.0, 0.5)])
@pytest.mark.parametrize("chunk", [None, 3])
def test_warped_logprob_and_its_gradient_against_the_dense_formula(name, softcap, scale, chunk):
    *inputs, targets, context, seen = packed()
    sampling = SETTINGS[name]
    wide = [x.double().requires_grad_() for x in inputs]
    narrow = [x.clone().requires_grad_() for x in inputs]
    expected = dense(*wide, softcap, scale, targets, sampling, seen)
    got = sampling_logprob(*narrow, softcap, scale, targets, sampling, context, chunk)
    assert_near(got, expected)
    upstream = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
    for made, right in zip(
        torch.autograd.grad(got, narrow, upstream), torch.autograd.grad(expected, wide, upstream.double())
    ):
        torch.testing.assert_close(made.double(), right, rtol=1e-4, atol=1e-5)


def test_gradients_that_nobody_wants_are_not_made():
    hidden, weight, bias, targets, context, _ = packed()
    hidden.requires_grad_()
    (d_hidden,) = torch.autograd.grad(
        sampling_logprob(hidden, weight, None, None, 1.0, targets, SETTINGS["all"], context).sum(), hidden
    )
    assert d_hidden.shape == hidden.shape and d_hidden.abs().sum() > 0


def test_targets_outside_the_nucleus_have_finite_log_probs():
    hidden, weight, bias, targets, context, _ = packed()
    logits = hidden @ weight.t() + bias
    least = logits.argmin(-1)
    assert sampling_logprob(hidden, weight, bias, None, 1.0, least, Sampling(top_k=1), None).isfinite().all()


def test_a_penalty_needs_the_tokens_before():
    hidden, weight, bias, targets, _, _ = packed()
    with pytest.raises(ValueError, match="context: expected the tokens before each row"):
        sampling_logprob(hidden, weight, bias, None, 1.0, targets, SETTINGS["penalty"], None)


def test_context_is_each_row_s_own_sequence_up_to_it():
    *_, context, seen = packed()
    assert isinstance(context, Context)
    for got, expected in zip(context.seen(slice(0, len(seen))).tolist(), seen):
        assert set(got) == set(expected.tolist())


def test_no_rows():
    hidden, weight, bias, *_ = packed()
    none = torch.zeros(0, dtype=torch.long)
    hidden = hidden[:0].requires_grad_()
    got = sampling_logprob(hidden, weight.requires_grad_(), bias, None, 1.0, none, Sampling(top_k=3), None)
    assert got.shape == (0,) and torch.autograd.grad(got.sum(), weight)[0].abs().sum() == 0
