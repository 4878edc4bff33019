"""The losses of preference stages on plain tensors: reward, cost and their token-wise variant, DPO.

Needs torch alone.

Source: Safe RLHF (arXiv 2310.12773), equations 5 and 6; DPO (arXiv 2305.18290), equation 7.
"""

import torch
import torch.nn.functional as F

from ..kernels import checks


def reward_loss(better: torch.Tensor, worse: torch.Tensor, *, regularization: float = 0.001) -> torch.Tensor:
    """mean(−log σ(better − worse)) + c · mean(score²).

    better, worse: [B] scores of the preferred and the other response -> scalar, in nats. c =
    `regularization`; the mean of squares is over both responses. Means the same as `-(better -
    worse).sigmoid().log().mean() + c * torch.stack([better, worse]).square().mean()`. No pair is no loss: 0.
    ValueError for shapes, dtypes or devices that do not fit.
    """
    _refuse_scores("reward_loss", ("better", "worse"), better, worse)
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
    """mean(−log σ(unsafer − safer) − log σ(s_safer·safer) − log σ(s_unsafer·unsafer)) + c · mean(score²).

    safer, unsafer: [B] costs of the less and the more harmful response; safer_sign, unsafer_sign: [B], +1
    unsafe, −1 safe, in any float or integer dtype -> scalar, in nats. c = `regularization`. No pair is no
    loss: 0. ValueError for shapes, dtypes or devices that do not fit, and for other signs; on a device nobody
    looks at them.
    """
    _refuse_scores("cost_loss", ("safer", "unsafer"), safer, unsafer)
    for name, sign in (("safer_sign", safer_sign), ("unsafer_sign", unsafer_sign)):
        _refuse_signs(name, sign, safer)
    if not len(safer):
        return (safer + unsafer).sum()
    pair = -F.logsigmoid(unsafer - safer)
    signs = -F.logsigmoid(safer_sign * safer) - F.logsigmoid(unsafer_sign * unsafer)
    return (pair + signs).mean() + regularization * torch.stack([safer, unsafer]).square().mean()


def _refuse_scores(op, names, first_B, second_B):
    if first_B.dim() != 1:
        raise ValueError(
            f"{op}: {names[0]}: expected [B], one score for each pair, got shape {tuple(first_B.shape)}"
        )
    checks.same_tokens(op, names, (first_B, second_B))


def _refuse_signs(name, sign_B, like_B):
    """ValueError for what is not +1 or −1 for each pair.

    Other shapes would be broadcast, False would count as no sign.
    """
    if (
        sign_B.shape != like_B.shape
        or sign_B.device != like_B.device
        or not (checks.floating(sign_B) or checks.whole(sign_B))
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


def token_wise(scores, rows, n, signs, regularization):
    """safe-rlhf's token-wise variant: the pair's loss at every position from the first difference of the two
    responses to the longer one's end, averaged over positions, then over pairs. A shorter response's last
    score stands for the positions after it. scores: one tensor for each row of ids; the second responses
    follow the n first ones.
    """
    total = scores[0].new_zeros(())
    for i in range(n):
        a, b = rows[i], rows[n + i]
        shorter = min(len(a), len(b))
        start = next((t for t in range(shorter) if a[t] != b[t]), shorter - 1)
        at = torch.arange(start, max(len(a), len(b)), device=total.device)
        first, second = scores[i][at.clamp(max=len(a) - 1)], scores[n + i][at.clamp(max=len(b) - 1)]
        if signs is None:
            total = total + reward_loss(first, second, regularization=regularization)
        else:
            of_pair = (sign.expand(len(at)) for sign in signs[:, i])
            total = total + cost_loss(first, second, *of_pair, regularization=regularization)
    return total / n


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    """[B] summed log-probs under policy and reference -> [B] losses and [B] margins β(Δchosen − Δrejected),
    in nats.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin), margin
