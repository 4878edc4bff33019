"""token_logprob: forward, forward with entropy, forward + backward; eager torch, this library, peers.

Floor: the forward reads the logits once; forward + backward reads them twice and writes the gradient once.
"""

import eager
import exact
import shapes
import torch
import versions

from saferlhf_fast import token_logprob

OP = "token_logprob"


def ours(impl):
    return lambda logits, ids: token_logprob(logits, ids, impl=impl)


def ours_entropy(impl):
    return lambda logits, ids: token_logprob(logits, ids, return_entropy=True, impl=impl)


def forward(measure, device, shape, version, kind, own, op):
    logits, ids, _ = shapes.logits(shape, device)
    function = versions.call(own, kind, version, device)
    given = logits._base if versions.trait(kind, version, "spare_row", False) else logits
    rows = exact.rows_of(len(ids), device)
    right = exact.of_logits(shape, device)[0]
    with torch.no_grad():
        outputs = function(given, ids)
        pairs = (
            [(outputs, right)]
            if kind == "logprob"
            else [(outputs[0], right), (outputs[1][rows], exact.entropy_rows(logits, rows))]
        )
        measure.check(logits.dtype, *pairs)
        del outputs
        measure(
            lambda: function(given, ids),
            op=op,
            version=version,
            shape=shapes.name(shape),
            device=device,
            reads=logits.nbytes,
            dtype=logits.dtype,
            inputs=(logits, ids),
            auto=versions.is_auto(OP, version, device),
        )


@versions.cases(OP, "logprob", shapes.LOGITS)
def test_forward(measure, device, shape, version):
    forward(
        measure,
        device,
        shape,
        version,
        "logprob",
        {"eager": eager.logprob, "ours": ours},
        "token_logprob forward",
    )


@versions.cases(OP, "logprob_entropy", shapes.LOGITS)
def test_forward_with_entropy(measure, device, shape, version):
    forward(
        measure,
        device,
        shape,
        version,
        "logprob_entropy",
        {"eager": eager.logprob_entropy, "ours": ours_entropy},
        "token_logprob + entropy forward",
    )


@versions.cases(OP, "logprob", shapes.LOGITS, backward=True)
def test_forward_and_backward(measure, device, shape, version):
    clean, ids, upstream = shapes.logits(shape, device)
    function = versions.call({"eager": eager.logprob, "ours": ours}, "logprob", version, device)
    inplace = versions.trait("logprob", version, "inplace", False)
    logits = (clean.clone() if inplace else clean.detach()).requires_grad_()

    def restore():
        with torch.no_grad():
            logits.copy_(clean)

    def step():
        logp = function(logits, ids)
        return logp.detach(), torch.autograd.grad(logp, logits, upstream)[0]

    rows = exact.rows_of(len(ids), device)
    logp, lse = exact.of_logits(shape, device)
    if inplace:  # autotuning at the first call spoils data that is written in place
        step()
        restore()
    got_logp, gradient = step()
    measure.check(
        clean.dtype,
        (got_logp, logp),
        (gradient[rows], exact.logits_gradient(clean, ids, lse, upstream, rows)),
    )
    del got_logp, gradient
    measure(
        step,
        op="token_logprob forward + backward",
        version=version,
        shape=shapes.name(shape),
        device=device,
        reads=2 * clean.nbytes,
        writes=clean.nbytes,
        dtype=clean.dtype,
        inputs=(logits, ids),
        before=restore if inplace else None,
        auto=versions.is_auto(OP, version, device),
    )
