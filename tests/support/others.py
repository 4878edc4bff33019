"""Other projects' definitions, each written from its mathematics in plain torch, for
tests/docs/test_definitions.py.

safe-rlhf is PKU-Alignment/safe-rlhf. `check_against_packages` holds the functions against the packages that
can be imported. B rows, T tokens a row, V vocabulary.
"""

import torch
from tolerance import assert_near

INFINITY = float("inf")


def log_softmax_gather(logits, ids):
    """safe-rlhf's gather_log_probabilities; what TRL's and verl's row loops come to."""
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def entropy_p_log_p(logits):
    """TRL's entropy_from_logits."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def entropy_lse(logits):
    """verl's entropy_from_logits; also Liger's beside its scaled cross-entropy and TRL's in its chunked
    path.
    """
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def chunked_logp(logits, ids, chunk, temperature=1.0, softcap=None):
    """TRL's ChunkedLogProbFunction behind the matmul: chunks of the vocabulary; the target starts at 0 and is
    taken from the chunk that has it, if any has.
    """
    z = (logits if softcap is None else softcap * (logits / softcap).tanh()) / temperature
    target, lse = torch.zeros_like(z[..., 0]), torch.full_like(z[..., 0], -INFINITY)
    for start in range(0, z.shape[-1], chunk):
        part = z[..., start : start + chunk]
        lse = torch.logaddexp(lse, part.logsumexp(-1))
        here = (ids >= start) & (ids < start + part.shape[-1])
        near = (ids - start).clamp(0, part.shape[-1] - 1)
        target = torch.where(here, part.gather(-1, near[..., None])[..., 0], target)
    return target - lse


def chunked_extras(products, ids, temperature=1.0, softcap=None, logit_scale=1.0):
    """TRL's ChunkedLogProbFunction behind the matmul, in one chunk: (log sum p², the mean logit, is_top1) in
    the dtype of the products. A tie with an earlier token is not the top; neither is a NaN, nor -inf alone.
    """
    z = products * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) * (1 / temperature)
    highest, at = z.amax(-1), ids[:, None]
    e = (z - highest[:, None]).exp()
    earlier = torch.arange(z.shape[-1]) < at
    target, before = z.gather(-1, at)[:, 0], z.masked_fill(~earlier, -INFINITY).amax(-1)
    sums = (e * e).sum(-1).log() - 2 * e.sum(-1).log()
    return sums, z.mean(-1), (target >= highest) & (target > before)


def nll_with_ignored(logits, ids, ignored=-100):
    """Liger's LigerFusedLinearScaledCrossEntropyFunction behind the matmul: the negative, and 0 where the id
    is `ignored`.
    """
    logp = log_softmax_gather(logits, torch.where(ids == ignored, 0, ids))
    return torch.where(ids == ignored, 0.0, -logp)


def gae_zeroed(values, rewards, mask, start, gamma, lam):
    """safe-rlhf's get_advantages_and_returns: masked entries count as 0, columns before `start` are left
    out.
    """
    values, rewards = values * mask, rewards * mask
    advantage, after, out = 0.0, 0.0, []
    for t in reversed(range(start, values.shape[1])):
        advantage = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * advantage
        after = values[:, t]
        out.append(advantage)
    advantages = torch.stack(out[::-1], 1)
    return advantages, advantages + values[:, start:]


def gae_carried(rewards, values, mask, gamma, lam):
    """verl's compute_gae_advantage_return before it whitens: a masked token hands on what it got."""
    m = mask.to(values.dtype)
    advantage, after, out = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(values.shape[1])):
        new = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * advantage
        after = m[:, t] * values[:, t] + (1 - m[:, t]) * after
        advantage = m[:, t] * new + (1 - m[:, t]) * advantage
        out.append(advantage)
    advantages = torch.stack(out[::-1], 1)
    return advantages, advantages + values


def sample_whitened(x, mask):
    """verl's and TRL's masked_whiten: mean 0, sample variance (n - 1) 1, 1e-8 added to it."""
    kept = x[mask]
    return (x - kept.mean()) * (kept.var(unbiased=True) + 1e-8).rsqrt()


def shaped(score, logp, ref_logp, mask, kl_coeff, clip, sign):
    """safe-rlhf's add_kl_divergence_regularization: penalty, score at the last valid token, then the
    clamp.
    """
    out = -sign * kl_coeff * (logp - ref_logp)
    for row, score_of_row in enumerate(score):
        out[row, mask[row].nonzero()[-1]] += score_of_row
    return out.clamp(-clip, clip)


