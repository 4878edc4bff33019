"""The head's matrix products in chunks of tokens, around kernels that work on rows of logits: no [N, V]
tensor ever exists.

A chunk's logits are made in float32 whatever the inputs are (a bfloat16 logit of 20 is off by up to .06, and
so would be its log-prob), and d logits are written over them, in the inputs' type on a device, where the
products want it. d weight is accumulated in float32. Shapes: N tokens, H hidden, V vocabulary, C tokens of
one chunk.
"""

from typing import NamedTuple

import torch

WORKSPACE = {"cpu": 64 << 20, "cuda": 1 << 30}  # bytes of float32 logits in a chunk


def chunk_size(vocabulary, device):
    """Tokens whose logits fit the workspace, a multiple of 16."""
    return max(16, WORKSPACE.get(device.type, 1 << 30) // (4 * max(vocabulary, 1)) // 16 * 16)


def chunks(count, vocabulary, chunk_tokens, device):
    """Slices of tokens. chunk_tokens: None chooses by workspace."""
    chunk_tokens = chunk_tokens or chunk_size(vocabulary, device)
    return [slice(at, min(at + chunk_tokens, count)) for at in range(0, count, chunk_tokens)]


def product(a, b, out, add=False):
    """Out (float32) = a @ b, or += ; the sums run in float32 whatever a and b are."""
    if a.dtype == torch.float32 and b.dtype == torch.float32:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        if add:
            return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return product(a.float(), b.float(), out, add)


def held(dtype):
    """In what d hidden waits for backward: float16 may overflow before the upstream factor and 1/Z come in."""
    return torch.float32 if dtype == torch.float16 else dtype


def scaled(gradient, factor, kind):
    """Gradient * factor in float32, rounded once to `kind`; no second float32 tensor on the way."""
    if gradient.dtype == kind or torch.compiler.is_compiling():
        return (gradient * factor).to(kind)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=kind))


