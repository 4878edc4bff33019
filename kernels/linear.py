"""A head's matrix products in chunks of tokens, around kernels that work on rows of logits.

No [N, V] tensor ever exists. A chunk's logits are made in float32 whatever the inputs are (a bfloat16 logit
of 20 is off by up to .06, and so would be its log-prob), and d logits are written over them, in the inputs'
type on a device, where the products want it. d weight is accumulated in float32. Shapes: N tokens, H hidden,
V vocabulary, C tokens of one chunk.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .policy import Objective
WORKSPACE = {"cpu": 64 << 20, "cuda": 1 << 30}  # bytes of float32 logits in a chunk
HeadGradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits fit the workspace, a multiple of 16."""
    return max(16, WORKSPACE.get(device.type, 1 << 30) // (4 * max(vocabulary, 1)) // 16 * 16)


def chunks(count: int, vocabulary: int, chunk_tokens: int | None, device: torch.device) -> list[slice]:
    """Slices of `count` tokens of at most `chunk_tokens`; None for as many as fit the workspace."""
    chunk_tokens = chunk_tokens or chunk_size(vocabulary, device)
    return [slice(at, min(at + chunk_tokens, count)) for at in range(0, count, chunk_tokens)]


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> torch.Tensor:
    """The matrix product a @ b, summed in float32 whatever the inputs are.

    Args:
        a: [M, K], any float dtype up to float32.
        b: [K, P], of the same dtype.
        out: [M, P], float32; it is written.
        add: Add the product to `out` instead of overwriting it.

    Returns:
        `out`.
    """
    if a.dtype == torch.float32 and b.dtype == torch.float32:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        if add:
            return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return product(a.float(), b.float(), out, add)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which d hidden waits for the backward pass, for hidden states of `dtype`.

    float16 could overflow before the upstream factor and 1/Z come in, so it waits in float32.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient times a factor, computed in float32 and rounded once, without a second float32 tensor.

    Args:
        gradient: Of any shape, in the dtype of `stored_dtype` or float32.
        factor: 0-d.
        dtype: That of the result.
    """
    if gradient.dtype == dtype or torch.compiler.is_compiling():
        return (gradient * factor).to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


class Head(NamedTuple):
    """A head and its inputs as the matrix products take them.

    Attributes:
        hidden_NH: Hidden states.
        weight_VH: The head's weight, of the same dtype.
        bias_V: float32, or None.
        gradient_dtype: The dtype of d logits.
    """

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    gradient_dtype: torch.dtype

    def buffer(self, slices: Sequence[slice]) -> torch.Tensor:
        """Memory for the float32 logits of the longest of the chunks `slices`."""
        longest = max((at.stop - at.start for at in slices), default=0)
        return self.hidden_NH.new_empty((longest, self.weight_VH.shape[0]), dtype=torch.float32)

    def logits(self, at: slice, buffer_CV: torch.Tensor) -> torch.Tensor:
        """The float32 logits of the tokens `at`, written into the buffer."""
        logits_CV = buffer_CV[: at.stop - at.start]
        product(self.hidden_NH[at], self.weight_VH.t(), logits_CV)
        return logits_CV if self.bias_V is None else logits_CV.add_(self.bias_V)

    def gradient_view(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """Where d logits are written: over the logits, each row from where its logits begin."""
        return (
            logits_CV
            if self.gradient_dtype == torch.float32
            else logits_CV.view(self.gradient_dtype)[:, : logits_CV.shape[1]]
        )


def head(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, narrow: bool) -> Head:
    """The Head of a call.

    Args:
        hidden_NH: Hidden states, float32 or narrower.
        weight_VH: The head's weight, of the same dtype.
        bias_V: Its bias, or None.
        narrow: Multiply half-precision inputs as they are. On a CPU they are widened once instead: its
            half-precision products are slower.
    """
    if not narrow:
        hidden_NH, weight_VH = hidden_NH.float(), weight_VH.float()
    return Head(hidden_NH, weight_VH, None if bias_V is None else bias_V.float(), hidden_NH.dtype)


class Gradients:
    """d hidden, d weight and d bias, added up chunk by chunk; d weight and d bias are float32.

    Attributes:
        hidden_NH: d hidden, or None if it is not wanted.
        weight_VH: d weight, or None.
        bias_V: d bias, or None.
    """

    def __init__(self, head: Head, dtype: torch.dtype, hidden: bool, weight: bool, bias: bool) -> None:
        """Allocates what is wanted.

        Args:
            head: The head of the call.
            dtype: Of d hidden.
            hidden: Whether d hidden is wanted.
            weight: Whether d weight is wanted.
            bias: Whether d bias is wanted.
        """
        vocabulary, width = head.weight_VH.shape
        empty = head.hidden_NH.new_empty
        self.head = head
        self.hidden_NH = empty(head.hidden_NH.shape, dtype=dtype) if hidden else None
        self.weight_VH = empty((vocabulary, width), dtype=torch.float32) if weight else None
        self.bias_V = empty(vocabulary, dtype=torch.float32).zero_() if bias else None
        self.first = True

    def add(self, at: slice, d_CV: torch.Tensor) -> None:
        """Adds what the d logits of the tokens `at` mean for hidden states, weight and bias."""
        if self.hidden_NH is not None:
            out, weight_VH = self.hidden_NH[at], self.head.weight_VH
            if out.dtype == d_CV.dtype == weight_VH.dtype:
                torch.mm(d_CV, weight_VH, out=out)
            elif out.dtype == torch.float32:
                product(d_CV, weight_VH, out)
            else:
                # out=: autocast rounds nothing
                out.copy_(torch.mm(d_CV, weight_VH, out=d_CV.new_empty(out.shape)))
        if self.weight_VH is not None:
            product(d_CV.t(), self.head.hidden_NH[at], self.weight_VH, add=not self.first)
        if self.bias_V is not None:
            self.bias_V += d_CV.sum(0, dtype=torch.float32)
        self.first = False

    def done(self) -> HeadGradients:
        """(d hidden, d weight, d bias), None where not wanted; zeros when there was no token."""
        if self.first and self.weight_VH is not None:
            self.weight_VH.zero_()
        return self.hidden_NH, self.weight_VH, self.bias_V


def logprob(
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
    chunk_tokens: int | None,
    *,
    narrow: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob, entropy and log-sum-exp of tokens, with logits made in chunks.

    Args:
        forward: The `token_logprob` of an implementation of that room.
        hidden_NH: Hidden states, float32 or narrower.
        weight_VH: The head's weight, of the same dtype.
        ids_N: The tokens.
        bias_V: The head's bias, or None.
        temperature: One for all tokens.
        temperature_N: One for each token, or None.
        softcap: 0 for none.
        entropy: Whether the entropy is wanted.
        chunk_tokens: As in `chunks`.
        narrow: As in `head`.

    Returns:
        logp_N, entropy_N ([0] if not wanted) and lse_N, in nats, float32.
    """
    count, vocabulary = hidden_NH.shape[0], weight_VH.shape[0]
    inputs = head(hidden_NH, weight_VH, bias_V, narrow)
    slices = chunks(count, vocabulary, chunk_tokens, hidden_NH.device)
    buffer_CV = inputs.buffer(slices)
    if len(slices) == 1:
        logits_NV = inputs.logits(slices[0], buffer_CV)
        return forward(logits_NV, ids_N, temperature, temperature_N, softcap, entropy)
    logp_N, lse_N = (hidden_NH.new_empty(count, dtype=torch.float32) for _ in range(2))
    entropy_N = hidden_NH.new_empty(count if entropy else 0, dtype=torch.float32)
    for at in slices:
        temperature_C = None if temperature_N is None else temperature_N[at]
        logp_N[at], entropy_C, lse_N[at] = forward(
            inputs.logits(at, buffer_CV), ids_N[at], temperature, temperature_C, softcap, entropy
        )
        if entropy:
            entropy_N[at] = entropy_C
    return logp_N, entropy_N, lse_N


def logprob_backward(
    backward: Callable[..., torch.Tensor],
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    logp_N: torch.Tensor,
    entropy_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_logp_N: torch.Tensor | None,
    grad_entropy_N: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    *,
    narrow: bool,
) -> HeadGradients:
    """(d hidden, d weight, d bias) for any upstream gradient: the logits are made again, chunk by chunk.

    Args:
        backward: The `token_logprob_backward` of an implementation of that room.
        hidden_NH: As in `logprob`, and so are the other inputs of the forward pass.
        weight_VH: The head's weight.
        ids_N: The tokens.
        bias_V: The head's bias, or None.
        logp_N: What `logprob` has returned.
        entropy_N: The same.
        lse_N: The same.
        grad_logp_N: Upstream gradient of the log-probs, or None.
        grad_entropy_N: Upstream gradient of the entropies, or None.
        temperature: One for all tokens.
        temperature_N: One for each token, or None.
        softcap: 0 for none.
        wanted: Which of the three gradients are wanted; the others are None.
        chunk_tokens: As in `chunks`.
        narrow: As in `head`.
    """
    inputs = head(hidden_NH, weight_VH, bias_V, narrow)
    gradients = Gradients(inputs, hidden_NH.dtype, *wanted)
    slices = chunks(hidden_NH.shape[0], weight_VH.shape[0], chunk_tokens, hidden_NH.device)
    buffer_CV = inputs.buffer(slices)
    for at in slices:
        logits_CV = inputs.logits(at, buffer_CV)
        d_CV = inputs.gradient_view(logits_CV)
        vectors_C = [
            tensor[at] if tensor is not None and tensor.numel() else tensor
            for tensor in (logp_N, entropy_N, lse_N, grad_logp_N, grad_entropy_N)
        ]
        temperature_C = None if temperature_N is None else temperature_N[at]
        backward(logits_CV, ids_N[at], *vectors_C, temperature, temperature_C, softcap, d_CV)
        gradients.add(at, d_CV)
    return gradients.done()


def policy_gradients(
    rows: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    tokens: Sequence[torch.Tensor | None],
    objective: "Objective",
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    *,
    narrow: bool,
) -> tuple[torch.Tensor, torch.Tensor, HeadGradients]:
    """Log-probs, entropies and gradients of the weighted policy objective: three matrix products in all.

    Args:
        rows: The `ppo_loss_from_logits` of an implementation of that room.
        hidden_NH: Hidden states, float32 or narrower; finite where the weight is 0, too.
        weight_VH: The head's weight, of the same dtype.
        ids_N: The tokens.
        bias_V: The head's bias, or None.
        tokens: old_logp_N, advantage_N, ref_logp_N or None, and weight_N: the first four of
            `policy.Weighted`.
        objective: As `policy.objective` returns it.
        wanted: Which of the three gradients are wanted; the others are None.
        chunk_tokens: As in `chunks`.
        narrow: As in `head`.

    Returns:
        logp_N, entropy_N (nats, float32) and (d hidden, d weight, d bias); d hidden is in the dtype of
        `stored_dtype`.
    """
    *scalars, temperature, temperature_N, softcap = objective
    count = hidden_NH.shape[0]
    logp_N, entropy_N = (hidden_NH.new_empty(count, dtype=torch.float32) for _ in range(2))
    inputs = head(hidden_NH, weight_VH, bias_V, narrow)
    gradients = Gradients(inputs, stored_dtype(hidden_NH.dtype), *wanted)
    slices = chunks(count, weight_VH.shape[0], chunk_tokens, hidden_NH.device)
    buffer_CV = inputs.buffer(slices)
    for at in slices:
        logits_CV = inputs.logits(at, buffer_CV)
        d_CV = inputs.gradient_view(logits_CV)
        tokens_C = [None if tensor is None else tensor[at] for tensor in tokens]
        temperature_C = None if temperature_N is None else temperature_N[at]
        logp_N[at], entropy_N[at] = rows(
            logits_CV, ids_N[at], *tokens_C, *scalars, temperature, temperature_C, softcap, d_CV
        )
        gradients.add(at, d_CV)
    return logp_N, entropy_N, gradients.done()