def mean_of_means(x, mask):
    """safe-rlhf's masked_mean; verl's "seq-mean-token-mean" where no row is empty."""
    return ((x * mask).sum(1) / mask.sum(1)).mean()


def surrogate(logp, old_logp, advantage, clip, limit=None, dual=None):
    """Per token. safe-rlhf's actor_loss_fn, TRL's and Liger's GRPO: no limit. verl's compute_policy_loss:
    limit 20, dual 3.
    """
    ratio = (logp - old_logp if limit is None else (logp - old_logp).clamp(-limit, limit)).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return loss if dual is None else torch.where(advantage < 0, torch.minimum(loss, -advantage * dual), loss)


def k3(logp, ref_logp, limit=None, ceiling=None):
    """TRL's and Liger's KL term; verl's kl_penalty("k3") with limit 20 and ceiling 10."""
    gap = ref_logp - logp if limit is None else (ref_logp - logp).clamp(-limit, limit)
    kl = gap.exp() - gap - 1
    return kl if ceiling is None else kl.clamp(-ceiling, ceiling)


def value_error(values, old_values, returns, clip):
    """Per token: safe-rlhf's critic_loss_fn, verl's compute_value_loss (both halve the mean)."""
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def check_against_packages(logits, ids, mask, rewards, values, logp, old_logp, advantage):
    """The functions above give what the installed packages give (float32 inputs) -> the names of these
    packages.
    """
    found = []
    identity = torch.eye(logits.shape[-1])
    hidden, targets = logits.reshape(-1, logits.shape[-1]), ids.reshape(-1)
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer import utils as trl
    except ImportError:
        pass
    else:
        assert_near(
            trl.selective_log_softmax(logits, ids, temperature=0.7), log_softmax_gather(logits / 0.7, ids)
        )
        assert_near(trl.entropy_from_logits(logits), entropy_p_log_p(logits))
        targets_and_unknown = torch.cat([targets[:-1], torch.tensor([logits.shape[-1]])])
        got, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, identity, None, targets_and_unknown, 0.7, 10, 5.0
        )
        assert_near(got, chunked_logp(hidden, targets_and_unknown, 10, 0.7, 5.0))
        assert_near(entropy, entropy_lse(5 * (hidden / 5).tanh() / 0.7))
        _, _, *extras = ChunkedLogProbFunction.apply(hidden, identity, None, targets, 0.7, 10, 5.0, 0.3)
        for got, written in zip(extras, chunked_extras(hidden, targets, 0.7, 5.0, 0.3)):
            assert torch.equal(got, written) if got.dtype == torch.bool else assert_near(got, written) is None
        found.append("trl")
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction as liger,
        )
    except ImportError:
        pass
    else:
        ignored = torch.cat([targets[:-1], torch.tensor([-100])])
        got, entropy = liger.apply(hidden, identity, ignored, 0.7, -100, 1, True)
        assert_near(got, nll_with_ignored(hidden / 0.7, ignored))
        assert_near(entropy[:-1], entropy_lse(hidden / 0.7)[:-1])
        found.append("liger")
    try:
        from verl.trainer.ppo import core_algos as verl
        from verl.utils import torch_functional
    except ImportError:
        pass
    else:
        assert_near(torch_functional.logprobs_from_logits(logits, ids), log_softmax_gather(logits, ids))
        assert_near(torch_functional.entropy_from_logits(logits), entropy_lse(logits))
        assert_near(torch_functional.masked_whiten(values, mask), sample_whitened(values, mask))
        carried, returns = gae_carried(rewards, values, mask, 0.97, 0.9)
        whitened, got = verl.compute_gae_advantage_return(rewards, values, mask.float(), 0.97, 0.9)
        assert_near(got, returns)
        assert_near(whitened[mask], sample_whitened(carried, mask)[mask])
        loss = verl.compute_policy_loss(old_logp, logp, advantage, mask.float(), cliprange=0.2)[0]
        assert_near(loss, surrogate(logp, old_logp, advantage, 0.2, 20.0, 3.0)[mask].mean())
        assert_near(verl.kl_penalty(logp * 9, old_logp, "k3"), k3(logp * 9, old_logp, 20.0, 10.0))
        loss = verl.compute_value_loss(values, rewards, logp, mask.float(), 0.5)[0]
        assert_near(loss, 0.5 * value_error(values, logp, rewards, 0.5)[mask].mean())
        found.append("verl")
    return found
