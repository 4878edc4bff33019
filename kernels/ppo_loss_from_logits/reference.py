"""The gradient of the policy objective over rows of logits in plain torch: the definition.

Any float dtype.
"""

import torch

from ..ppo_loss.reference import policy_terms
from ..token_logprob.reference import token_logprob, token_logprob_backward


def ppo_loss_from_logits(
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    old_logp_N: torch.Tensor,
    advantage_N: torch.Tensor,
    ref_logp_N: torch.Tensor | None,
    weight_N: torch.Tensor,
    clip_ratio: float,
    clip_high: float,
    dual_clip: float,
    kl_coeff: float,
    k1: bool,
    entropy_coeff: float,
    temperature: float,
    temperature_N: torch.Tensor | None,
    softcap: float,
    out_NV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes d sum(weight * objective) / d logits into out_NV.

    Args:
        logits_NV: Logits before softcap and temperature, any float dtype.
        ids_N: The tokens, integers in 0..V-1.
        old_logp_N: Log-probs of the policy that sampled, nats.
        advantage_N: Scaled and shifted already.
        ref_logp_N: Log-probs of the reference policy, nats; None for no KL term.
        weight_N: The token's weight in the loss; 0 means masked, and everything of the row is then 0.
        clip_ratio: A ratio below 1 - clip_ratio is clipped to that.
        clip_high: A ratio above 1 + clip_high is clipped to that.
        dual_clip: The largest ratio that counts where the advantage is negative; infinity for no bound.
        kl_coeff: Coefficient of the KL to the reference policy, per nat.
        k1: The KL estimator is k1, not k3.
        entropy_coeff: Coefficient of the entropy, per nat.
        temperature: One for all rows.
        temperature_N: One for each row, or None.
        softcap: 0 for none.
        out_NV: Is written, in its own dtype. It may be logits_NV, or begin where each of its rows begins with
            narrower elements.

    Returns:
        logp_N and entropy_N, in nats, 0 where the weight is 0; float64 for float64 logits, else float32.
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
