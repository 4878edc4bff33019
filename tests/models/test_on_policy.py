"""The policy loss whose advantages are made from this forward's own log-probs: against autograd through plain
torch.
"""

import pytest
import torch

from saferlhf_fast.kernels import dispatch, linear
from saferlhf_fast.models.on_policy_loss import complete_sequences, loss_of, on_policy_loss

pytestmark = pytest.mark.numeric

COUNTS = (5, 0, 1, 9, 3, 2)


def problem(dtype, bias, vocabulary=37, width=16):
    random = torch.Generator().manual_seed(0)
    count = sum(COUNTS)
    hidden = torch.randn(count, width, generator=random).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=random) * 0.4).to(dtype)
    bias = (torch.randn(vocabulary, generator=random) * 0.3).to(dtype) if bias else None
    return hidden, weight, bias, torch.randint(vocabulary, (count,), generator=random)


def make_chunk_loss(seen=None):
    """Advantages of a token depend on all log-probs of its sequence, as KL shaping and GAE make them."""

    def chunk_loss(sequences, tokens, logp):
        if seen is not None:
            seen.append((sequences, tokens))
        counts = COUNTS[sequences]
        advantages = torch.cat(
            [
                torch.linspace(-1, 1, n).to(logp) * part.sum().sin() if n else part
                for n, part in zip(counts, logp.split(counts))
            ]
        )
        return -advantages.sum(), -advantages  # of −Σ ratio · A, whose ratio is 1

    return chunk_loss


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize(
    ("bias", "temperature", "softcap"), [(False, 1.0, None), (True, 0.7, None), (False, 1.3, 2.0)]
)
def test_loss_and_gradients(monkeypatch, impl, dtype, tolerance, bias, temperature, softcap):
    if impl == "native" and dispatch.native_module()[0] is None:
        pytest.skip(f"_C: {dispatch.native_module()[1]}")
    monkeypatch.setenv("SAFERLHF_IMPL", impl)
    monkeypatch.setitem(linear.WORKSPACE, "cpu", 16 * 4 * 37)  # chunks of 16 tokens
    hidden, weight, bias, ids = problem(dtype, bias)
    leaves = [None if x is None else x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = leaves[0] @ leaves[1].t() + (0.0 if leaves[2] is None else leaves[2])
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logp = torch.log_softmax(logits / temperature, -1).gather(1, ids[:, None])[:, 0]
    expected, grad = make_chunk_loss()(slice(0, len(COUNTS)), slice(0, len(ids)), logp.detach())
    (logp * grad).sum().backward()

    ours = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
    seen = []
    loss = on_policy_loss(*ours, ids, COUNTS, make_chunk_loss(seen), temperature, softcap)
    assert seen == [(slice(0, 4), slice(0, 15)), (slice(4, 6), slice(15, 20))]
    assert loss.item() == pytest.approx(expected.item(), abs=tolerance * 20)
    (3.0 * loss).backward()
    for mine, leaf in zip(ours, leaves):
        if mine is not None:
            scale = leaf.grad.abs().max()
            assert mine.grad.dtype == dtype
            assert ((mine.grad.double() / 3 - leaf.grad).abs().max() / scale) < tolerance


def test_the_form_for_log_probs_is_the_same():
    hidden, weight, _, ids = problem(torch.float32, False)
    results = []
    for fused in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if fused:
            loss = on_policy_loss(*leaves, None, ids, COUNTS, make_chunk_loss())
        else:
            logp = torch.log_softmax(leaves[0] @ leaves[1].t(), -1).gather(1, ids[:, None])[:, 0]
            loss = loss_of(logp, COUNTS, make_chunk_loss())
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_none_is_made():
    """Adapters: only the hidden states learn."""
    hidden, weight, _, ids = problem(torch.float32, False)
    hidden.requires_grad_()
    on_policy_loss(hidden, weight, None, ids, COUNTS, make_chunk_loss()).backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None


@pytest.mark.parametrize(
    ("counts", "most", "cuts"),
    [
        ((), 4, []),
        ((0,), 4, [(slice(0, 1), slice(0, 0))]),
        ((9,), 4, [(slice(0, 1), slice(0, 9))]),
        ((2, 2, 1), 4, [(slice(0, 2), slice(0, 4)), (slice(2, 3), slice(4, 5))]),
        (
            (1, 9, 0, 3),
            4,
            [(slice(0, 1), slice(0, 1)), (slice(1, 2), slice(1, 10)), (slice(2, 4), slice(10, 13))],
        ),
    ],
)
def test_chunks_hold_whole_sequences(counts, most, cuts):
    assert complete_sequences(counts, most) == cuts


def test_an_id_outside_the_vocabulary_is_refused_on_the_cpu():
    hidden, weight, _, ids = problem(torch.float32, False)
    ids[3] = 37
    with pytest.raises(ValueError, match="37"):
        on_policy_loss(hidden.requires_grad_(), weight, None, ids, COUNTS, make_chunk_loss())


def test_first_derivatives_alone():
    hidden, weight, _, ids = problem(torch.float32, False)
    hidden.requires_grad_()
    loss = on_policy_loss(hidden, weight, None, ids, COUNTS, make_chunk_loss())
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    for again in (
        lambda: torch.autograd.grad(gradient.square().sum(), hidden),
        gradient.square().sum().backward,
    ):
        with pytest.raises(RuntimeError, match="^on_policy_loss has first derivatives alone"):
            again()
