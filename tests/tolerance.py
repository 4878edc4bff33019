"""How wrong an op may be, against float64 on the same inputs: the one table. No test and no machine has its own.

The key is the dtype of the result. An op in float32 is held to the float32 row whichever implementation runs. Below the table are
the two places where a GPU is not asked for what a CPU and Triton's interpreter give.
"""

import torch

# dtype: (relative, absolute). bfloat16 and float16 hold for gradients written in the dtype of the logits: half an ulp.
TABLE = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2 ** -8, 1e-5),
    torch.float16: (2 ** -11, 1e-5),
}
# Device: relative error of one function of a number, also where it is nearly 0. A GPU's exp2 and its division are approximate, by
# two units in the last place; what is left after a subtraction near 0 has a few times that.
FUNCTION = {"cpu": 2e-6, "cuda": 4e-6}


def assert_near(got, expected, message=""):
    """`got` is within the table of `expected`; NaN and infinities must sit in the same places."""
    relative, absolute = TABLE[got.dtype]
    torch.testing.assert_close(got.detach().double().cpu(), expected.detach().double().cpu(), rtol=relative, atol=absolute,
                               equal_nan=True, msg=lambda text: f"{message}: {text}" if message else text)


def assert_same(got, expected):
    """Of two kernels that compute the same: the same bits; on a GPU within the table. There each is compiled by itself, and last
    bits differ where one compilation makes a single instruction of a product and a sum and another does not."""
    if got.device.type == "cpu":
        assert torch.equal(got, expected), (got - expected).abs().max()
    else:
        assert_near(got, expected)
