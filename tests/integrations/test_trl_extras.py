"""What TRL's trainers log beside log-probs, in our head: log sum p² and is_top1 against float64 and against
TRL's own formula (tests/support/others.py). TRL itself is in test_integration_trl.py.

N tokens, V vocabulary.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from others import chunked_extras

from saferlhf_fast.integrations import trl_head
from saferlhf_fast.kernels import dispatch

pytestmark = pytest.mark.numeric

INFINITY = float("inf")
IMPLEMENTATIONS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "native" and dispatch.native_module()[0] is None, reason="the native module is not built"
        ),
    )
    for name in ("reference", "native")
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (temperature, softcap, logit scale)
SETTINGS = ((1.0, None, 1.0), (0.6, None, 3.0), (1.0, 0.5, 1.0), (1.7, 30.0, 0.25))
# Rounding of a float32 of up to 12, the log of the widest vocabulary, and of what tanh and exp make.
SLACK = 2e-6


class Original:
    """TRL's function, which may not run here."""

    @staticmethod
    def forward(*_):
        raise AssertionError("fell back")

    apply = forward


def head(logits, ids, temperature, softcap, scale):
    """(log sum p², mean, is_top1) of our head for given products: hidden states are unit vectors."""
    weight = logits.t().contiguous()
    hidden = torch.eye(len(ids), dtype=logits.dtype)
    made = trl_head.chunked_head(Original).apply(
        hidden, weight, None, ids, temperature, 32768, softcap, scale, ("entropy", *trl_head.EXTRAS)
    )
    return made[2:]


def inputs(vocabulary):
    """{name: float32 logits [N, V]}"""
    normal = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    flat = torch.zeros(4, vocabulary)
    one = flat.clone()
    one[:, vocabulary // 2] = 1
    return {
        "normal": normal * 3,
        "large": normal * 30 + 1e4,
        "wide": normal * 300,
        "uniform": flat + 5.3,
        "confident": one * 25,
        "one-hot": one * 2e4 - 1e4,
        "steps": (normal * 2).round(),
    }


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 5003, 151_936])
def test_extras_against_float64_and_trl(impl, vocabulary, monkeypatch):
    """log sum p² is at most as far from float64 as TRL's; is_top1 is TRL's bit for bit, ties included."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, impl)
    ties = 0
    for name, logits in inputs(vocabulary).items():
        for dtype in DTYPES if vocabulary < 10_000 else DTYPES[:1]:
            given_ = logits.to(dtype)
            rows = given_.float()
            # tokens of the highest value: the first and the last of them, and any
            top = rows == rows.amax(-1, keepdim=True)
            last = vocabulary - 1 - top.flip(1).int().argmax(-1)
            ids = torch.stack([rows.argmax(-1)[0], last[1], last[2], torch.tensor(vocabulary // 3)])
            for setting in SETTINGS if vocabulary < 10_000 else SETTINGS[1:3]:
                message = f"{name} {dtype} {setting}"
                sums, mean, is_top1 = head(given_, ids, *setting)
                theirs, exact = (
                    chunked_extras(rows, ids, *setting),
                    chunked_extras(rows.double(), ids, *setting),
                )
                assert torch.equal(is_top1, theirs[2]), message
                ties += int((~is_top1 & (rows.gather(1, ids[:, None])[:, 0] == rows.amax(-1))).sum())
                error, other = ((x.double() - exact[0]).abs().max() for x in (sums, theirs[0]))
                assert error <= other + SLACK, f"{message}: {error} > {other}"
                assert (sums <= 0).all() and sums.dtype == torch.float32
                scale = max(1.0, float(exact[1].abs().max()))
                assert (mean - exact[1]).abs().max() <= 1e-5 * scale, message
    assert ties or vocabulary == 1


def alone(logits, ids, temperature=1.0, softcap=None, scale=1.0):
    """(log sum p², is_top1) of products that a matrix product cannot give: rows with infinities."""
    transform = trl_head._Transform(scale, softcap or 0.0, 1 / temperature)
    z = transform.capped_(logits.clone())
    return trl_head.log_sum_sq_probs_(z.clone(), transform.factor), trl_head.is_top1(transform.logits(z), ids)


def test_infinities():
    """-inf has probability 0; only -inf, a NaN or +inf is no distribution, and -inf and NaN are no top."""
    rows = torch.tensor(
        [
            [1.0, -INFINITY, 3.0, -INFINITY],
            [-INFINITY, -INFINITY, 2.0, -INFINITY],
            [-INFINITY] * 4,
            [0.0, torch.nan, 1.0, 2.0],
            [0.0, INFINITY, 1.0, 2.0],
        ]
    )
    for ids in (torch.tensor([2, 2, 0, 1, 1]), torch.tensor([0, 0, 3, 3, 3])):
        sums, is_top1 = alone(rows, ids)
        theirs = chunked_extras(rows, ids)
        assert torch.equal(is_top1, theirs[2])
        torch.testing.assert_close(sums, theirs[0], equal_nan=True)
    assert sums[1] == 0 and sums.isnan().tolist() == [False, False, True, True, True]
    assert alone(rows, torch.tensor([2, 2, 0, 1, 1]))[1].tolist() == [True, True, False, False, True]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 70),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([None, 0.01, 1.0, 40.0]),
    st.sampled_from([0.1, 1.0, 7.0]),
    st.sampled_from([0.01, 1.0, 100.0, 1e4]),
    st.integers(0, 2**31),
)
def test_is_top1_of_any_logits(vocabulary, temperature, softcap, scale, spread, seed):
    """The first index of the maximum of the logits as TRL makes them, also where the cap is saturated."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(30, vocabulary, generator=random) * spread
    ids = torch.randint(vocabulary, (30,), generator=random)
    sums, is_top1 = alone(logits, ids, temperature, softcap, scale)
    theirs = chunked_extras(logits, ids, temperature, softcap, scale)
    exact = chunked_extras(logits.double(), ids, temperature, softcap, scale)[0]
    assert torch.equal(is_top1, theirs[2])
    z = logits * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) * (1 / temperature)
    assert torch.equal(is_top1, z.argmax(-1) == ids)
    assert (sums - exact).abs().max() <= (theirs[0] - exact).abs().max() + SLACK
