"""linear_ppo_loss on the CPU: torch's matrix products in chunks, C++ on the rows
(csrc/ppo_loss_from_logits.cpp).
"""

from .. import linear
from ..ppo_loss_from_logits import native as rows


def linear_ppo_loss(*arguments):
    """See the reference."""
    return linear.policy_gradients(rows.ppo_loss_from_logits, *arguments, narrow=False)
