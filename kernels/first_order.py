"""A guard that makes second derivatives an error: the ops have first derivatives only.

An op's backward pass is kernels that autograd does not see. Under create_graph=True its gradients would look
like constants, and a derivative of them would be wrong without a message: a penalty on a gradient would weigh
nothing, a Hessian would be 0.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

Gradients = tuple[torch.Tensor | None, ...]


def _traced() -> bool:
    """True while torch.compile or a torch.func transform traces; they have rules of their own."""
    return torch.compiler.is_compiling() or transformed()


def transformed() -> bool:
    """True inside torch.vmap, torch.func.grad or another transform of torch.func."""
    return torch._C._functorch.maybe_current_level() is not None


def learns(tensor: torch.Tensor | None) -> bool:
    """True if a gradient of the tensor is wanted.

    Under torch.vmap a row of a tensor does not know; the tensor that it is taken from does.
    """
    if tensor is None or not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling():
        while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def refuse_tangents(op: str, *inputs: torch.Tensor | None) -> None:
    """Refuses inputs with a tangent of forward-mode differentiation, which the op would lose.

    Args:
        op: The op's name in messages.
        inputs: The op's differentiable inputs, of any shape; None is left out.

    Raises:
        RuntimeError: An input has a tangent.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
        raise RuntimeError(
            f"{op} has no forward-mode derivative (jvp, jacfwd, dual tensors): expected inputs without a "
            "tangent; backward() and torch.autograd.grad work"
        )


def track_inputs(output: torch.Tensor, *inputs: torch.Tensor | None) -> None:
    """Notes on an op's output which inputs it is differentiated by; `first_order_only` reads the note.

    The note holds empty tensors with the inputs' history, which take no memory.

    Args:
        output: The op's output, of any shape.
        inputs: The op's differentiable inputs; None and those without gradient are left out.
    """
    if not _traced() and output.grad_fn is not None:
        node: Any = output.grad_fn  # typed as a node without attributes
        node.sources = [
            torch.narrow_copy(tensor, 0, 0, 0)
            for tensor in inputs
            if tensor is not None and tensor.requires_grad
        ]


def first_order_only(op: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """A decorator for an op's backward function: its gradients cannot be differentiated again.

    Under create_graph=True the gradients have the same values, and depend on the inputs that `track_inputs`
    noted and on the upstream gradients, so that to differentiate them again is an error.
    (torch.autograd.function.once_differentiable sees the upstream gradients alone.) While torch.compile or a
    torch.func transform traces, nothing is changed.

    Args:
        op: The op's name in messages.

    Returns:
        The decorator. It takes and returns a function (ctx, *upstream gradients) -> gradients or None of each
        input, whose gradients raise RuntimeError when they are differentiated. Under create_graph=True the
        function itself raises it if there is no note of the inputs, as under torch.vmap.
    """
    message = f"{op} has first derivatives alone: its gradient cannot be differentiated again".encode()

    def wrap(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def wrapped(ctx: Any, *upstream: torch.Tensor | None) -> Gradients:
            if not torch.is_grad_enabled() or _traced():
                return backward(ctx, *upstream)
            if not hasattr(ctx, "sources"):
                raise RuntimeError(message.decode())
            with torch.no_grad():
                results = backward(ctx, *upstream)
            gradients = [gradient for gradient in results if gradient is not None]
            sources = [*ctx.sources, *(tensor for tensor in upstream if tensor is not None)]
            guard = torch._C._functions.DelayedError(message, len(gradients) + len(sources))
            guarded = guard(*gradients, *sources)
            one_by_one = iter(guarded if isinstance(guarded, tuple) else (guarded,))
            return tuple(None if gradient is None else next(one_by_one) for gradient in results)

        return wrapped

    return wrap
