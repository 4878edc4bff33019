"""The policy objective's gradients from hidden states and a head's weight in plain torch: the definition,
logits and all.
"""

from ..linear import held
from ..linear_logprob.reference import gradients, logits_of
from ..ppo_loss_from_logits import reference as rows


def linear_ppo_loss(hidden_NH, weight_VH, ids_N, bias_V, tokens, objective, wanted, chunk_tokens):
    """(logp_N, entropy_N, (d hidden, d weight, d bias)); see linear.policy_gradients. chunk_tokens changes
    nothing here.
    """
    d_NV = logits_of(hidden_NH, weight_VH, bias_V)
    logp_N, entropy_N = rows.ppo_loss_from_logits(d_NV, ids_N, *tokens, *objective, d_NV)
    return logp_N, entropy_N, gradients(d_NV, hidden_NH, weight_VH, wanted, held(hidden_NH.dtype))
