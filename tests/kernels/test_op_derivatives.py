"""One table, op x derivative: first derivatives alone, none for what has none, no memory that nobody asked
for, and nobody's parameter written over.
"""

import weakref

import pytest
import torch
from op_table import INTERPRETED, PLACES, TABLE, T, Through, V, call, inputs_of
from tolerance import assert_near
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import saferlhf_fast

pytestmark = pytest.mark.numeric


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize("op", [op for op in TABLE if TABLE[op][3]])
def test_first_derivatives_alone(op, impl, device):
    """create_graph=True gives the same gradients; what would have differentiated them again without a word
    says so.
    """
    expected = call(op, inputs_of(op), impl)[1]
    given = inputs_of(op)
    leaves = {name: given[name].requires_grad_() for name in TABLE[op][3]}
    result = getattr(saferlhf_fast, op)(**given, **TABLE[op][2], impl=impl)
    outputs = [part for part in result if torch.is_tensor(part)] if isinstance(result, tuple) else [result]
    total = sum(output.sum() for output in outputs)
    gradients = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, expected))
    for gradient in gradients:  # asked for by .backward(), and by each input, whatever else depends on it
        with pytest.raises(RuntimeError, match=f"^{op} has first derivatives alone"):
            gradient.square().sum().backward(retain_graph=True)
        for leaf in leaves.values():
            with pytest.raises(RuntimeError, match=f"^{op} has first derivatives alone"):
                torch.autograd.grad(total + gradient.square().sum(), leaf, retain_graph=True)
            with pytest.raises(RuntimeError, match=f"^{op} has first derivatives alone"):
                (total + gradient.square().sum()).backward(inputs=[leaf], retain_graph=True)
    # One input that needs no gradient among others: nothing is mixed up.
    first = next(iter(leaves))
    result = getattr(saferlhf_fast, op)(**{**given, first: leaves[first].detach()}, **TABLE[op][2], impl=impl)
    for name in list(leaves)[1:]:
        output = (result[0] if isinstance(result, tuple) else result).sum()
        (alone,) = torch.autograd.grad(output, leaves[name], retain_graph=True)
        assert torch.equal(torch.autograd.grad(output, leaves[name], create_graph=True)[0], alone)


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("op", [op for op in TABLE if TABLE[op][3]])
def test_other_derivatives(op):
    """Forward mode and torch.func's transforms are refused, never 0; torch.vmap gives what a loop gives,
    gradients too.
    """
    for name in TABLE[op][3]:
        given = inputs_of(op)

        def run(tensor):
            return first(getattr(saferlhf_fast, op)(**{**given, name: tensor}, **TABLE[op][2])).sum()  # noqa: B023

        tangent = torch.ones_like(given[name])
        for way in (torch.func.jvp, lambda run, at, _: torch.func.jacfwd(run)(*at)):
            with pytest.raises(RuntimeError, match=f"^{op} has no forward-mode derivative"):
                way(run, (given[name],), (tangent,))
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(RuntimeError, match="no forward-mode derivative"),
        ):
            run(torch.autograd.forward_ad.make_dual(given[name].clone(), tangent))
        for way in (torch.func.grad(run), torch.func.jacrev(run), torch.func.hessian(run)):
            with pytest.raises(RuntimeError):
                way(given[name].clone())
        with pytest.raises(RuntimeError, match="first derivatives alone"):
            torch.autograd.functional.hvp(run, given[name].clone(), tangent)
        two = torch.stack([given[name], given[name].flip(0)]).requires_grad_()
        for factor in (None, 1):  # of a leaf, and of what may be written over
            expected = torch.stack([run(row.clone()) for row in two])
            got = torch.vmap(run)(two if factor is None else two * factor)
            assert_near(got, expected)  # torch's sums, over rows of another number
            with pytest.raises(RuntimeError, match=f"^{op} has first derivatives alone"):
                torch.autograd.grad(got.sum(), two, create_graph=True, retain_graph=True)
            assert torch.equal(
                torch.autograd.grad(got.sum(), two)[0], torch.autograd.grad(expected.sum(), two)[0]
            )


