"""The gradient of the policy objective over rows of logits in plain torch, any float dtype: the definition."""

import torch

from ..ppo_loss.reference import policy_terms
from ..token_logprob.reference import token_logprob, token_logprob_backward


def ppo_loss_from_logits(
    logits_NV,
    ids_N,
    old_logp_N,
    advantage_N,
    ref_logp_N,
    weight_N,
    clip_ratio,
    clip_high,
    dual_clip,
    kl_coeff,
    k1,
    entropy_coeff,
    temperature,
    temperature_N,
    softcap,
    out_NV,
):
    """Writes d sum(weight * objective) / d logits into out_NV -> (logp_N, entropy_N); weight 0 is masked: all
    of it 0.

    out_NV may be logits_NV, or begin where each of its rows begins with narrower elements.
    """
    logp_N, entropy_N, lse_N = token_logprob(logits_NV, ids_N, temperature, temperature_N, softcap, True)
    on_N = weight_N != 0
    terms = policy_terms(
        logp_N,
        old_logp_N,
        advantage_N,
        ref_logp_N,
        None,
        clip_ratio,
        clip_high,
        dual_clip,
        kl_coeff,
        k1,
        entropy_coeff,
    )
    grad_logp_N = torch.where(on_N, weight_N * terms.d_logp, 0)
    grad_entropy_N = torch.where(on_N, -weight_N * entropy_coeff, 0) if entropy_coeff else None
    token_logprob_backward(
        logits_NV,
        ids_N,
        logp_N,
        entropy_N,
        lse_N,
        grad_logp_N,
        grad_entropy_N,
        temperature,
        temperature_N,
        softcap,
        out_NV,
    )
    out_NV.masked_fill_(~on_N[:, None], 0)
    return torch.where(on_N, logp_N, 0), torch.where(on_N, entropy_N, 0)
