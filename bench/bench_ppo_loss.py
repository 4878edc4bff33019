"""ppo_loss forward + backward: the formula in eager torch with autograd, torch.compile of it, this library.

Floor: three inputs of tokens are read, the gradient is written, and the mask is read.
"""

import eager
import shapes
import torch
import versions

from saferlhf_fast import ppo_loss

OP = KIND = "ppo_loss"


def ours(impl):
    return lambda logp, old_logp, advantages, mask: ppo_loss(
        logp, old_logp, advantages, mask=mask, clip_ratio=eager.CLIP, impl=impl
    )[0]


@versions.cases(OP, KIND, shapes.ROWS)
def test_forward_and_backward(measure, device, shape, version):
    mask, random = shapes.rows(shape, device)
    logp, advantages = random() - 2, random()
    old_logp = logp + 0.2 * random()
    logp.requires_grad_()
    function = versions.call({"eager": eager.ppo_loss, "ours": ours}, KIND, version, device)
    upstream = torch.rand((), device=device) + 0.5

    def step():
        loss = function(logp, old_logp, advantages, mask)
        return loss.detach(), torch.autograd.grad(loss, logp, upstream)[0]

    wide = logp.detach().double().requires_grad_()
    loss = eager.ppo_loss(wide, old_logp.double(), advantages.double(), mask)
    measure.check(torch.float32, *zip(step(), (loss, torch.autograd.grad(loss, wide, upstream.double())[0])))
    measure(
        step,
        op="ppo_loss forward + backward",
        version=version,
        shape=shapes.name(shape),
        device=device,
        reads=3 * logp.nbytes + mask.nbytes,
        writes=logp.nbytes,
        inputs=(logp, old_logp, advantages, mask),
        auto=versions.is_auto(OP, version, device),
    )
