"""Element counts past 2^31 in C++, without the memory for them. Triton's are in
tests/kernels/test_launches.py.

The last row of a tensor lies more than 2^31 elements behind the first, in memory that has pages only where
they are touched. Each case runs in a process of its own, since an offset that overflows may end the process.
"""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]
import forked
from tolerance import assert_near

from saferlhf_fast.kernels import dispatch

pytestmark = pytest.mark.numeric

PAST = 2**31
WIDTH = 2**20  # of the padded rows below: 4 MiB of float32
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]


# --- memory
# ---------------------------------------------------------------------------------------------------------


def _map(address, size, flags, file=-1):
    found = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0)
    if found == ctypes.c_void_p(-1).value:
        raise MemoryError(f"mmap of {size} bytes: {os.strerror(ctypes.get_errno())}")
    return found


def _tensor(address, elements, dtype):
    return torch.frombuffer((ctypes.c_char * (elements * dtype.itemsize)).from_address(address), dtype=dtype)


def sparse(elements, dtype=torch.float32):
    """Zeros of which only touched pages exist; never freed: the process is short."""
    size = elements * dtype.itemsize
    start = _map(None, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    # what is only read: one page of 2 MiB
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return _tensor(start, elements, dtype)


def ring(elements, dtype=torch.float32, lap=WIDTH):
    """Memory to write to: the same `lap` elements again and again, then `lap` with pages of their own."""
    size, step = elements * dtype.itemsize, lap * dtype.itemsize
    start = _map(None, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    file = os.memfd_create("lap")
    os.ftruncate(file, step)
    for at in range(0, size - step - step + 1, step):
        _map(start + at, step, mmap.MAP_SHARED | mmap.MAP_POPULATE | getattr(mmap, "MAP_FIXED", 0x10), file)
    whole = _tensor(start, elements, dtype)
    whole[:lap], whole[-lap:] = torch.nan, torch.nan  # every element of it, by now
    return whole


class HugeOutputs(TorchDispatchMode):
    """Tensors of more than 2^30 elements that an op makes lie in a ring."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket.__name__ in ("empty", "empty_like", "new_empty"):
            small = function(*arguments, **{**(keywords or {}), "device": "meta"})
            if small.numel() > 2**30:
                return ring(small.numel(), small.dtype).view(small.shape)
        return function(*arguments, **(keywords or {}))


# --- cases: run in a process of their own
# ----------------------------------------------------------------------------


def last_row(count, seed=0):
    """(mask [B, T] with valid tokens only in its last row, `count` sparse float32 [B, T], the same rows by
    themselves).
    """
    rows = PAST // WIDTH + 1
    mask = sparse(rows * WIDTH, torch.uint8).view(torch.bool).view(rows, WIDTH)
    mask[-1, 5:1000] = True
    mask[-1, -1] = True
    tensors = [sparse(rows * WIDTH).view(rows, WIDTH) for _ in range(count)]
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor[-1] = torch.randn(WIDTH, generator=generator) * 0.3
    return mask, tensors, mask[-1:].clone(), [tensor[-1:].clone() for tensor in tensors]


def both(op):
    """(native, reference) of an op."""
    return (dispatch.choose(op, (torch.zeros(1),), name)[0] for name in ("native", "reference"))


def case_gae():
    native, reference = both("gae")
    mask, given, mask_of_row, alone = last_row(2)
    with HugeOutputs():
        got = native(*given, None, mask, 0.97, 0.9, False)
    for mine, expected in zip(got, reference(*alone, None, mask_of_row, 0.97, 0.9, False)):
        assert_near(mine[-1:], expected)
        assert (mine[0] == 0).all()


def case_ppo_lag_advantage():
    native, reference = both("ppo_lag_advantage")
    mask, (logp, ref_logp, values, cost_values), mask_of_row, alone = last_row(4)
    reward, cost, multiplier = torch.randn(mask.shape[0]), torch.randn(mask.shape[0]), torch.tensor(0.6)
    rest = (0.1, 1.0, 0.95, 50.0, False)
    with HugeOutputs():
        *got, statistics = native(
            logp, ref_logp, reward, cost, values, cost_values, multiplier, None, mask, *rest
        )
    *expected, expected_statistics = reference(
        alone[0], alone[1], reward[-1:], cost[-1:], alone[2], alone[3], multiplier, None, mask_of_row, *rest
    )
    for mine, row in zip(got, expected):
        assert_near(mine[-1:], row)
        assert (mine[0] == 0).all()
    assert_near(statistics / statistics[0], expected_statistics / statistics[0])


def case_ppo_loss(count=5):
    """count: 5 with the reference's log-probs and the entropy, 3 without."""
    native, reference = both("ppo_loss")
    mask, given, mask_of_row, alone = last_row(count)
    given, alone = (tensors + [None] * (5 - count) for tensors in (given, alone))
    kl_coeff, entropy_coeff = (0.1, 0.01) if count == 5 else (0.0, 0.0)
    rest = (0.2, 0.3, 3.0, kl_coeff, False, entropy_coeff, True, None, None, None)
    with HugeOutputs():
        loss, gradient, entropy_gradient, *got = native(*given, None, mask, *rest)
    expected_loss, expected_gradient, expected_entropy_gradient, *expected = reference(
        *alone, None, mask_of_row, *rest
    )
    gradients = [(gradient, expected_gradient), (entropy_gradient, expected_entropy_gradient)]
    for mine, row in gradients[: 2 if count == 5 else 1]:
        assert_near(mine[-1:], row)
        assert (mine[0] == 0).all()
    for mine, row in zip((loss, *got), (expected_loss, *expected)):
        assert_near(mine, row)


def case_value_loss(critics=1):
    native, reference = both("value_loss")
    mask, given, mask_of_row, alone = last_row(3)
    rest = (0.2, True, None)
    if critics == 1:
        tensors, alone = [tensor[None] for tensor in given], [row[None] for row in alone]
    else:
        rows = mask.shape[0] // 2 + 1
        mask, tensors = mask[-rows:], [sparse(2 * rows * WIDTH).view(2, rows, WIDTH) for _ in given]
        for tensor, row in zip(tensors, alone):
            tensor[0, -1], tensor[1, -1] = 2 * row, row
        alone = [torch.stack([2 * row, row]) for row in alone]
    with HugeOutputs():
        loss, gradient, *got = native(*tensors, None, mask, *rest)
    expected_loss, expected_gradient, *expected = reference(*alone, None, mask_of_row, *rest)
    # of two critics the first's lies in the ring, written over since
    assert_near(gradient[-1, -1], expected_gradient[-1, 0])
    for mine, row in zip((loss, *got), (expected_loss, *expected)):
        assert_near(mine, row)


def logit_rows(dtype, vocabulary=1003):
    """Three rows of logits more than 2^31 elements apart, and the same rows side by side."""
    stride = PAST + 64
    logits = torch.as_strided(sparse(2 * stride + vocabulary, dtype), (3, vocabulary), (stride, 1))
    logits.copy_(torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(1)) * 3)
    return logits, logits.contiguous(), torch.tensor([vocabulary - 1, 5, 700])


def case_token_logprob(dtype=torch.float32, narrow=None):
    """Forward; backward into the logits themselves, or as `narrow` numbers into the same memory."""
    (native, _), (backward, _) = tuple(both("token_logprob")), tuple(both("token_logprob_backward"))
    logits, beside, ids = logit_rows(dtype)
    far, near = (native(x, ids, 0.7, None, 0.0, True) for x in (logits, beside))
    for mine, expected in zip(far, near):
        assert torch.equal(mine, expected) and mine.isfinite().all()
    grads, rest = (torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 0.2, 0.1])), (0.7, None, 0.0)
    expected = backward(beside, ids, *near, *grads, *rest, torch.empty_like(beside, dtype=narrow or dtype))
    out = logits
    if narrow is not None:
        whole = torch.as_strided(logits, (2 * logits.stride(0) + logits.shape[1],), (1,)).view(narrow)
        out = torch.as_strided(whole, logits.shape, (logits.stride(0) * dtype.itemsize // narrow.itemsize, 1))
    backward(logits, ids, *far, *grads, *rest, out)
    assert torch.equal(out, expected) and expected.isfinite().all()


def case_ppo_loss_from_logits():
    native, _ = both("ppo_loss_from_logits")
    logits, beside, ids = logit_rows(torch.float32)
    vectors = [
        torch.tensor(x) for x in ([-9.0, -2.0, -3.0], [1.0, -1.0, 0.5], [-8.0, -3.0, -2.0], [0.5, 0.25, 0.25])
    ]
    rest = (0.2, 0.3, 3.0, 0.1, False, 0.01, 0.7, None, 0.0)
    expected = native(beside, ids, *vectors, *rest, beside)
    got = native(logits, ids, *vectors, *rest, logits)
    for mine, want in zip((*got, logits), (*expected, beside)):
        assert torch.equal(mine, want) and want.isfinite().all() and (want != 0).any()


CASES = {
    "gae": case_gae,
    "ppo_lag_advantage": case_ppo_lag_advantage,
    "ppo_loss": case_ppo_loss,
    "ppo_loss of three": lambda: case_ppo_loss(3),
    "value_loss": case_value_loss,
    "value_loss of two": lambda: case_value_loss(2),
    "token_logprob": case_token_logprob,
    "token_logprob bfloat16": lambda: case_token_logprob(torch.bfloat16),
    "ppo_loss_from_logits": case_ppo_loss_from_logits,
    "token_logprob narrow": lambda: case_token_logprob(torch.float32, torch.bfloat16),
}
LONG = (
    "ppo_loss",
    "value_loss",
)  # up to ten seconds each: in make test-slow; "of three" and "of two" are quicker


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sparse memory as Linux has it")
@pytest.mark.skipif(dispatch.native_module()[0] is None, reason="the native module is not built")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in LONG else case for case in CASES]
)
def test_native(case):
    result = forked.run([__file__, case], timeout=280)
    if "MemoryError: mmap" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-3000:]}"
    used = int(result.stdout.split()[-1])
    assert used < 1 << 20, f"{used} KiB: meant to run without the memory"


if __name__ == "__main__":
    CASES[sys.argv[1]]()
    # Of a page that is mapped many times this counts each mapping's share.
    print(
        next(
            line.split()[1]
            for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
            if line.startswith("Pss:")
        )
    )
