"""linear_logprob on the CPU: torch's matrix products in chunks, C++ on the rows (csrc/token_logprob.cpp)."""

from typing import Any

import torch

from .. import linear
from ..token_logprob import native as rows


def linear_logprob(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
    chunk_tokens: int | None,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference."""
    return linear.logprob(
        rows.token_logprob,
        hidden_NH,
        weight_VH,
        ids_N,
        bias_V,
        temperature,
        temperature_N,
        softcap,
        entropy,
        chunk_tokens,
        narrow=False,
    )


def linear_logprob_backward(*arguments: Any) -> linear.HeadGradients:
    """See the reference; arguments: its own."""
    return linear.logprob_backward(rows.token_logprob_backward, *arguments, narrow=False)
