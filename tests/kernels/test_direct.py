"""Calls past torch's dispatcher (kernels/direct.py): the same bits as through it, and through it wherever
something looks at the ops that pass.
"""

import pytest
import torch
from op_table import TABLE, call, inputs_of
from torch.utils._python_dispatch import TorchDispatchMode

import saferlhf_fast
from saferlhf_fast.kernels import dispatch

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(dispatch.interpreted(), reason="the same above every implementation"),
]


class Seen(TorchDispatchMode):
    """Notes which ops pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.append(function.name())
        return function(*arguments, **(named or {}))


class Other(torch.Tensor):
    """A tensor of another class, which notes the op that it passes, and has no implementation of any."""

    names: list = []

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        cls.names.append(function.name())
        return NotImplemented


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("op", TABLE)
def test_same_bits_and_who_looks_is_heard(op, learns, monkeypatch):
    name, gradients = f"saferlhf_fast::{op}", TABLE[op][3]
    if not learns:
        gradients = ()
        monkeypatch.setitem(TABLE, op, (*TABLE[op][:3], ()))
    plain = call(op, inputs_of(op))
    with Seen() as seen:
        through = call(op, inputs_of(op))
    assert name in seen.names
    for one, two in zip([*plain[0], *plain[1]], [*through[0], *through[1]], strict=True):
        assert torch.equal(one, two)
    given = {key: x.requires_grad_() if key in gradients else x for key, x in inputs_of(op).items()}

    def run():
        return first(getattr(saferlhf_fast, op)(**given, **TABLE[op][2]))

    node = run().grad_fn
    while node is not None and op not in type(node).__name__:
        node = node.next_functions[0][0]
    assert (node is not None) == bool(gradients)
    assert node is None or type(node).__name__ == f"{op}Backward"  # not torch's "GeneratedBackwardFor_..."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    assert name in {event.key for event in profile.key_averages()}
    # A fake tensor for each argument: shapes alone, nothing is computed.
    meta = {key: x.detach().to("meta") for key, x in given.items()}
    assert first(getattr(saferlhf_fast, op)(**meta, **TABLE[op][2])).is_meta


def test_other_classes_go_through_the_dispatcher():
    given = inputs_of("gae")
    Other.names.clear()
    other = given["values"].as_subclass(Other)
    with pytest.raises(TypeError, match="returned NotImplemented"):
        saferlhf_fast.gae(**{**given, "values": other}, gamma=0.9, lam=0.8)
    assert Other.names == ["saferlhf_fast::gae"]
    parameter = torch.nn.Parameter(torch.randn(3, 7))
    logp = saferlhf_fast.token_logprob(parameter, torch.arange(3))
    assert type(logp.grad_fn).__name__ == "token_logprobBackward"


@pytest.mark.parametrize("op", TABLE)
def test_modes_of_autograd(op):
    """no_grad and inference_mode give no history and the same numbers; saved tensors pass hooks."""
    gradients = TABLE[op][3]
    expected = call(op, inputs_of(op))
    given = {key: x.requires_grad_() if key in gradients else x for key, x in inputs_of(op).items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = first(getattr(saferlhf_fast, op)(**given, **TABLE[op][2]))
        assert torch.equal(got, expected[0][0]) and not got.requires_grad
    if gradients:
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
            result = getattr(saferlhf_fast, op)(**given, **TABLE[op][2])
        assert packed
        parts = [x for x in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(x)]
        made = torch.autograd.grad(sum(x.sum() for x in parts), [given[key] for key in gradients])
        for one, two in zip(made, expected[1], strict=True):
            assert torch.equal(one, two)
