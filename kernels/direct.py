"""Calls of the registered ops, past torch's dispatcher where nothing looks at what passes it.

Torch needs about 150 us to take a small op with an autograd formula in Python through its dispatcher and
back. Where nothing would see the op there, the same functions run as an autograd function, or as they are.
"""

from collections.abc import Callable
from typing import Any

import torch

from .first_order import Gradients

_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def _seen() -> bool:
    """Whether a mode, a transform, a trace or a profiler may look at the ops that are called."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def op(
    name: str,
    run: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Gradients] | None = None,
) -> Callable[..., Any]:
    """A function that calls an op of this library.

    The op itself is called under torch.compile, torch.func, modes, traces and profilers, and for tensors of
    other classes or on other devices than a CPU or a GPU.

    Args:
        name: The op's name, without the library's; the op is registered with the same functions.
        run: Its implementation. It is not differentiable, and does not return its inputs.
        setup: (ctx, inputs, output), as torch.library.register_autograd takes it; None for an op without a
            formula, whose inputs need no gradient.
        backward: (ctx, *upstream) -> a gradient or None for each input; None as `setup`.

    Returns:
        The function. It takes the op's arguments by position and returns what the op returns.
    """
    registered = getattr(torch.ops.saferlhf_fast, name).default
    differentiated = None if setup is None or backward is None else _function(name, run, setup, backward)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _seen():
            return registered(*arguments)
        needs_gradient = False
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                if type(argument) not in _ORDINARY or not (argument.is_cpu or argument.is_cuda):
                    return registered(*arguments)
                needs_gradient |= argument.requires_grad
        if needs_gradient and torch.is_grad_enabled():
            return registered(*arguments) if differentiated is None else differentiated.apply(*arguments)
        return run(*arguments)

    return call


def _function(
    name: str, run: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Gradients]
) -> Any:
    """The autograd function of an op; it has the op's name in graphs and messages."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = run(*arguments)
        setup(ctx, arguments, output)
        return output

    return type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )
