"""Microseconds a call at small sizes, where Python's overhead is most of it: eager torch and this library.

Run from the checkout: OMP_NUM_THREADS=1 python bench/small_calls.py
It prints the table of docs/benchmarks.md. Both versions take turns; each number is the lower of two medians.
"""

import statistics
import time
from types import SimpleNamespace

import eager
import torch

import saferlhf_fast

SECONDS = 0.25
CLIP = eager.CLIP


def median(call):
    """Microseconds of a call, after a warm-up."""
    for _ in range(20):
        call()
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 50:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def row(name, ours, theirs):
    """Prints a row of the table."""
    pairs = [(median(ours), median(theirs)) for _ in range(2)]
    mine, other = (min(column) for column in zip(*pairs))
    print(f"| {name} | {other:.0f} µs | {mine:.0f} µs | {other / mine:.2f}x |", flush=True)


def both(name, ours, theirs, leaves, upstream=None):
    """The row of forward and backward."""
    row(
        f"{name} forward + backward",
        lambda: torch.autograd.grad(ours(), leaves, upstream),
        lambda: torch.autograd.grad(theirs(), leaves, upstream),
    )


def of_logits(tokens, vocabulary):
    logits = (torch.randn(tokens, vocabulary) * 3).requires_grad_()
    ids, upstream = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
    old_logp_N = eager.logprob(logits, ids).detach() + 0.1 * torch.randn(tokens)
    batch = SimpleNamespace(ids_N=ids, old_logp_N=old_logp_N, advantage_N=torch.randn(tokens))
    policy = (ids, batch.old_logp_N, batch.advantage_N)
    at, plain = f"{tokens}x{vocabulary}", logits.detach()
    logprob, fused = saferlhf_fast.token_logprob, saferlhf_fast.ppo_loss_from_logits
    row(f"token_logprob {at}", lambda: logprob(plain, ids), lambda: eager.logprob(plain, ids))
    row(
        f"token_logprob + entropy {at}",
        lambda: logprob(plain, ids, return_entropy=True),
        lambda: eager.logprob_entropy(plain, ids),
    )
    both(
        f"token_logprob {at}",
        lambda: logprob(logits, ids),
        lambda: eager.logprob(logits, ids),
        logits,
        upstream,
    )
    both(
        f"ppo_loss_from_logits {at}",
        lambda: fused(logits, *policy, clip_ratio=CLIP)[0],
        lambda: eager.ppo_from_logits(logits, batch),
        logits,
    )


def of_head(tokens, width, vocabulary):
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width) * 0.1
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    ids, upstream = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
    old_logp_N = eager.linear_logprob(*leaves, ids).detach() + 0.1 * torch.randn(tokens)
    batch = SimpleNamespace(ids_N=ids, old_logp_N=old_logp_N, advantage_N=torch.randn(tokens))
    policy = (ids, batch.old_logp_N, batch.advantage_N)
    at, head, fused = (
        f"{tokens}x{width}x{vocabulary}",
        saferlhf_fast.linear_logprob,
        saferlhf_fast.linear_ppo_loss,
    )
    both(
        f"linear_logprob {at}",
        lambda: head(*leaves, ids),
        lambda: eager.linear_logprob(*leaves, ids),
        leaves,
        upstream,
    )
    both(
        f"linear_ppo_loss {at}",
        lambda: fused(*leaves, *policy, clip_ratio=CLIP)[0],
        lambda: eager.linear_ppo(*leaves, batch),
        leaves,
    )


def of_tokens(rows, width):
    leaf, old, target, values = (torch.randn(rows, width) * 0.2 for _ in range(4))
    mask, at = torch.ones(rows, width, dtype=torch.bool), f"{rows}x{width}"
    mask[0, width // 2 :] = False
    leaf.requires_grad_()
    policy, value = saferlhf_fast.ppo_loss, saferlhf_fast.value_loss
    both(
        f"ppo_loss {at}",
        lambda: policy(leaf, old, target, clip_ratio=CLIP, mask=mask)[0],
        lambda: eager.ppo_loss(leaf, old, target, mask),
        leaf,
    )
    both(
        f"value_loss {at}",
        lambda: value(leaf, old, target, clip_value=CLIP, mask=mask)[0],
        lambda: eager.value_loss(leaf, old, target, mask),
        leaf,
    )
    settings = dict(gamma=eager.GAMMA, lam=eager.LAM, mask=mask)
    row(
        f"gae {at}",
        lambda: saferlhf_fast.gae(old, values, **settings),
        lambda: eager.gae_chunked(old, values, mask),
    )
    reward, cost, multiplier = torch.randn(rows), torch.randn(rows), torch.tensor(0.6)
    tokens = (old, target, reward, cost, values, values, multiplier)
    settings |= dict(kl_coeff=eager.KL, clip_score=eager.CLIP_SCORE)
    row(
        f"ppo_lag_advantage {at}",
        lambda: saferlhf_fast.ppo_lag_advantage(*tokens, **settings),
        lambda: eager.advantage_chunked(*tokens, mask),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| call | eager | saferlhf-fast | faster than eager |\n|---|---:|---:|---:|")
    for shape in ((1, 1000), (8, 1000), (32, 1000), (64, 2000)):
        of_logits(*shape)
    of_head(32, 64, 1000)
    for shape in ((2, 16), (8, 128)):
        of_tokens(*shape)
