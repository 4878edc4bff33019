"""The expected results in float64: log-probs of all tokens, and gradients of a sample of rows and columns.

Gradients are checked on the first and last rows of d logits or d hidden and on 64 rows of d weight, among
them rows of targets. A row of d weight is a sum over all tokens, so every token is checked.
"""

from functools import lru_cache

import shapes
import torch

SAMPLE = 16
# largest allowed error, as a share of the largest expected value
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float64: 1e-9}


def error(got, expected):
    """Returns the largest error as a share of the largest expected value; infinity if it is NaN."""
    expected = expected.detach().double()
    scale = expected.abs().max().clamp(min=1e-300)
    largest = float((got.detach().double() - expected).abs().max() / scale)
    return largest if largest == largest else float("inf")  # max() and comparisons ignore NaN


def rows_of(count, device):
    """Returns the indices of the checked rows."""
    take = min(SAMPLE, count)
    return torch.cat([torch.arange(take, device=device), torch.arange(count - take, count, device=device)])


def logprob(logits_NV, ids_N, chunk=512):
    """(logp_N, lse_N) in float64."""
    lse_N = torch.cat([chunk_logits.double().logsumexp(-1) for chunk_logits in logits_NV.split(chunk)])
    return logits_NV.gather(-1, ids_N[:, None]).squeeze(-1).double() - lse_N, lse_N


@lru_cache(maxsize=1)
def of_logits(shape, device):
    """logprob of shapes.logits(shape, device)."""
    return logprob(*shapes.logits(shape, device)[:2])


@lru_cache(maxsize=1)
def of_linear(shape, device):
    """linear_logprob of shapes.linear(shape, device)."""
    return linear_logprob(*shapes.linear(shape, device)[:3])


def entropy_rows(logits_NV, rows):
    all_RV = torch.log_softmax(logits_NV[rows].double(), -1)
    return -(all_RV.exp() * all_RV).sum(-1)


def linear_logprob(hidden_NH, weight_VH, ids_N, chunk=512):
    """(logp_N, lse_N) in float64 of hidden @ weight.T."""
    weight_HV = weight_VH.double().T
    chunks = [
        logprob(part.double() @ weight_HV, ids)
        for part, ids in zip(hidden_NH.split(chunk), ids_N.split(chunk))
    ]
    return tuple(torch.cat(column) for column in zip(*chunks))


def _through_softmax(logits_RV, ids_R, lse_R, g_R):
    gradient_RV = -g_R[:, None] * (logits_RV - lse_R[:, None]).exp()
    return gradient_RV.scatter_add_(1, ids_R[:, None], g_R[:, None])


def logits_gradient(logits_NV, ids_N, lse_N, g_N, rows):
    """Returns d logits of `rows`; g_N is the loss's derivative by each token's log-prob."""
    return _through_softmax(logits_NV[rows].double(), ids_N[rows], lse_N[rows], g_N.double()[rows])


def linear_gradients(hidden_NH, weight_VH, ids_N, lse_N, g_N, rows, columns):
    """Returns (d hidden of `rows`, d weight of the vocabulary rows `columns`)."""
    g_N, hidden = g_N.double(), hidden_NH.double()
    weight = weight_VH.double()
    d_hidden = _through_softmax(hidden[rows] @ weight.T, ids_N[rows], lse_N[rows], g_N[rows]) @ weight
    d_logits_NC = -g_N[:, None] * (hidden @ weight[columns].T - lse_N[:, None]).exp()
    d_logits_NC += g_N[:, None] * (ids_N[:, None] == columns)
    return d_hidden, d_logits_NC.T @ hidden


def columns_of(ids_N, vocabulary):
    """Returns the checked vocabulary rows: targets of tokens, and others."""
    take = min(32, vocabulary)
    return torch.cat(
        [ids_N[:take], torch.arange(vocabulary - take, vocabulary, device=ids_N.device)]
    ).unique()


def derivative(batch, logp_N, means="same"):
    """Returns d loss / d logp of the clipped loss (the mean over tokens).

    means: what the version under test computes: "same"; "grpo", one advantage (the first) for all tokens;
    "first step", that with ratios of 1; "cross-entropy", the mean of -logp.
    """
    count = logp_N.shape[0]
    if means == "cross-entropy":
        return torch.full_like(logp_N, -1 / count)
    advantage_N = (batch.advantage_N if means == "same" else batch.advantage_N[:1].expand(count)).double()
    old_N = logp_N if means == "first step" else batch.old_logp_N.double()
    ratio_N = (logp_N - old_N).exp()
    kept_N = ratio_N * advantage_N <= ratio_N.clamp(1 - shapes.CLIP, 1 + shapes.CLIP) * advantage_N
    return torch.where(kept_N, -ratio_N * advantage_N, 0) / count
