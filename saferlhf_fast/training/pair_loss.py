"""The loss of pairs of responses for a reward or a cost model, and the statistics that training reports.

Source: Dai et al. (2023), Safe RLHF, arXiv 2310.12773, equations 5 and 6, and its reference implementation.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..models.packing import end_row, pack_sequences
from .losses import cost_loss, reward_loss, token_wise

if TYPE_CHECKING:
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
        rows,
        [range(len(ids)) if per_token else end_row(len(ids)) for ids in rows],
        engine.device(),
        [e.second_at for e in (*examples, *examples)],
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
