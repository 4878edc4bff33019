"""Stages reward and cost: a score model from preferences. The cost model's loss adds the safety-sign terms.

    saferlhf-fast reward model=DIR data=FILE output=DIR
    saferlhf-fast cost   model=DIR data=FILE output=DIR

Scores: reward R, higher is more helpful; cost C, higher is more harmful and C > 0 means unsafe. The losses
are in losses.py. Importing this file needs torch alone; the stages need the extra `train`.

Source: Dai et al. (2023), Safe RLHF, arXiv 2310.12773, equations 5 and 6, and its reference implementation.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..models.packing import end_row, pack_sequences
from .losses import cost_loss, reward_loss, token_wise

if TYPE_CHECKING:
    from ..config.stages import PreferenceConfig
    from ..data.examples import PairExample


def pair_loss(
    model: Callable[..., torch.Tensor],
    examples: "Sequence[PairExample]",
    kind: str,
    regularization: float,
    per_token: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The reward or cost loss of some pairs, summed over pairs, and sums of what is reported.

    Args:
        model: A ScoreModel, or an engine that holds one.
        examples: Pairs, whose first response is the better (reward) or the safer (cost) one.
        kind: "reward" or "cost".
        regularization: c, the weight of the mean squared score.
        per_token: False for the loss on last-token scores, True for the token-wise variant.

    Returns:
        (the sum in nats, sums over pairs by name: accuracy, mean and mean square of the scores and, for
        costs, the accuracy of their signs).
    """
    from ..runtime import engine

    n = len(examples)
    rows = [e.first_ids for e in examples] + [e.second_ids for e in examples]
    packed = pack_sequences(
        rows, [range(len(ids)) if per_token else end_row(len(ids)) for ids in rows], engine.device()
    )
    scores_N = model(packed)
    ends_B = (packed.cu_seqlens[1:] - 1).long()
    end_B = scores_N.index_select(0, ends_B)
    first, second = end_B[:n], end_B[n:]
    signs = None
    if kind == "cost":
        signs = torch.tensor(
            [[e.sign_first for e in examples], [e.sign_second for e in examples]],
            device=end_B.device,
            dtype=end_B.dtype,
        )
    if per_token:
        loss = token_wise(scores_N.split([len(ids) for ids in rows]), rows, n, signs, regularization)
    elif signs is not None:
        loss = cost_loss(first, second, signs[0], signs[1], regularization=regularization)
    else:
        loss = reward_loss(first, second, regularization=regularization)
    ranked_right = first > second if kind == "reward" else first < second
    both = end_B.detach().view(2, n)
    stats = {
        "accuracy": ranked_right.float().sum(),
        f"{kind}_mean": both.mean(0).sum(),
        f"{kind}_square": both.square().mean(0).sum(),
    }
    if signs is not None:
        stats["accuracy_sign"] = ((end_B.view(2, n) * signs) > 0).float().mean(0).sum()
    return loss * n, stats


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
