"""How wrong an op may be, against float64 on the same inputs: the table for the tests of ops.

No machine has a table of its own. Tests that compare something else (small differences in bfloat16, long
sums, half-precision gradients of the ops with a head or logits, models, trainers) state their bounds where
they use them, and so does bench/bench_step.py.

The key is the dtype of the result. An op in float32 is held to the float32 row whichever implementation runs.
Below the table are the two places where a GPU is not asked for what a CPU and Triton's interpreter give.
"""

import torch

# dtype: (relative, absolute). bfloat16 and float16 hold for gradients written in the dtype of the logits:
# half an ulp.
TABLE = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2**-8, 1e-5),
    torch.float16: (2**-11, 1e-5),
}
# Device: relative error of one function of a number, also where it is nearly 0. A GPU's exp2 and its division
# are approximate, by two units in the last place; what is left after a subtraction near 0 has a few times
# that.
FUNCTION = {"cpu": 2e-6, "cuda": 4e-6}
# The same sequences through a whole model in another batch: packed, padded, beside others or alone. A
# library's products may take another way, with other last bits, for another number of rows; and so for
# another instruction set or number of threads. Every layer adds to that, and sums cancel, so a tensor, or the
# gradients of a model together, are held to the largest entry. Float32 under three instruction sets, two of
# them with 1 and 2 threads, 12 architectures: at most 3.5e-7 of it for values, 1.6e-6 for gradients.
IN_ANOTHER_BATCH = 1e-5


def assert_near(got, expected, message=""):
    """`got` is within the table of `expected`; NaN and infinities must sit in the same places."""
    relative, absolute = TABLE[got.dtype]
    torch.testing.assert_close(
        got.detach().double().cpu(),
        expected.detach().double().cpu(),
        rtol=relative,
        atol=absolute,
        equal_nan=True,
        msg=lambda text: f"{message}: {text}" if message else text,
    )


def assert_same(got, expected):
    """Of two kernels that compute the same: the same bits; on a GPU within the table. There each is compiled
    by itself, and last bits differ where one compilation makes a single instruction of a product and a sum
    and another does not.
    """
    if got.device.type == "cpu":
        assert torch.equal(got, expected), (got - expected).abs().max()
    else:
        assert_near(got, expected)


def assert_near_in_another_batch(got, expected, message=""):
    """`got`, a tensor, a list of numbers or {name: tensor}, is `expected` but for what another batch
    changes.
    """
    if not isinstance(got, dict):
        got, expected = {message: got}, {message: expected}
    assert sorted(got) == sorted(expected)
    got, expected = (
        {name: torch.as_tensor(x).detach().double() for name, x in part.items()} for part in (got, expected)
    )
    largest = max((x.abs().max().item() for x in expected.values() if x.numel()), default=0.0)
    for name, value in got.items():
        torch.testing.assert_close(
            value,
            expected[name],
            rtol=0,
            atol=IN_ANOTHER_BATCH * max(largest, 1e-3),
            msg=lambda text, name=name: f"{name}: {text}" if name else text,
        )
