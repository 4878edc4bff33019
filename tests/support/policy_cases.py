"""Cases for the fused policy losses, and their definition in float64: log_softmax, the formulas, autograd.
Nothing of ours.
"""

import os

import torch

BIG = torch.float64
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # slow: smaller cases
LENGTHS = (3, 0, 1) if INTERPRETED else (5, 0, 3, 1)


class Case:
    """Hidden states, head and token vectors of a ragged batch (padded [B, T]), ratios near 1 so that some are
    clipped.
    """

    def __init__(
        self,
        lengths=LENGTHS,
        hidden=8,
        vocabulary=57,
        dtype=torch.float32,
        seed=0,
        device="cpu",
        slack=1 if INTERPRETED else 2,
    ):
        random = torch.Generator().manual_seed(seed)
        rows, width = len(lengths), max(lengths, default=0) + slack

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=BIG)

        self.dtype, self.device, self.lengths = dtype, device, list(lengths)
        self.mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).to(device)
        self.hidden = normal(rows, width, hidden).to(dtype).to(device)
        self.weight = (normal(vocabulary, hidden) * 0.4).to(dtype).to(device)
        self.bias = normal(vocabulary).to(dtype).to(device)
        self.ids = torch.randint(vocabulary, (rows, width), generator=random).to(device)
        kind = BIG if dtype == BIG else torch.float32
        logp = torch.log_softmax(self.logits(self.hidden, self.weight, self.bias), -1).gather(
            -1, self.ids[..., None].cpu()
        )
        near = logp.squeeze(-1) + 0.3 * normal(rows, width)
        self.old_logp, self.ref_logp = (
            near.to(kind).to(device),
            (near + 0.3 * normal(rows, width)).to(kind).to(device),
        )
        self.advantages = normal(rows, width).to(kind).to(device)

    def logits(self, hidden, weight, bias):
        return hidden.to("cpu", BIG) @ weight.to("cpu", BIG).t() + bias.to("cpu", BIG)

    def tokens(self):
        """(ids, old_logp, advantages)"""
        return self.ids, self.old_logp, self.advantages

    def packed(self, tensor):
        return tensor[self.mask]

    def cu_seqlens(self):
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32).to(self.device)


def definition(
    case,
    logits,
    *,
    clip_ratio,
    clip_high=None,
    dual_clip=None,
    kl_coeff=0.0,
    kl_estimator="k3",
    entropy_coeff=0.0,
    temperature=1.0,
    softcap=None,
    reduction="sequence-mean",
    normalizer=None,
    advantage_scale=1.0,
    advantage_shift=0.0,
    with_reference=True,
):
    """(loss, stats) in float64 by autograd's own means; logits [B, T, V] float64 on the CPU."""
    mask = case.mask.cpu()
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(
        z / (temperature.cpu().to(BIG)[..., None] if isinstance(temperature, torch.Tensor) else temperature),
        -1,
    )
    logp = log_p.gather(-1, case.ids.cpu()[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    advantage = case.advantages.cpu().to(BIG) * advantage_scale + advantage_shift
    log_ratio = (logp - case.old_logp.cpu().to(BIG)).clamp(-20, 20)
    ratio, low, high = log_ratio.exp(), 1 - clip_ratio, 1 + (clip_ratio if clip_high is None else clip_high)
    plain, other = -ratio * advantage, -ratio.clamp(low, high) * advantage
    usual = term = torch.maximum(plain, other)
    if dual_clip is not None:
        term = torch.where(advantage < 0, torch.minimum(usual, -dual_clip * advantage), usual)
    gap = case.ref_logp.cpu().to(BIG) - logp
    kl = -gap if kl_estimator == "k1" else gap.clamp(-20, 20).exp() - gap.clamp(-20, 20) - 1
    if with_reference:
        term = term + kl_coeff * kl
    term = term - entropy_coeff * entropy
    counts = mask.sum(1)
    if reduction == "token-mean":
        loss = term[mask].sum() / (normalizer or max(int(mask.sum()), 1))
    else:
        rows = [term[row][mask[row]].mean() for row in range(len(counts)) if counts[row]]
        loss = sum(rows, logits.sum() * 0) / (normalizer or max(len(rows), 1))
    inside = mask.sum().clamp(min=1).to(BIG)
    stats = {
        "clip_fraction": (((ratio < low) | (ratio > high)) & mask).sum() / inside,
        "clipped": ((other > plain) & mask).sum() / inside,
        "log_ratio": (log_ratio * mask).sum() / inside,
        "approx_kl": ((ratio - 1 - ratio.log()) * mask).sum() / inside,
        "ratio": (ratio * mask).sum() / inside,
        "advantage": (advantage * mask).sum() / inside,
        "entropy": (entropy * mask).sum() / inside,
        "sequences": (counts > 0).sum().to(BIG),
        "tokens": mask.sum().to(BIG),
    }
    if dual_clip is not None:
        stats["dual_clipped"] = ((-dual_clip * advantage < usual) & (advantage < 0) & mask).sum() / inside
    if with_reference:
        stats["ref_kl"] = (kl * mask).sum() / inside
    return loss, stats


OPTIONS = [
    dict(),
    dict(kl_coeff=0.3, kl_estimator="k3", entropy_coeff=0.1),
    dict(kl_coeff=0.3, kl_estimator="k1", reduction="token-mean"),
    dict(entropy_coeff=0.2, temperature=0.7, softcap=3.0, normalizer=7.0),
    dict(advantage_scale=1.5, advantage_shift=-0.25, reduction="token-mean", normalizer=30.0),
    dict(clip_high=0.5, dual_clip=1.1, kl_coeff=0.3, entropy_coeff=0.1, reduction="token-mean"),
]
