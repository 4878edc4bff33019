"""The plain torch code of other libraries, one function per op.

These are the "eager" rows, and the input of torch.compile. They contain only the formulas: no chunking to
save memory, no fused kernel. The loops over T are those of safe-rlhf, verl and TRL; the chunked scan is the
lower-triangular product that THUDM/slime uses, written from the formula A_t = sum_s>=t a^(s-t) delta_s.
"""

import torch

CLIP = 0.2
LAM, GAMMA, KL, CLIP_SCORE = 0.95, 1.0, 0.01, 50.0


def logprob(logits_NV, ids_N):
    return torch.log_softmax(logits_NV.float(), -1).gather(-1, ids_N[:, None]).squeeze(-1)


def logprob_entropy(logits_NV, ids_N):
    all_NV = torch.log_softmax(logits_NV.float(), -1)
    return all_NV.gather(-1, ids_N[:, None]).squeeze(-1), -(all_NV.exp() * all_NV).sum(-1)


def clipped(logp_N, batch):
    """The clipped policy loss of packed rows of equal length: the mean over all tokens."""
    ratio_N = (logp_N - batch.old_logp_N).exp()
    return -torch.minimum(
        ratio_N * batch.advantage_N, ratio_N.clamp(1 - CLIP, 1 + CLIP) * batch.advantage_N
    ).mean()


def ppo_from_logits(logits_NV, batch):
    return clipped(logprob(logits_NV, batch.ids_N), batch)


def linear_logprob(hidden_NH, weight_VH, ids_N):
    return logprob(hidden_NH @ weight_VH.T, ids_N)


def linear_ppo(hidden_NH, weight_VH, batch):
    return clipped(linear_logprob(hidden_NH, weight_VH, batch.ids_N), batch)


def ppo_loss(logp, old_logp, advantages, mask):
    ratio = (logp - old_logp).exp()
    term = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return -((term * mask).sum(1) / mask.sum(1)).mean()


def value_loss(values, old_values, returns, mask):
    near = old_values + (values - old_values).clamp(-CLIP, CLIP)
    term = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * ((term * mask).sum(-1) / mask.sum(1)).mean(-1).sum()


def gae_loop(rewards, values, mask):
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    running, advantages = 0, []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        running = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * running
        advantages.append(running)
    advantages = torch.stack(advantages[::-1], 1)
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)


def gae_chunked(rewards, values, mask, chunk=128):
    """Computes GAE by one lower-triangular product per chunk, and a carry between chunks."""
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    count, width = rewards.shape
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta = torch.nn.functional.pad(rewards + GAMMA * following - values, (0, -width % chunk))
    at = torch.arange(chunk, device=delta.device)
    decay = GAMMA * LAM
    power = (decay ** (at[:, None] - at[None]).to(delta.dtype)).tril()
    local = delta.view(count, -1, chunk) @ power
    reach, carry, carries = decay ** (chunk - at).to(delta.dtype), torch.zeros_like(local[:, 0, 0]), []
    for index in reversed(range(local.shape[1])):
        carries.append(carry)
        carry = local[:, index, 0] + reach[0] * carry
    advantages = (local + torch.stack(carries[::-1], 1)[..., None] * reach).reshape(count, -1)[:, :width]
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)


def _shaped(logp, ref_logp, score, sign, mask):
    shaped = sign * KL * (logp - ref_logp)
    shaped[torch.arange(len(score), device=mask.device), mask.sum(1) - 1] += score
    return shaped.clamp(-CLIP_SCORE, CLIP_SCORE)


def _combined(reward, cost, multiplier):
    return (reward[0] - multiplier * cost[0]) / (1 + multiplier), reward[1], cost[1]


def advantage_loop(logp, ref_logp, reward, cost, reward_values, cost_values, multiplier, mask):
    """Computes advantages as safe-rlhf does: shaping, a Python loop over T per stream, combination."""
    return _combined(
        gae_loop(_shaped(logp, ref_logp, reward, -1, mask), reward_values, mask),
        gae_loop(_shaped(logp, ref_logp, cost, 1, mask), cost_values, mask),
        multiplier,
    )


def advantage_chunked(logp, ref_logp, reward, cost, reward_values, cost_values, multiplier, mask):
    """Computes the same with both streams stacked in one chunked product: the fastest form in plain torch."""
    shaped = torch.cat([_shaped(logp, ref_logp, reward, -1, mask), _shaped(logp, ref_logp, cost, 1, mask)])
    advantages, returns = gae_chunked(
        shaped, torch.cat([reward_values, cost_values]), torch.cat([mask, mask])
    )
    return _combined(*zip(advantages.chunk(2), returns.chunk(2)), multiplier)
