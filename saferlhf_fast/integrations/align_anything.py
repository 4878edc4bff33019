"""align-anything, from a checkout: sources are compared by digest.

Its trainer modules have many dependencies (audio, images, vLLM), so only those that are imported already are
patched. After a later import call `patch("align_anything")` again.
"""

from . import pku
from .registry import Library, Replace

TRAINERS = "align_anything.trainers"
GAE, CRITIC, ACTOR, LAGRANGIAN = "5fef6d4a95a0", "adc591f79279", "6c8757781452", "f76990b3aa86"


def _gae(module: str, name: str) -> Replace:
    return Replace(
        f"{TRAINERS}.{module}:{name}.get_advantages_and_returns",
        pku.get_advantages_and_returns,
        "(self, values, rewards, sequence_mask, start)",
        "one launch instead of a Python loop over tokens; masked entries are never read",
        digests=(GAE,),
        loaded=True,
        dtype_of=("values", "rewards", "sequence_mask"),
    )


def _critic(module: str, name: str) -> Replace:
    return Replace(
        f"{TRAINERS}.{module}:{name}.critic_loss_fn",
        pku.critic_loss_fn,
        "(self, values, old_values, returns, mask)",
        "loss and gradient in one pass; a row without tokens does not make it NaN",
        digests=(CRITIC,),
        loaded=True,
        dtype_of=("values", "old_values", "returns", "mask"),
    )


def _actor(module: str, name: str) -> Replace:
    return Replace(
        f"{TRAINERS}.{module}:{name}.actor_loss_fn",
        pku.actor_loss_fn,
        "(self, log_probs, old_log_probs, advantages, mask)",
        "loss and gradient in one pass; a row without tokens does not make it NaN, nor a large ratio",
        digests=(ACTOR,),
        loaded=True,
        dtype_of=("log_probs", "old_log_probs", "advantages", "mask"),
    )


LIBRARY = Library(
    name="align_anything",
    distribution=None,
    versions=(),
    replace=(
        Replace(
            "align_anything.utils.tools:gather_log_probabilities",
            pku.gather_log_probabilities,
            "(logits, labels)",
            "no copy of the logits; float32 results (its own: off by .01 in bfloat16), empty batches",
            digests=("2bb235c0f30d",),
            dtype_of=("logits",),
        ),
        _gae("text_to_text.ppo", "PPOTrainer"),
        _critic("text_to_text.ppo", "PPOTrainer"),
        _actor("text_to_text.ppo", "PPOTrainer"),
        _critic("text_to_text.multi_ppo", "PPOTrainer"),
        _actor("text_to_text.multi_ppo", "PPOTrainer"),
        _gae("text_to_text.ppo_remote_rm", "PPOTrainerRemoteRM"),
        _critic("text_to_text.ppo_remote_rm", "PPOTrainerRemoteRM"),
        _actor("text_to_text.ppo_remote_rm", "PPOTrainerRemoteRM"),
        _gae("text_image_to_text.ppo", "PPOTrainer"),
        _gae("text_audio_to_text.ppo", "PPOTrainer"),
        _gae("text_image_to_text.saferlhf", "SafeRLHFVTrainer"),
        Replace(
            f"{TRAINERS}.text_image_to_text.saferlhf:SafeRLHFVTrainer.actor_loss_fn_with_cost",
            pku.lagrangian_actor_loss_fn,
            "(self, log_probs, old_log_probs, reward_advantages, cost_advantages, mask)",
            "loss and gradient in one pass; λ stays on the device; a row without tokens does not make it NaN",
            digests=(LAGRANGIAN,),
            loaded=True,
            dtype_of=("log_probs", "old_log_probs", "reward_advantages", "cost_advantages", "mask"),
        ),
    ),
    leave=(
        (
            f"{TRAINERS}.text_to_text.multi_ppo:PPOTrainer.get_advantages_and_returns",
            "GAE over several turns, which our op does not compute",
        ),
        ("align_anything.utils.tools:masked_mean", "a mean; that of a row without tokens stays NaN"),
    ),
)