class Made(TorchDispatchMode):
    """Bytes that the calls of torch made, views and results in place left out. On a CPU zeros cost no
    resident memory until they are written, on a device they cost the allocation and a pass over it.
    """

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        given = {
            part.untyped_storage().data_ptr()
            for part in tree_leaves((arguments, named))
            if torch.is_tensor(part)
        }
        self.bytes += sum(
            part.nbytes
            for part in tree_leaves(result)
            if torch.is_tensor(part) and part.untyped_storage().data_ptr() not in given
        )
        return result


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("impl, device", PLACES)
@pytest.mark.parametrize(
    "op, options",
    [*((op, {}) for op in TABLE if TABLE[op][3]), ("ppo_loss_from_logits", dict(inplace=False))],
)
def test_backward_makes_the_gradients_and_nothing_of_their_size(op, options, impl, device):
    """No zeros for outputs that nobody differentiates: d weight is 2 GB at V = 128256 and H = 4096."""
    given = inputs_of(op)
    leaves = {name: given[name].requires_grad_() for name in TABLE[op][3]}
    through = {name: Through.apply(leaf) for name, leaf in leaves.items()}
    output = first(getattr(saferlhf_fast, op)(**{**given, **through}, **TABLE[op][2], **options, impl=impl))
    upstream = torch.ones_like(output)
    with Made() as made:
        gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    written = sum(gradient.nbytes for gradient in gradients)
    if op == "ppo_loss_from_logits" and not options:  # in the logits' memory
        written = 0
    assert written <= made.bytes <= written + 16  # and scalars: the upstream gradient times 1/Z


class Nothing(torch.autograd.Function):
    """Gives no gradient back, not even zeros."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("op", [op for op in TABLE if TABLE[op][3]])
def test_no_upstream_gradient_gives_none(op, create_graph):
    given = inputs_of(op)
    leaves = [given[name].requires_grad_() for name in TABLE[op][3]]
    loss = Nothing.apply(first(getattr(saferlhf_fast, op)(**given, **TABLE[op][2]))).sum()
    assert torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True) == (None,) * len(
        leaves
    )


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "linear_ppo_loss", "ppo_loss_from_logits"])
def test_what_makes_its_gradient_in_forward_keeps_no_input(op):
    """To refuse second derivatives the inputs' history is remembered, not their memory."""
    given, name = inputs_of(op), TABLE[op][3][0]
    given[name] = given[name].requires_grad_() * 1
    held = weakref.ref(given[name])
    loss = first(
        getattr(saferlhf_fast, op)(
            **given, **TABLE[op][2], **({"inplace": False} if "logits" in given else {})
        )
    )
    del given
    assert loss.requires_grad and held() is None


@pytest.mark.skipif(INTERPRETED, reason="the same above every implementation")
@pytest.mark.parametrize("impl, device", PLACES)
def test_nobodys_parameter_is_written_over(impl, device):
    """A table of logits that is a Parameter: no view of it may hold a gradient afterwards."""
    given = {name: tensor[0] for name, tensor in inputs_of("ppo_loss_from_logits").items() if name != "mask"}
    views = (
        lambda p: p[0],
        lambda p: p.view(2, T, V)[0],
        lambda p: p[None][0, 0],
        lambda p: p.unbind(0)[0][:, :],
        lambda p: p[0, :T],
    )
    for view in views:
        table = torch.nn.Parameter(torch.stack([given["logits"], given["logits"]]))
        before = table.detach().clone()
        loss, _ = saferlhf_fast.ppo_loss_from_logits(
            **{**given, "logits": view(table)}, clip_ratio=0.2, kl_coeff=0.1, impl=impl
        )
        (made,) = torch.autograd.grad(loss, table)
        (
            -saferlhf_fast.token_logprob(view(table), given["ids"], inplace_backward=True, impl=impl).sum()
        ).backward()
        assert torch.equal(table, before)
        safe, _ = saferlhf_fast.ppo_loss_from_logits(
            **{**given, "logits": view(table)}, clip_ratio=0.2, kl_coeff=0.1, inplace=False, impl=impl
        )
        assert torch.equal(made, torch.autograd.grad(safe, table)[0])
    # What is no parameter is written over: nothing above passes because nothing ever is.
    logits = given["logits"].clone().requires_grad_() * 1
    before = logits.detach().clone()
    saferlhf_fast.ppo_loss_from_logits(**{**given, "logits": logits}, clip_ratio=0.2, kl_coeff=0.1, impl=impl)
    assert not torch.equal(logits, before)
