"""ppo_lag_advantage: safe-rlhf's way, this library, and chunked products.

safe-rlhf's way is shaping, two Python loops over T, and the combination.

Floor: four inputs of tokens are read, three outputs written, and the mask is read. This library also computes
the whitening statistics.
"""

import eager
import shapes
import torch
import versions

from saferlhf_fast import ppo_lag_advantage

OP, KIND = "ppo_lag_advantage", "advantage"


def ours(impl):
    return lambda *inputs: ppo_lag_advantage(
        *inputs[:-1],
        mask=inputs[-1],
        kl_coeff=eager.KL,
        gamma=eager.GAMMA,
        lam=eager.LAM,
        clip_score=eager.CLIP_SCORE,
        impl=impl,
    )


@versions.cases(OP, KIND, shapes.ROWS)
def test_forward(measure, device, shape, version):
    mask, random = shapes.rows(shape, device)
    tokens = [random() for _ in range(4)]
    reward, cost = random()[:, 0].contiguous(), random()[:, 0].contiguous()
    inputs = (*tokens[:2], reward, cost, *tokens[2:], torch.tensor(1.5, device=device), mask)
    function = versions.call({"eager": eager.advantage_loop, "ours": ours}, KIND, version, device)
    exact = eager.advantage_loop(
        *(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)
    )
    measure.check(torch.float32, *zip(function(*inputs)[:3], exact))
    measure(
        lambda: function(*inputs),
        op="ppo_lag_advantage",
        version=version,
        shape=shapes.name(shape),
        device=device,
        reads=4 * tokens[0].nbytes + mask.nbytes,
        writes=3 * tokens[0].nbytes,
        inputs=inputs,
        auto=versions.is_auto(OP, version, device),
    )
