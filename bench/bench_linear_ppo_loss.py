"""linear_ppo_loss forward + backward: eager torch (all logits), this library, peers, bare products.

Floor: three matrix products (logits, the gradients of hidden and weight). "bare products" are these three
without anything between them, on the same data, with all logits in memory. Losses that are the mean of a
cross-entropy do less: no old log-probs, no clip; they are included because they have the same products.
Losses with one advantage per sequence get one for the whole batch. Each is checked against the gradient of
its own formula.
"""

import eager
import exact
import shapes
import torch
import versions
from bench_linear_logprob import product

import saferlhf_fast

OP, KIND, BARE = "linear_ppo_loss", "linear_ppo", "bare products"


def ours(impl):
    return lambda hidden, weight, batch: saferlhf_fast.linear_ppo_loss(
        hidden,
        weight,
        batch.ids_N,
        batch.old_logp_N,
        batch.advantage_N,
        clip_ratio=shapes.CLIP,
        cu_seqlens=batch.cu_seqlens,
        impl=impl,
    )[0]


def bare(hidden, weight):
    """Computes logits, then the gradients of hidden and weight as if the logits were their own gradient."""
    logits = hidden @ weight.T
    return logits @ weight, logits.T @ hidden


@versions.cases(OP, KIND, shapes.LINEAR_LOSS, others=("eager", BARE), backward=True)
def test_forward_and_backward(measure, device, shape, version):
    hidden, weight, ids, _ = shapes.linear(shape, device)
    moved = hidden.nbytes + weight.nbytes
    row = dict(
        op="linear_ppo_loss forward + backward",
        version=version,
        shape=shapes.name(shape),
        device=device,
        reads=moved,
        writes=moved,
        flops=3 * product(shape),
        dtype=hidden.dtype,
        auto=versions.is_auto(OP, version, device),
    )
    rows = exact.rows_of(len(ids), device)
    if version == BARE:
        wide = weight.double()
        measure.check(hidden.dtype, (bare(hidden, weight)[0][rows], hidden[rows].double() @ wide.T @ wide))
        measure(lambda: bare(hidden, weight), inputs=(hidden, weight), **row)
        return
    logp, lse = exact.of_linear(shape, device)
    batch = shapes.batch(ids, logp)
    function = versions.call({"eager": eager.linear_ppo, "ours": ours}, KIND, version, device)
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    upstream = torch.full((), 0.7, device=device)

    def step():
        loss = function(*leaves, batch)
        return loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))

    derivative = exact.derivative(batch, logp, versions.trait(KIND, version, "means", "same")) * upstream
    columns = exact.columns_of(ids, len(weight))
    right = exact.linear_gradients(hidden, weight, ids, lse, derivative, rows, columns)
    _, d_hidden, d_weight = step()
    measure.check(hidden.dtype, (d_hidden[rows], right[0]), (d_weight[columns], right[1]))
    del d_hidden, d_weight
    measure(step, inputs=(*leaves, ids), **row)
