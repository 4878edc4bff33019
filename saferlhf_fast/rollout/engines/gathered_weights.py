"""The actor's causal LM with gathered weights, for as long as it generates.

Under ZeRO-3 the weights are gathered once, and a weight-sharing copy of the model generates: DeepSpeed's
hooks, which gather and release the weights of each layer, stay with the model itself. So ranks need not
generate in step, token by token.
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ...runtime import engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from . import SamplingActor

Module = TypeVar("Module", bound=torch.nn.Module)

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextlib.contextmanager
def gathered_lm(actor: "SamplingActor", gather: bool = True) -> "Iterator[PreTrainedModel]":
    """Context with the causal LM of an actor, in evaluation mode. Every rank must enter it.

    Args:
        actor: Holds a Policy.
        gather: False leaves sharded weights sharded; every forward pass is then a collective.

    Yields:
        The causal LM, which peft may wrap.
    """
    lm = actor.module.lm
    lm.train(False)
    if not actor.sharded or not gather:
        yield lm
        return
    with engine.gathered(actor.module, True):
        sharing_lm = weight_sharing_copy(lm)
        try:
            yield sharing_lm
        finally:
            for parameter in sharing_lm.parameters():  # DeepSpeed releases its own reference alone
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def weight_sharing_copy(module: Module) -> Module:
    """A copy of a module that shares the memory of its weights and buffers.

    It has no hooks, and its weights take no gradient.
    """
    shared: dict[int, Any] = {}
    for submodule in module.modules():
        for buffer in submodule._buffers.values():
            shared[id(buffer)] = buffer
        for name in HOOKS:  # not copied: they would bring DeepSpeed's engine along
            shared[id(getattr(submodule, name))] = OrderedDict()
    for parameter in module.parameters():
        shared[id(parameter)] = torch.nn.Parameter(parameter.data, requires_grad=False)
    for submodule in module.modules():  # plain dicts: DeepSpeed's would gather
        shared[id(submodule._parameters)] = {
            name: shared.get(id(parameter)) for name, parameter in submodule._parameters.items()
        }
    return copy.deepcopy(module, shared)
