"""linear_logprob on the CPU: torch's matrix products in chunks, C++ on the rows of logits
(csrc/token_logprob.cpp).
"""

from .. import linear
from ..token_logprob import native as rows


def linear_logprob(
    hidden_NH, weight_VH, ids_N, bias_V, temperature, temperature_N, softcap, entropy, chunk_tokens, gradient
):
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


def linear_logprob_backward(*arguments):
    """See the reference."""
    return linear.logprob_backward(rows.token_logprob_backward, *arguments, narrow=False)
