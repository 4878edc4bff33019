"""First derivatives alone: what the gradient formulas of the ops are wrapped in.

An op's backward pass is kernels that autograd does not see. Under create_graph=True its gradients would look
like constants, and a derivative of them would come out wrong without a word: a penalty on a gradient would
weigh nothing, a Hessian would be 0.
"""

import functools

import torch
from torch.autograd import forward_ad


def _traced():
    """While torch.compile or a torch.func transform traces, which have rules of their own."""
    return torch.compiler.is_compiling() or transformed()


def transformed():
    """Whether the call is inside torch.vmap, torch.func.grad or another transform of torch.func."""
    return torch._C._functorch.maybe_current_level() is not None


def learns(tensor):
    """Whether a gradient of the tensor is asked for: also of what torch.vmap takes a row from, which itself
    does not say.
    """
    if tensor is None or not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling():
        while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def refuse_tangents(op, *inputs):
    """RuntimeError where one of them carries a tangent of forward-mode differentiation, which the op would
    lose.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
        raise RuntimeError(
            f"{op} has no forward-mode derivative (jvp, jacfwd, dual tensors): expected inputs without a "
            f"tangent; "
            "backward() and torch.autograd.grad work"
        )


def track_inputs(output, *inputs):
    """For @first_order_only: notes on an op's output its differentiable inputs, as empty tensors with their
    history, which hold no memory.
    """
    if not _traced() and output.grad_fn is not None:
        output.grad_fn.sources = [
            torch.narrow_copy(tensor, 0, 0, 0)
            for tensor in inputs
            if tensor is not None and tensor.requires_grad
        ]


def first_order_only(op):
    """Wraps an op's backward function (ctx, *upstream) -> gradients or None, whose name in messages is `op`.

    Under create_graph=True the gradients have the same values and depend on what `track_inputs` was given,
    and on the upstream gradients: to differentiate them again, by any of these, is a RuntimeError.
    (torch.autograd.function.once_differentiable sees the upstream gradients alone.) Where nothing could be
    remembered, under torch.vmap, create_graph=True itself is one. While torch.compile or a torch.func
    transform traces, nothing is changed.
    """
    message = f"{op} has first derivatives alone: its gradient cannot be differentiated again".encode()

    def wrap(backward):
        @functools.wraps(backward)
        def wrapped(ctx, *upstream):
            if not torch.is_grad_enabled() or _traced():
                return backward(ctx, *upstream)
            if not hasattr(ctx, "sources"):
                raise RuntimeError(message.decode())
            with torch.no_grad():
                made = backward(ctx, *upstream)
            gradients = [gradient for gradient in made if gradient is not None]
            sources = [*ctx.sources, *(tensor for tensor in upstream if tensor is not None)]
            sealed = torch._C._functions.DelayedError(message, len(gradients) + len(sources))(
                *gradients, *sources
            )
            sealed = iter(sealed if isinstance(sealed, tuple) else (sealed,))
            return tuple(None if gradient is None else next(sealed) for gradient in made)

        return wrapped

    return wrap
