"""Log-prob and entropy of given tokens in plain torch, any float dtype: the definition.

Rows are taken in chunks that fit the cache, so that the forward pass makes no second [N, V] tensor and the
backward pass only its result. Shapes: N tokens, V vocabulary, R rows of one chunk.
"""

import torch

from ..checks import result_dtype

# A larger difference is not what rounding took from lse: where lse's own steps are wider than this, the
# rounded lse is the highest z, and the exact one is at most log V above it.
LOST_MOST = 32.0
# of [R, V]; on a CPU 1 MiB of float32, which stays in its cache
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


def _chunks(logits_NV: torch.Tensor) -> list[slice]:
    count, vocabulary = logits_NV.shape
    step = max(1, CHUNK_ELEMENTS.get(logits_NV.device.type, 1 << 26) // max(1, vocabulary))
    return [slice(start, start + step) for start in range(0, count, step)]


def _capped(logits: torch.Tensor, softcap: float, dtype: torch.dtype) -> torch.Tensor:
    """The logits in `dtype`, as softcap * tanh(logits / softcap); softcap 0 is none."""
    z = logits.to(dtype)
    return softcap * torch.tanh(z / softcap) if softcap else z


def _finite(log_p: torch.Tensor) -> torch.Tensor:
    """-inf becomes the lowest number: p * log p with p = 0 is then 0, its limit, and not 0 * -inf."""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


def _divisor(logp_N: torch.Tensor, temperature: float, temperature_N: torch.Tensor | None) -> torch.Tensor:
    """[N, 1]: the temperature of each row, in the dtype of logp_N."""
    if temperature_N is None:
        return torch.full_like(logp_N, temperature)[:, None]
    return temperature_N.to(logp_N.dtype)[:, None]


def token_logprob(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of each row, and the log-sum-exp that the backward pass needs.

    Args:
        logits_NV: Logits before softcap and temperature, any float dtype.
        ids_N: The tokens, integers. One outside the vocabulary gives NaN; where the op looks at ids it has
            raised before.
        temperature: One for all rows.
        temperature_N: One for each row, or None.
        softcap: 0 for none.
        entropy: Whether the entropy is wanted.

    Returns:
        logp_N, entropy_N ([0] if not wanted) and lse_N, of the capped logits over the temperature, in nats;
        float64 for float64 logits, else float32.
    """
    dtype = result_dtype(logits_NV)
    count, vocabulary = logits_NV.shape
    logp_N, lse_N = (logits_NV.new_empty(count, dtype=dtype) for _ in range(2))
    entropy_N = logits_NV.new_empty(count if entropy else 0, dtype=dtype)
    divisor_N1 = _divisor(logp_N, temperature, temperature_N)
    known_N = (ids_N >= 0) & (ids_N < vocabulary)
    ids_N1 = torch.where(known_N, ids_N, 0).long()[:, None]
    for at in _chunks(logits_NV) if vocabulary else []:
        z_RV = _capped(logits_NV[at], softcap, dtype) / divisor_N1[at]
        # From the highest on: what all of a row's logits have in common must not cost digits of their
        # differences.
        highest_R1 = z_RV.amax(1, keepdim=True)
        highest_R1 = torch.where(highest_R1.abs() == torch.inf, 0, highest_R1)
        z_RV -= highest_R1
        target_R1 = z_RV.gather(1, ids_N1[at])
        # The others' sum without the target's term: a confident token's log-prob is -log1p(sum), free of
        # cancellation.
        others_R1 = torch.logsumexp(z_RV.scatter(1, ids_N1[at], -torch.inf), dim=1, keepdim=True)
        gap_R1 = others_R1 - target_R1
        logp_R1 = -(gap_R1.clamp(min=0) + torch.log1p(torch.exp(-gap_R1.abs())))
        # An infinite logit has no distribution: NaN, as log_softmax says. Then the others' sum is infinite,
        # or the target is.
        logp_R1 = torch.where((others_R1 == torch.inf) | (target_R1 == torch.inf), torch.nan, logp_R1)
        lse_R1 = torch.logaddexp(others_R1, target_R1)
        logp_N[at], lse_N[at] = logp_R1.squeeze(1), (lse_R1 + highest_R1).squeeze(1)
        if entropy:
            # Not by torch's log_softmax: on AVX2 it adds a row up lane by lane, 1e-4 off at 151,936 logits.
            log_p_RV = z_RV - lse_R1
            entropy_N[at] = -(log_p_RV.exp() * _finite(log_p_RV)).sum(1)
    return torch.where(known_N, logp_N, torch.nan), entropy_N, lse_N


def lost_of(target: torch.Tensor, logp: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """What rounding took from lse: the target's z - lse has to equal its log-prob.

    A z of 10,000 has 2^-11 between one float32 and the next, and so would lse: each p would be off by that.

    Args:
        target: z of the target.
        logp: The target's log-prob.
        lse: Log-sum-exp of the row; all three are of one shape and in nats.

    Returns:
        The correction of lse, 0 where the log-prob is no more exact than lse.
    """
    lost = (target - lse) - logp
    return torch.where((logp.abs() < lse.abs()) & (lost.abs() < LOST_MOST), lost, 0)


def token_logprob_backward(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    logp_N: torch.Tensor,
    entropy_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_logp_N: torch.Tensor | None,
    grad_entropy_N: torch.Tensor | None,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    out_NV: torch.Tensor,
) -> torch.Tensor:
    """Writes d logits = (g * (onehot - p) - g_H * p * (log p + H)) / temperature, through the softcap.

    Args:
        logits_NV: As in the forward pass, and so are ids, temperatures and softcap.
        ids_N: The tokens.
        logp_N: What `token_logprob` has returned.
        entropy_N: The same.
        lse_N: The same.
        grad_logp_N: g, the upstream gradient of the log-probs, or None.
        grad_entropy_N: g_H, that of the entropies, or None.
        temperature: One for all rows.
        temperature_N: One for each row, or None.
        softcap: 0 for none.
        out_NV: Is written, in its own dtype. It may be logits_NV, or begin where each of its rows begins with
            narrower elements: a chunk is read before it is written, and chunks go upwards.

    Returns:
        out_NV.
    """
    dtype = logp_N.dtype
    vocabulary = logits_NV.shape[1]
    divisor_N1 = _divisor(logp_N, temperature, temperature_N)
    known_N1 = ((ids_N >= 0) & (ids_N < vocabulary))[:, None]
    ids_N1 = torch.where(known_N1, ids_N[:, None], 0).long()
    grad_N = torch.zeros_like(logp_N) if grad_logp_N is None else grad_logp_N.to(dtype)
    grad_N1 = grad_N[:, None] / divisor_N1
    # NaN (an id outside the vocabulary) must fill its whole row.
    minus_N1 = torch.where(logp_N.isnan()[:, None], torch.nan, -grad_N1)
    # 1 - p of the target as -expm1(logp): taken from p it would lose everything at p near 1.
    target_N1 = grad_N1 * -torch.expm1(logp_N[:, None])
    for at in _chunks(logits_NV) if vocabulary else []:
        z_RV = _capped(logits_NV[at], softcap, dtype)
        log_p_RV = z_RV / divisor_N1[at]
        lost_R1 = lost_of(log_p_RV.gather(1, ids_N1[at]), logp_N[at, None], lse_N[at, None])
        log_p_RV -= lse_N[at, None]
        log_p_RV -= torch.where(known_N1[at], lost_R1, 0)
        p_RV = log_p_RV.exp()
        d_RV = p_RV * minus_N1[at]
        d_RV.scatter_(1, ids_N1[at], torch.where(known_N1[at], target_N1[at], d_RV.gather(1, ids_N1[at])))
        if grad_entropy_N is not None:
            grad_R1 = grad_entropy_N.to(dtype)[at, None] / divisor_N1[at]
            d_RV -= grad_R1 * p_RV * (_finite(log_p_RV) + entropy_N[at, None])
        if softcap:
            d_RV *= 1 - (z_RV / softcap).square()
        out_NV[at] = d_RV
    return out_NV
