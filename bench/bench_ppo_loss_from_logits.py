"""ppo_loss_from_logits forward + backward: eager torch, ours (the gradient goes into the logits' memory), our
two separate ops, peers.

Floor: the logits are read once and their gradient is written once (2 passes); everyone else's data flow reads
them twice (3 passes). The logits are an intermediate result, as those of a model are, for only such may be
written over; what is written over is made anew outside the clock. The upstream gradient is 1, as it is where
`normalizer` counts micro-batches and ranks; another one, which costs ours a pass more, has rows of its own.
Liger's and fla's losses have one advantage per sequence: they get one for the whole batch, and are checked
against that.
"""

import eager
import exact
import shapes
import torch
import versions

import saferlhf_fast

OP, KIND = "ppo_loss_from_logits", "ppo_from_logits"
TWO_OPS = "token_logprob, then ppo_loss"


def ours(impl):
    return lambda logits, batch: saferlhf_fast.ppo_loss_from_logits(
        logits,
        batch.ids_N,
        batch.old_logp_N,
        batch.advantage_N,
        clip_ratio=shapes.CLIP,
        cu_seqlens=batch.cu_seqlens,
        impl=impl,
    )[0]


def two_ops(logits, batch):
    return saferlhf_fast.ppo_loss(
        saferlhf_fast.token_logprob(logits, batch.ids_N),
        batch.old_logp_N,
        batch.advantage_N,
        clip_ratio=shapes.CLIP,
        cu_seqlens=batch.cu_seqlens,
    )[0]


def forward_and_backward(measure, device, shape, version, op, upstream=None):
    """upstream: None for 1, or the number that the loss is multiplied with."""
    clean, ids, _ = shapes.logits(shape, device)
    logp, lse = exact.of_logits(shape, device)
    batch = shapes.batch(ids, logp)
    function = versions.call(
        {"eager": eager.ppo_from_logits, TWO_OPS: two_ops, "ours": ours}, KIND, version, device
    )
    is_ours = version in versions.ours(OP, device)
    inplace = versions.trait(KIND, version, "inplace", is_ours)
    source = clean._base if versions.trait(KIND, version, "spare_row", False) else clean
    logits = source.detach().requires_grad_() * 1
    factor = None if upstream is None else torch.tensor(upstream, device=device)

    def restore():
        with torch.no_grad():
            logits.copy_(source)

    def step():
        loss = function(logits, batch)
        return loss.detach(), torch.autograd.grad(
            loss, logits, factor if factor is None else factor.to(loss.dtype)
        )[0]

    rows = exact.rows_of(len(ids), device)
    derivative = exact.derivative(batch, logp, versions.trait(KIND, version, "means", "same")) * (
        upstream or 1
    )
    if inplace:  # a kernel that is tuned at its first call spoils what it writes in place
        step()
        restore()
    _, gradient = step()
    measure.check(clean.dtype, (gradient[rows], exact.logits_gradient(clean, ids, lse, derivative, rows)))
    if is_ours:
        assert gradient.data_ptr() == logits.data_ptr(), (
            "the gradient is not in the logits' memory: another path would be timed"
        )
    del gradient
    measure(
        step,
        op=op,
        version=version,
        shape=shapes.name(shape),
        device=device,
        reads=clean.nbytes,
        writes=clean.nbytes,
        dtype=clean.dtype,
        inputs=(logits,),
        before=restore if inplace else None,
        auto=versions.is_auto(OP, version, device),
    )


@versions.cases(OP, KIND, shapes.LOGITS, others=("eager", TWO_OPS), backward=True)
def test_forward_and_backward(measure, device, shape, version):
    forward_and_backward(measure, device, shape, version, "ppo_loss_from_logits forward + backward")


@versions.cases(OP, "", shapes.LOGITS, backward=True)
def test_forward_and_backward_with_an_upstream_gradient(measure, device, shape, version):
    forward_and_backward(
        measure, device, shape, version, "ppo_loss_from_logits forward + backward, upstream 0.7", 0.7
    )
