"""safe-rlhf, from a checkout: sources are compared by digest.

It is on no package index, and its version does not change.
"""

from . import pku
from .registry import Library, Replace

RL = "safe_rlhf.trainers.rl_trainer:RLTrainer"
PPO = "safe_rlhf.algorithms.ppo.trainer:PPOTrainer"
LAG = "safe_rlhf.algorithms.ppo_lag.trainer:PPOLagTrainer"

LIBRARY = Library(
    name="safe_rlhf",
    distribution=None,
    versions=(),
    replace=(
        Replace(
            "safe_rlhf.utils:gather_log_probabilities",
            pku.gather_log_probabilities,
            "(logits, labels)",
            "no copy of the logits; float32 results (its own: off by .01 in bfloat16), empty batches",
            digests=("36087f953fdc",),
            dtype_of=("logits",),
        ),
        Replace(
            f"{RL}.get_advantages_and_returns",
            pku.get_advantages_and_returns,
            "(self, values, rewards, sequence_mask, start)",
            "one launch instead of a Python loop over tokens; masked entries are never read",
            digests=("5fef6d4a95a0",),
            dtype_of=("values", "rewards", "sequence_mask"),
        ),
        Replace(
            f"{RL}.critic_loss_fn",
            pku.critic_loss_fn,
            "(self, values, old_values, returns, mask)",
            "loss and gradient in one pass; a row without tokens does not make it NaN",
            digests=("adc591f79279",),
            dtype_of=("values", "old_values", "returns", "mask"),
        ),
        Replace(
            f"{PPO}.actor_loss_fn",
            pku.actor_loss_fn,
            "(self, log_probs, old_log_probs, advantages, mask)",
            "loss and gradient in one pass; a row without tokens does not make it NaN, nor a large ratio",
            digests=("6c8757781452",),
            dtype_of=("log_probs", "old_log_probs", "advantages", "mask"),
        ),
        Replace(
            f"{LAG}.actor_loss_fn",
            pku.lagrangian_actor_loss_fn,
            "(self, log_probs, old_log_probs, reward_advantages, cost_advantages, mask)",
            "loss and gradient in one pass; λ stays on the device; a row without tokens does not make it NaN",
            digests=("3e06140d264b",),
            dtype_of=("log_probs", "old_log_probs", "reward_advantages", "cost_advantages", "mask"),
        ),
    ),
    leave=(
        ("safe_rlhf.utils:masked_mean", "a mean; that of a row without tokens stays NaN"),
        (f"{LAG}.add_kl_divergence_regularization", "elementwise, and a search for each row's end"),
        (
            f"{LAG}.rl_step",
            "λ's update, a plain gradient on log λ: saferlhf_fast.LagrangeMultiplier is the same rule",
        ),
    ),
)
