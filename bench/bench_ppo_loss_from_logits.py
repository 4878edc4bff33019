"""ppo_loss_from_logits forward + backward: eager torch, ours (the gradient goes into the logits' memory), our two separate
ops, peers.

Floor: the logits are read once and their gradient is written once (2 passes); everyone else's data flow reads them twice
(3 passes). Liger's and fla's losses have one advantage per sequence: they get one for the whole batch, and are checked against
that.
"""

import torch

import eager
import exact
import saferlhf_fast
import shapes
import versions

OP, KIND = "ppo_loss_from_logits", "ppo_from_logits"
TWO_OPS = "token_logprob, then ppo_loss"


def ours(impl):
    return lambda logits, batch: saferlhf_fast.ppo_loss_from_logits(
        logits, batch.ids_N, batch.old_logp_N, batch.advantage_N, clip_ratio=shapes.CLIP, cu_seqlens=batch.cu_seqlens,
        impl=impl)[0]


def two_ops(logits, batch):
    return saferlhf_fast.ppo_loss(saferlhf_fast.token_logprob(logits, batch.ids_N), batch.old_logp_N, batch.advantage_N,
                                  clip_ratio=shapes.CLIP, cu_seqlens=batch.cu_seqlens)[0]


@versions.cases(OP, KIND, shapes.LOGITS, others=("eager", TWO_OPS), backward=True)
def test_forward_and_backward(measure, device, shape, version):
    clean, ids, _ = shapes.logits(shape, device)
    logp, lse = exact.of_logits(shape, device)
    batch = shapes.batch(ids, logp)
    function = versions.call({"eager": eager.ppo_from_logits, TWO_OPS: two_ops, "ours": ours}, KIND, version, device)
    inplace = versions.trait(KIND, version, "inplace", version in versions.ours(OP, device))
    source = clean._base if versions.trait(KIND, version, "spare_row", False) else clean
    leaf = (source.clone() if inplace else source.detach()).requires_grad_()
    upstream = torch.rand((), device=device) + 0.5

    def restore():
        with torch.no_grad():
            leaf.copy_(source)

    def step():
        loss = function(leaf.view_as(leaf), batch)      # no leaf, as the logits of a model are none
        return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]

    rows = exact.rows_of(len(ids), device)
    derivative = exact.derivative(batch, logp, versions.trait(KIND, version, "means", "same")) * upstream
    if inplace:     # a kernel that is tuned at its first call spoils what it writes in place
        step()
        restore()
    _, gradient = step()
    measure.check(clean.dtype, (gradient[rows], exact.logits_gradient(clean, ids, lse, derivative, rows)))
    del gradient
    measure(step, op="ppo_loss_from_logits forward + backward", version=version, shape=shapes.name(shape), device=device,
            reads=clean.nbytes, writes=clean.nbytes, dtype=clean.dtype, inputs=(leaf,), before=restore if inplace else None,
            auto=versions.is_auto(OP, version, device))
