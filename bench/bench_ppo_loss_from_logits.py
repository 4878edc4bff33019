"""ppo_loss_from_logits forward + backward: eager torch, this library, its two separate ops, peers.

This library writes the gradient into the logits' memory. Floor: the logits are read once and their gradient
is written once (2 passes); all others read them twice (3 passes). The logits are an intermediate result, like
those of a model, because only such a tensor may be overwritten; overwritten logits are created again outside
the timed part. The upstream gradient is 1, as in a trainer where `normalizer` counts micro-batches and ranks.
Another upstream gradient costs this library one more pass and has rows of its own. Liger's and fla's losses
have one advantage per sequence: they get one for the whole batch, and are checked against that formula.
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
    """Checks and times one version. upstream: None for 1, or the number that multiplies the loss."""
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
    if inplace:  # autotuning at the first call spoils data that is written in place
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
