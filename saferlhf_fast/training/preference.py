"""Stages reward and cost: a score model from preferences. The cost model's loss adds the safety-sign terms.

    saferlhf-fast reward model=DIR data=FILE output=DIR
    saferlhf-fast cost   model=DIR data=FILE output=DIR

Scores: reward R, higher is more helpful; cost C, higher is more harmful and C > 0 means unsafe. The loss
of pairs is in pair_loss.py. Importing this file needs torch alone; the stages need the extra `train`.

Source: Dai et al. (2023), Safe RLHF, arXiv 2310.12773, equations 5 and 6, and its reference implementation.
"""

from typing import TYPE_CHECKING, Any

from .pair_loss import pair_loss

__all__ = ["pair_loss", "train_cost", "train_reward"]

if TYPE_CHECKING:
    from ..config.stages import PreferenceConfig


def train_reward(cfg: "PreferenceConfig", restart: bool = False) -> dict[str, Any]:
    """Runs the stage reward: a score model R that ranks helpful responses above others.

    Writes the kept model to <output>/model, metrics and checkpoints. Every rank must call it.

    Args:
        cfg: Settings of the stage.
        restart: As in `run_folder.open_run`.

    Returns:
        The summary of the run: steps, losses (nats per pair), accuracies, the kept step, counts of the data.

    Raises:
        UserError: If settings, model or data do not fit together.
        NonFinite: If too many steps in a row gave numbers that are not finite.

    Source:
        Dai et al. (2023), Safe RLHF, arXiv 2310.12773, equation 5.
    """
    from .train_score_model import train_score_model

    return train_score_model(cfg, "reward", restart)


def train_cost(cfg: "PreferenceConfig", restart: bool = False) -> dict[str, Any]:
    """Runs the stage cost: a score model C that ranks harmful responses higher, with C > 0 for unsafe ones.

    Writes the kept model to <output>/model, metrics and checkpoints. Every rank must call it.

    Args:
        cfg: Settings of the stage.
        restart: As in `run_folder.open_run`.

    Returns:
        The summary of the run, as `train_reward` gives it, with the accuracy of the signs.

    Raises:
        UserError: If settings, model or data do not fit together.
        NonFinite: If too many steps in a row gave numbers that are not finite.

    Source:
        Dai et al. (2023), Safe RLHF, arXiv 2310.12773, equation 6.
    """
    from .train_score_model import train_score_model

    return train_score_model(cfg, "cost", restart)
