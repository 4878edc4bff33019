"""The actor's causal LM with whole weights, for as long as it generates.

Under ZeRO-3 the weights are gathered once, and a twin of the model that shares them generates: DeepSpeed's
hooks, which gather for each layer and let go again, stay with the model itself. So ranks need not keep step,
token by token.
"""

import contextlib
import copy
from collections import OrderedDict

import torch

from ...runtime import engine

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
def whole(actor, gather=True):
    """Context with the causal LM of an Engine or a Frozen, in evaluation mode. Every rank must enter it.

    gather: False leaves sharded weights sharded; every forward pass is then a collective.
    """
    lm = actor.module.lm
    lm.train(False)
    if not actor.sharded or not gather:
        yield lm
        return
    with engine.gathered(actor.module, True):
        made = weight_sharing_copy(lm)
        try:
            yield made
        finally:
            for parameter in made.parameters():  # DeepSpeed lets go of its own reference alone
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def weight_sharing_copy(module):
    """A copy of a module that shares its weights' and buffers' memory and has no hooks; its weights take no
    gradient.
    """
    shared = {}
    for part in module.modules():
        for buffer in part._buffers.values():
            shared[id(buffer)] = buffer
        for name in HOOKS:  # not copied: they would bring DeepSpeed's engine along
            shared[id(getattr(part, name))] = OrderedDict()
    for parameter in module.parameters():
        shared[id(parameter)] = torch.nn.Parameter(parameter.data, requires_grad=False)
    for part in module.modules():  # plain dicts: DeepSpeed's would gather
        shared[id(part._parameters)] = {
            name: shared.get(id(parameter)) for name, parameter in part._parameters.items()
        }
    return copy.deepcopy(module, shared)
