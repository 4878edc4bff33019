"""TRL 1.16: per-token log-probs and entropies, and the head under every core trainer (`add_fused_lm_head`).

The core trainers call their chunked head through one global of trl.trainer.utils, looked up at each call; our
head is in trl_head.py.
"""

from typing import Any

import torch

from ..kernels.token_logprob import token_logprob
from . import shared
from .registry import Library, LibraryFunction, Replace
from .trl_head import TARGET, UTILS, chunked_head


def selective_log_softmax(original: LibraryFunction) -> LibraryFunction:
    """(logits, index) -> log-probs; TRL's own for K indices a position, other accelerators and DTensors."""

    def replacement(
        logits: torch.Tensor,
        index: torch.Tensor,
        temperature: float | torch.Tensor = 1.0,
        row_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not _supported(logits, index, temperature, row_mask):
            return original(logits, index, temperature=temperature, row_mask=row_mask)
        return _logp_and_entropy(logits, index, temperature, row_mask, False)[0]

    return replacement


def selective_log_softmax_and_entropy(original: LibraryFunction) -> LibraryFunction:
    """(logits, index) -> (log-probs, entropies) in one pass over the logits."""

    def replacement(
        logits: torch.Tensor,
        index: torch.Tensor,
        entropy_requires_grad: bool = True,
        temperature: float | torch.Tensor = 1.0,
        row_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _supported(logits, index, temperature, row_mask):
            return original(
                logits,
                index,
                entropy_requires_grad=entropy_requires_grad,
                temperature=temperature,
                row_mask=row_mask,
            )
        logp, entropy = _logp_and_entropy(logits, index, temperature, row_mask, True)
        return logp, entropy if entropy_requires_grad else entropy.detach()

    return replacement


def _supported(
    logits: torch.Tensor,
    index: torch.Tensor,
    temperature: float | torch.Tensor,
    row_mask: torch.Tensor | None,
) -> bool:
    return (
        shared.one_id_each(logits, index)
        and shared.one_temperature(temperature)
        and shared.plain(row_mask)
        and (row_mask is None or row_mask.shape == index.shape)
    )


class _ZeroGradient(torch.autograd.Function):
    """logits -> logits, whose gradient is set to 0 in masked rows, where a NaN logit would make it NaN."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(masked)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (masked,) = ctx.saved_tensors
        # In place: our op has just made this gradient, and nothing else refers to it. A copy would be as
        # large as the logits.
        if gradient.device.type == "cpu":
            # This writes the masked rows alone; on a device the host would wait for their number.
            gradient[masked] = 0.0
        else:
            gradient.masked_fill_(masked[..., None], 0.0)
        return gradient, None


def _logp_and_entropy(
    logits: torch.Tensor,
    index: torch.Tensor,
    temperature: float | torch.Tensor,
    row_mask: torch.Tensor | None,
    entropy: bool,
) -> tuple[torch.Tensor, ...]:
    """(log-probs,) or (log-probs, entropies); rows whose mask is 0 give 0, whatever they contain."""
    masked = None if row_mask is None else row_mask == 0
    if masked is not None:
        index = index.masked_fill(masked, 0)
    shared.known_ids("index: expected", index, logits.shape[-1])
    if masked is not None and shared.any_needs_gradient(logits):
        logits = _ZeroGradient.apply(logits, masked)
    result = token_logprob(logits, index, temperature=temperature, return_entropy=entropy)
    outputs = result if isinstance(result, tuple) else (result,)
    return outputs if masked is None else tuple(output.masked_fill(masked, 0.0) for output in outputs)


LIBRARY = Library(
    name="trl",
    distribution="trl",
    versions=("1.16",),
    replace=(
        Replace(
            TARGET,
            chunked_head,
            "(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, "
            "logit_scale=1.0, "
            "outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'))",
            "less memory, faster on a CPU; an id outside the vocabulary is refused; -inf logits keep a "
            "finite entropy",
            signature_of="forward",
        ),
        Replace(
            f"{UTILS}:selective_log_softmax",
            selective_log_softmax,
            "(logits, index, temperature=1.0, row_mask=None)",
            "one read of the logits, float32 results, empty batches",
            dtype_of=("logits", "temperature"),
        ),
        Replace(
            f"{UTILS}:entropy_from_logits",
            shared.entropy_from_logits,
            "(logits, chunk_size=128)",
            "keeps no softmax for backward; -inf logits give a finite entropy (its own: NaN)",
            dtype_of=("logits",),
        ),
        Replace(
            f"{UTILS}:selective_log_softmax_and_entropy",
            selective_log_softmax_and_entropy,
            "(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",
            "log-prob and entropy in one read; -inf logits give a finite entropy (its own: NaN)",
            dtype_of=("logits", "temperature"),
        ),
    ),
    leave=(
        (
            "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss",
            "eight losses and their metrics on [B, T] numbers in one method; its log-probs come from the "
            "replaced head",
        ),
        ("trl.kernels:ChunkedDivergenceFunction", "distillation, for which there is no op here"),
    ),
)