class Head(NamedTuple):
    """hidden_NH, weight_VH, bias_V or None as the products take them; made: the type of d logits."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    made: torch.dtype

    def buffer(self, slices):
        """Room for the logits of the longest chunk."""
        longest = max((at.stop - at.start for at in slices), default=0)
        return self.hidden_NH.new_empty((longest, self.weight_VH.shape[0]), dtype=torch.float32)

    def logits(self, at, buffer_CV):
        """Logits of the tokens `at`, float32, in the buffer."""
        logits_CV = buffer_CV[: at.stop - at.start]
        product(self.hidden_NH[at], self.weight_VH.t(), logits_CV)
        return logits_CV if self.bias_V is None else logits_CV.add_(self.bias_V)

    def over(self, logits_CV):
        """Where d logits go: over the logits, each row from where its logits begin."""
        return logits_CV if self.made == torch.float32 else logits_CV.view(self.made)[:, : logits_CV.shape[1]]


def head(hidden_NH, weight_VH, bias_V, narrow):
    """The Head of a call.

    On a CPU half-precision inputs are widened once: its half-precision products are slower.
    """
    if not narrow:
        hidden_NH, weight_VH = hidden_NH.float(), weight_VH.float()
    return Head(hidden_NH, weight_VH, None if bias_V is None else bias_V.float(), hidden_NH.dtype)


class Gradients:
    """d hidden, d weight and d bias, chunk by chunk; each may be unwanted. d weight and d bias are float32."""

    def __init__(self, head, dtype, hidden, weight, bias):
        vocabulary, width = head.weight_VH.shape
        empty = head.hidden_NH.new_empty
        self.head = head
        self.hidden_NH = empty(head.hidden_NH.shape, dtype=dtype) if hidden else None
        self.weight_VH = empty((vocabulary, width), dtype=torch.float32) if weight else None
        self.bias_V = empty(vocabulary, dtype=torch.float32).zero_() if bias else None
        self.first = True

    def add(self, at, d_CV):
        """Takes in d logits of the tokens `at`."""
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

    def done(self):
        """(d hidden, d weight, d bias), None where unwanted; zeros when there was no token."""
        if self.first and self.weight_VH is not None:
            self.weight_VH.zero_()
        return self.hidden_NH, self.weight_VH, self.bias_V


def logprob(
    forward,
    hidden_NH,
    weight_VH,
    ids_N,
    bias_V,
    temperature,
    temperature_N,
    softcap,
    entropy,
    chunk_tokens,
    narrow,
):
    """Log-prob, entropy ([0] if not asked for) and log-sum-exp of N tokens by `forward`, a room's
    `token_logprob`.
    """
    count, vocabulary = hidden_NH.shape[0], weight_VH.shape[0]
    logp_N, lse_N = (hidden_NH.new_empty(count, dtype=torch.float32) for _ in range(2))
    entropy_N = hidden_NH.new_empty(count if entropy else 0, dtype=torch.float32)
    mine = head(hidden_NH, weight_VH, bias_V, narrow)
    slices = chunks(count, vocabulary, chunk_tokens, hidden_NH.device)
    buffer_CV = mine.buffer(slices)
    for at in slices:
        part_N = None if temperature_N is None else temperature_N[at]
        logp_N[at], entropy_C, lse_N[at] = forward(
            mine.logits(at, buffer_CV), ids_N[at], temperature, part_N, softcap, entropy
        )
        if entropy:
            entropy_N[at] = entropy_C
    return logp_N, entropy_N, lse_N


def logprob_backward(
    backward,
    hidden_NH,
    weight_VH,
    ids_N,
    bias_V,
    logp_N,
    entropy_N,
    lse_N,
    grad_logp_N,
    grad_entropy_N,
    temperature,
    temperature_N,
    softcap,
    wanted,
    chunk_tokens,
    narrow,
):
    """(d hidden, d weight, d bias) for any upstream gradient: the logits are made again, chunk by chunk.

    wanted: three booleans. `backward` is a room's `token_logprob_backward`.
    """
    mine = head(hidden_NH, weight_VH, bias_V, narrow)
    gradients = Gradients(mine, hidden_NH.dtype, *wanted)
    slices = chunks(hidden_NH.shape[0], weight_VH.shape[0], chunk_tokens, hidden_NH.device)
    buffer_CV = mine.buffer(slices)
    for at in slices:
        logits_CV = mine.logits(at, buffer_CV)
        d_CV = mine.over(logits_CV)
        parts = [
            tensor[at] if tensor is not None and tensor.numel() else tensor
            for tensor in (logp_N, entropy_N, lse_N, grad_logp_N, grad_entropy_N)
        ]
        part_N = None if temperature_N is None else temperature_N[at]
        backward(logits_CV, ids_N[at], *parts, temperature, part_N, softcap, d_CV)
        gradients.add(at, d_CV)
    return gradients.done()


def policy_gradients(
    rows, hidden_NH, weight_VH, ids_N, bias_V, tokens, objective, wanted, chunk_tokens, narrow
):
    """(logp_N, entropy_N, (d hidden, d weight, d bias)) of the weighted policy objective: three products in
    all.

    rows: a room's `ppo_loss_from_logits`. tokens: old_logp_N, advantage_N, ref_logp_N or None, weight_N.
    objective: the scalars and temperature_N as `policy.objective` gives them. Rows of weight 0 must hold
    finite hidden states.
    """
    *scalars, temperature, temperature_N, softcap = objective
    count = hidden_NH.shape[0]
    logp_N, entropy_N = (hidden_NH.new_empty(count, dtype=torch.float32) for _ in range(2))
    mine = head(hidden_NH, weight_VH, bias_V, narrow)
    gradients = Gradients(mine, held(hidden_NH.dtype), *wanted)
    slices = chunks(count, weight_VH.shape[0], chunk_tokens, hidden_NH.device)
    buffer_CV = mine.buffer(slices)
    for at in slices:
        logits_CV = mine.logits(at, buffer_CV)
        d_CV = mine.over(logits_CV)
        parts = [None if tensor is None else tensor[at] for tensor in tokens]
        part_N = None if temperature_N is None else temperature_N[at]
        logp_N[at], entropy_N[at] = rows(
            logits_CV, ids_N[at], *parts, *scalars, temperature, part_N, softcap, d_CV
        )
        gradients.add(at, d_CV)
    return logp_N, entropy_N, gradients.done()
