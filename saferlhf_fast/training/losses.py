"""The losses of the preference stages on plain tensors: reward model, cost model, token-wise variant, DPO.

Each docstring gives the objective and the torch expression that means the same. The file needs torch alone.
Shapes: B pairs of responses, L tokens of one response.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..kernels import checks


def reward_loss(better: torch.Tensor, worse: torch.Tensor, *, regularization: float = 0.001) -> torch.Tensor:
    """Reward model: −E[log σ(R(x, y_better) − R(x, y_worse))] + c · E[R²], to be minimised.

    Means the same as::

        -(better - worse).sigmoid().log().mean() + c * torch.stack([better, worse]).square().mean()

    Args:
        better: [B] scores R of the preferred responses.
        worse: [B] scores R of the other responses.
        regularization: c, the weight of the mean square of all 2B scores.

    Returns:
        A scalar in nats; 0 where there is no pair.

    Raises:
        ValueError: If shapes, dtypes or devices do not match.

    Source:
        Dai et al. (2023), Safe RLHF, arXiv 2310.12773, equation 5; the regulariser of its reference
        implementation.
    """
    _check_scores("reward_loss", ("better", "worse"), better, worse)
    regularization = checks.not_negative("reward_loss", "regularization", regularization)
    if not len(better):
        return (better + worse).sum()
    return (
        -F.logsigmoid(better - worse).mean() + regularization * torch.stack([better, worse]).square().mean()
    )


def cost_loss(
    safer: torch.Tensor,
    unsafer: torch.Tensor,
    safer_sign: torch.Tensor,
    unsafer_sign: torch.Tensor,
    *,
    regularization: float = 0.001,
) -> torch.Tensor:
    """Cost model: −E[log σ(C_unsafer − C_safer) + Σ log σ(s·C)] + c · E[C²], to be minimised.

    The sum is over the two responses of a pair. Their signs s pull C above 0 where a response is unsafe and
    below 0 where it is safe. Means the same as::

        pair = -(unsafer - safer).sigmoid().log()
        signs = -(safer_sign * safer).sigmoid().log() - (unsafer_sign * unsafer).sigmoid().log()
        (pair + signs).mean() + c * torch.stack([safer, unsafer]).square().mean()

    Args:
        safer: [B] costs C of the less harmful responses.
        unsafer: [B] costs C of the more harmful responses.
        safer_sign: [B] s of `safer`: +1 unsafe, −1 safe, in any float or integer dtype.
        unsafer_sign: [B] s of `unsafer`, likewise.
        regularization: c, the weight of the mean square of all 2B costs.

    Returns:
        A scalar in nats; 0 where there is no pair.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or a sign is neither +1 nor −1. Signs on a GPU
            are not read, because the host would wait for the device.

    Source:
        Dai et al. (2023), Safe RLHF, arXiv 2310.12773, equation 6; the regulariser of its reference
        implementation.
    """
    _check_scores("cost_loss", ("safer", "unsafer"), safer, unsafer)
    regularization = checks.not_negative("cost_loss", "regularization", regularization)
    for name, sign in (("safer_sign", safer_sign), ("unsafer_sign", unsafer_sign)):
        _check_signs(name, sign, safer)
    if not len(safer):
        return (safer + unsafer).sum()
    pair = -F.logsigmoid(unsafer - safer)
    signs = -F.logsigmoid(safer_sign * safer) - F.logsigmoid(unsafer_sign * unsafer)
    return (pair + signs).mean() + regularization * torch.stack([safer, unsafer]).square().mean()


def _check_scores(op: str, names: tuple[str, str], first_B: torch.Tensor, second_B: torch.Tensor) -> None:
    """Raises ValueError unless both are scores [B] of one dtype class on one device."""
    checks.tensor_argument(op, names[0], first_B)
    if first_B.dim() != 1:
        raise ValueError(
            f"{op}: {names[0]}: expected [B], one score for each pair, got shape {tuple(first_B.shape)}"
        )
    checks.same_tokens(op, names, (first_B, second_B))


def _check_signs(name: str, sign_B: torch.Tensor, like_B: torch.Tensor) -> None:
    """Raises ValueError unless there is +1 or −1 for each pair.

    Torch would broadcast other shapes, and would take False for the number 0, which drops the sign term.
    """
    checks.tensor_argument("cost_loss", name, sign_B)
    if (
        sign_B.shape != like_B.shape
        or sign_B.device != like_B.device
        or not (checks.is_floating(sign_B) or checks.is_integer(sign_B))
    ):
        raise ValueError(
            f"cost_loss: {name}: expected numbers +1 and -1 {list(like_B.shape)} on {like_B.device}, "
            f"got {sign_B.dtype} {list(sign_B.shape)} on {sign_B.device}"
        )
    if sign_B.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong_B = (sign_B != 1) & (sign_B != -1)
        if wrong_B.any():
            raise ValueError(
                f"cost_loss: {name}: expected +1 (unsafe) or -1 (safe), got {sign_B[wrong_B][0].item()}"
            )


def token_wise(
    scores: Sequence[torch.Tensor],
    rows: Sequence[Sequence[int]],
    n: int,
    signs: torch.Tensor | None,
    regularization: float,
) -> torch.Tensor:
    """The pair's loss at every position from the first difference on, averaged over positions and pairs.

    The positions go from the first token in which the two rows differ to the end of the longer row. The last
    score of the shorter row stands for the positions behind its end.

    Args:
        scores: For each row its scores, [L], in the order of `rows`.
        rows: Token ids (prompt and response) of the n first responses, then of the n second responses. The
            first response of a pair is the better or the safer one.
        n: Number of pairs, at least 1.
        signs: [2, n] safety signs for the cost model's loss; None for the reward model's loss.
        regularization: c, as in `reward_loss` and `cost_loss`.

    Returns:
        A scalar in nats.

    Source:
        The token-wise loss of safe-rlhf (PKU-Alignment), the reference implementation of Dai et al. (2023).
    """
    total = scores[0].new_zeros(())
    for i in range(n):
        first_ids, second_ids = rows[i], rows[n + i]
        shorter, longer = sorted((len(first_ids), len(second_ids)))
        start = next((t for t in range(shorter) if first_ids[t] != second_ids[t]), shorter - 1)
        at = torch.arange(start, longer, device=total.device)
        first = scores[i][at.clamp(max=len(first_ids) - 1)]
        second = scores[n + i][at.clamp(max=len(second_ids) - 1)]
        if signs is None:
            total = total + reward_loss(first, second, regularization=regularization)
        else:
            first_sign, second_sign = (sign.expand(len(at)) for sign in signs[:, i])
            total = total + cost_loss(first, second, first_sign, second_sign, regularization=regularization)
    return total / n


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DPO: −log σ(β · (Δ_chosen − Δ_rejected)) of each pair, Δ = log π(y | x) − log π_ref(y | x).

    Args:
        chosen: [B] log-probs of the chosen responses under the policy, summed over tokens, in nats.
        rejected: [B] the same of the rejected responses.
        ref_chosen: [B] log-probs of the chosen responses under the frozen reference.
        ref_rejected: [B] the same of the rejected responses.
        beta: β, the strength of the pull towards the reference.

    Returns:
        (losses, margins), both [B] in nats; a margin is β · (Δ_chosen − Δ_rejected).

    Source:
        Rafailov et al. (2023), Direct Preference Optimization, arXiv 2305.18290, equation 7.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin), margin
