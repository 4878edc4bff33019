"""value_loss of both critics, forward + backward: eager torch, torch.compile of it, this library.

Floor: for each critic three inputs of tokens are read and the gradient is written; the mask is read.
"""

import eager
import shapes
import torch
import versions

from saferlhf_fast import value_loss

OP = KIND = "value_loss"


def ours(impl):
    return lambda values, old_values, returns, mask: value_loss(
        values, old_values, returns, mask=mask, clip_value=eager.CLIP, impl=impl
    )[0].sum()


@versions.cases(OP, KIND, shapes.ROWS)
def test_forward_and_backward(measure, device, shape, version):
    mask, random = shapes.rows(shape, device)
    old_values = torch.stack([random(), random()])
    values, returns = old_values + 0.2 * torch.stack([random(), random()]), torch.stack([random(), random()])
    values.requires_grad_()
    function = versions.call({"eager": eager.value_loss, "ours": ours}, KIND, version, device)
    upstream = torch.rand((), device=device) + 0.5

    def step():
        loss = function(values, old_values, returns, mask)
        return loss.detach(), torch.autograd.grad(loss, values, upstream)[0]

    wide = values.detach().double().requires_grad_()
    loss = eager.value_loss(wide, old_values.double(), returns.double(), mask)
    measure.check(torch.float32, *zip(step(), (loss, torch.autograd.grad(loss, wide, upstream.double())[0])))
    measure(
        step,
        op="value_loss forward + backward",
        version=version,
        shape=shapes.name(shape),
        device=device,
        reads=3 * values.nbytes + mask.nbytes,
        writes=values.nbytes,
        inputs=(values, old_values, returns, mask),
        auto=versions.is_auto(OP, version, device),
    )
