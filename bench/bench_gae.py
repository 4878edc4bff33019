"""gae: a Python loop over T (safe-rlhf, verl, TRL), this library, the chunked product, torchrl's convolution.

The chunked product is one with a lower-triangular matrix. Floor: two inputs are read, two outputs written,
and the mask is read.
"""

import eager
import shapes
import torch
import versions

from saferlhf_fast import gae

OP = KIND = "gae"


def ours(impl):
    return lambda rewards, values, mask: gae(
        rewards, values, mask=mask, gamma=eager.GAMMA, lam=eager.LAM, impl=impl
    )


@versions.cases(OP, KIND, shapes.ROWS)
def test_forward(measure, device, shape, version):
    mask, random = shapes.rows(shape, device)
    rewards, values = random(), random()
    function = versions.call({"eager": eager.gae_loop, "ours": ours}, KIND, version, device)
    exact = eager.gae_loop(rewards.double(), values.double(), mask)
    measure.check(torch.float32, *zip(function(rewards, values, mask), exact))
    measure(
        lambda: function(rewards, values, mask),
        op="gae",
        version=version,
        shape=shapes.name(shape),
        device=device,
        reads=2 * rewards.nbytes + mask.nbytes,
        writes=2 * rewards.nbytes,
        inputs=(rewards, values, mask),
        auto=versions.is_auto(OP, version, device),
    )
