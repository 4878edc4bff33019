"""linear_logprob: forward without gradient, and forward + backward with a random upstream gradient per token.

Floor: one matrix product of 2 N H V operations forward, and four of them forward + backward (the logits are
computed again); or the bytes of hidden, weight and their gradients, if those take longer.
"""

import eager
import exact
import shapes
import torch
import versions

import saferlhf_fast

OP = KIND = "linear_logprob"


def ours(impl):
    return lambda hidden, weight, ids: saferlhf_fast.linear_logprob(hidden, weight, ids, impl=impl)


OWN = {"eager": eager.linear_logprob, "ours": ours}


def product(shape):
    tokens, width, vocabulary, _ = shape
    return 2 * tokens * width * vocabulary


@versions.cases(OP, KIND, shapes.LINEAR)
def test_forward(measure, device, shape, version):
    hidden, weight, ids, _ = shapes.linear(shape, device)
    function = versions.call(OWN, KIND, version, device)
    with torch.no_grad():
        measure.check(hidden.dtype, (function(hidden, weight, ids), exact.of_linear(shape, device)[0]))
        measure(
            lambda: function(hidden, weight, ids),
            op="linear_logprob forward",
            version=version,
            shape=shapes.name(shape),
            device=device,
            reads=hidden.nbytes + weight.nbytes,
            flops=product(shape),
            dtype=hidden.dtype,
            inputs=(hidden, weight, ids),
            auto=versions.is_auto(OP, version, device),
        )


@versions.cases(OP, KIND, shapes.LINEAR, backward=True)
def test_forward_and_backward(measure, device, shape, version):
    hidden, weight, ids, upstream = shapes.linear(shape, device)
    function = versions.call(OWN, KIND, version, device)
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()

    def step():
        logp = function(*leaves, ids)
        return logp.detach(), *torch.autograd.grad(logp, leaves, upstream)

    rows, columns = exact.rows_of(len(ids), device), exact.columns_of(ids, len(weight))
    right, lse = exact.of_linear(shape, device)
    d_hidden, d_weight = exact.linear_gradients(hidden, weight, ids, lse, upstream, rows, columns)
    logp, got_hidden, got_weight = step()
    measure.check(hidden.dtype, (logp, right), (got_hidden[rows], d_hidden), (got_weight[columns], d_weight))
    del logp, got_hidden, got_weight
    moved = hidden.nbytes + weight.nbytes
    measure(
        step,
        op="linear_logprob forward + backward",
        version=version,
        shape=shapes.name(shape),
        device=device,
        reads=moved,
        writes=moved,
        flops=4 * product(shape),
        dtype=hidden.dtype,
        inputs=(*leaves, ids),
        auto=versions.is_auto(OP, version, device),
    )
