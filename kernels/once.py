"""First derivatives alone: what the gradient formulas of the ops are wrapped in.

An op's backward pass is kernels that autograd does not see. Under create_graph=True its gradients would look like constants,
and a derivative of them would come out wrong without a word.
"""

import functools

import torch


def once(op):
    """Wraps an op's backward function (ctx, *upstream) -> gradients or None, whose name in messages is `op`.

    Under create_graph=True the gradients have the same values and require grad; to differentiate them again is a RuntimeError.
    Like torch.autograd.function.once_differentiable, but for an upstream gradient that needs none, too: the gradient depends on
    the inputs either way. While torch.compile or a torch.func transform traces, nothing is changed.
    """
    message = f"{op} has first derivatives alone: its gradient cannot be differentiated again".encode()

    def wrap(backward):
        @functools.wraps(backward)
        def wrapped(ctx, *upstream):
            traced = torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None
            if traced or not torch.is_grad_enabled():
                return backward(ctx, *upstream)
            with torch.no_grad():
                made = backward(ctx, *upstream)
            gradients = [gradient.detach().requires_grad_() for gradient in made if gradient is not None]
            if not gradients:
                return made
            sealed = torch._C._functions.DelayedError(message, len(gradients))(*gradients)
            sealed = iter(sealed if isinstance(sealed, tuple) else (sealed,))
            return tuple(None if gradient is None else next(sealed) for gradient in made)

        return wrapped

    return wrap
