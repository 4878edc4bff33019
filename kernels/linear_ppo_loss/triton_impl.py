"""linear_ppo_loss on a GPU: torch's matrix products in chunks, Triton on the rows (ppo_loss_from_logits)."""

from .. import linear
from ..ppo_loss_from_logits import triton_impl as rows


def linear_ppo_loss(*arguments):
    """See the reference."""
    return linear.policy_gradients(rows.ppo_loss_from_logits, *arguments, narrow=True)
