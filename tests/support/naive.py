"""The formulas of safe-rlhf as Python loops, written from the paper and not from our code, and ragged batches
to try.

Everything is float64. A batch is a list of rows; a row is a list of tokens.
"""

import itertools

import hypothesis
import interpret
import pytest
import torch

from saferlhf_fast.kernels import dispatch

INTERPRETED = dispatch.interpreted()  # slow: fewer and smaller cases, which cross as many kinds of boundaries
SIZES = (1, 63, 507) if INTERPRETED else (1, 63, 252, 507)
HERE = ("triton",) if INTERPRETED else ("reference", "auto")  # implementations to draw from on the CPU
LONG = 4_500 if INTERPRETED else 131_072  # tokens of a long row: at least four blocks of any kernel
LARGE_VOCABULARIES = [32_001] if INTERPRETED else [32_000, 50_257, 151_936]
POISONS = (float("nan"), float("inf")) if INTERPRETED else (float("nan"), -100.0, float("inf"))
native = pytest.mark.skipif(dispatch.native_module()[0] is None, reason=f"_C: {dispatch.native_module()[1]}")
# Where the row ops run: implementation and device. In a process with TRITON_INTERPRET=1 that is Triton's
# interpreter alone.
PLACES = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("native", "cpu", id="native", marks=native),
]
if INTERPRETED:
    interpret.patch_once()
    # a failing example is not made smaller: that runs it hundreds of times
    hypothesis.settings.register_profile("interpreter", phases=[hypothesis.Phase.generate])
    hypothesis.settings.load_profile("interpreter")
    PLACES = [pytest.param("triton", "cpu", id="triton-interpreted")]
elif torch.cuda.is_available():
    PLACES += [pytest.param(impl, "cuda", id=f"{impl}-cuda") for impl in ("triton", "reference")]
# The same for the ops whose native version also runs on a GPU: `native_cuda` in dispatch.OPS.
SCAN_PLACES = list(PLACES)
if torch.cuda.is_available() and not INTERPRETED and getattr(dispatch.native_module()[0], "cuda", False):
    SCAN_PLACES.append(pytest.param("native", "cuda", id="native-cuda"))


def pairs(*axes):
    """The product of three or more axes of values or pytest.params, for parametrize. In the interpreter it is
    half of the product, in which each value of an axis meets each value of every other axis.
    """
    cases = itertools.product(*(list(enumerate(axis)) for axis in axes))
    return [
        _merged([value for _, value in case])
        for case in cases
        if not INTERPRETED or sum(at for at, _ in case) % 2 == 0
    ]


def _merged(values):
    parts = [value if hasattr(value, "marks") else pytest.param(value, id=_name(value)) for value in values]
    return pytest.param(
        *(value for part in parts for value in part.values),
        id="-".join(part.id for part in parts),
        marks=[mark for part in parts for mark in part.marks],
    )


def _name(value):
    if isinstance(value, (dict, tuple)):
        return "-".join(map(str, value)) or "plain"
    return str(value).replace("torch.", "")


class Ragged:
    """Rows of `lengths` tokens as padded [B, T] (each row's run starts somewhere) and as packed [N]."""

    def __init__(self, lengths, seed=0, slack=3, device="cpu"):
        self.random = torch.Generator().manual_seed(seed)
        self.lengths, self.device = list(lengths), device
        width = max(self.lengths, default=0) + slack
        self.mask = torch.zeros(len(self.lengths), width, dtype=torch.bool)
        for row, length in enumerate(self.lengths):
            start = int(torch.randint(0, slack + 1, (), generator=self.random))
            self.mask[row, start : start + length] = True
        self.mask = self.mask.to(device)
        self.cu_seqlens = torch.tensor([0, *self.lengths], device=device).cumsum(0).to(torch.int32)

    def tokens(self, dtype=torch.float32, scale=1.0):
        """Packed [N] random numbers."""
        return (
            (torch.randn(sum(self.lengths), generator=self.random, dtype=torch.float64) * scale)
            .to(dtype)
            .to(self.device)
        )

    def scores(self, dtype=torch.float32, scale=1.0):
        """[B] random numbers."""
        return (
            (torch.randn(len(self.lengths), generator=self.random, dtype=torch.float64) * scale)
            .to(dtype)
            .to(self.device)
        )

    def padded(self, packed, poison=float("nan")):
        """[B, T] with `poison` where the mask is False."""
        full = torch.full(self.mask.shape, poison, dtype=packed.dtype, device=self.device)
        full[self.mask] = packed
        return full

    def split(self, packed):
        """Rows as lists of floats."""
        return [row.tolist() for row in packed.detach().double().cpu().split(self.lengths)]

    def join(self, rows):
        """Rows of floats as one packed float64 tensor."""
        return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def gae_row(rewards, values, gamma, lam):
    """(advantages, returns) of one row."""
    advantages, running = [0.0] * len(rewards), 0.0
    for t in range(len(rewards) - 1, -1, -1):
        next_value = values[t + 1] if t + 1 < len(rewards) else 0.0
        delta = rewards[t] + gamma * next_value - values[t]
        running = delta + gamma * lam * running
        advantages[t] = running
    return advantages, [a + v for a, v in zip(advantages, values)]


def shaped_row(logp, ref_logp, score, sign, kl_coeff, clip_score):
    """The score at the last token, the KL term everywhere, then the clamp."""
    shaped = []
    for t, (now, before) in enumerate(zip(logp, ref_logp)):
        value = sign * kl_coeff * (now - before)
        if t == len(logp) - 1:
            value += score
        shaped.append(min(max(value, -clip_score), clip_score))
    return shaped


def mean_of_row_means(rows):
    """Each row with a token weighs the same."""
    means = [sum(row) / len(row) for row in rows if len(row)]
    return sum(means) / len(means)


def autograd_loss(term_rows, token_mean=False, normalizer=None):
    """The reduction over rows of scalar tensors, by loops; differentiable."""
    if token_mean:
        return sum(term for row in term_rows for term in row) / (
            normalizer or sum(len(row) for row in term_rows)
        )
    means = [sum(row) / len(row) for row in term_rows if len(row)]
    return sum(means) / (normalizer or len(means))
