"""Run by test_linear_ppo_loss.py in two processes: heads under ZeRO-3, and a vocabulary split over the ranks.

Each run is three steps of a two-layer model whose head is a module; what differs is how the head makes its
loss. Under ZeRO-3 the head's weight is there only inside the head's own forward and backward.
"""

import json
import os
import sys

import torch
import torch.distributed as dist

from saferlhf_fast import linear_logprob, linear_ppo_loss, ppo_loss
from saferlhf_fast.config.stages import Engine, Optimizer
from saferlhf_fast.runtime import engine

TOKENS, WIDTH, VOCABULARY = 24, 16, 40


class Head(torch.nn.Linear):
    """A language model's head whose forward gives the loss: of logits ("plain", "plain ppo") or of our
    ops.
    """

    def __init__(self, kind):
        super().__init__(WIDTH, VOCABULARY, bias=False)
        self.kind = kind

    def forward(self, hidden, ids, old_logp, advantages, normalizer):
        call = dict(clip_ratio=0.2, reduction="token-mean", normalizer=normalizer)
        if self.kind == "ours":
            return -linear_logprob(hidden, self.weight, ids).sum() / normalizer
        if self.kind == "ours ppo":
            return linear_ppo_loss(hidden, self.weight, ids, old_logp, advantages, chunk_tokens=5, **call)[0]
        logits = super().forward(hidden)
        if self.kind == "plain":
            return torch.nn.functional.cross_entropy(logits, ids, reduction="sum") / normalizer
        logp = torch.log_softmax(logits, -1).gather(-1, ids[:, None]).squeeze(-1)
        return ppo_loss(logp, old_logp, advantages, impl="reference", **call)[0]


class Model(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, WIDTH), Head(kind)

    def forward(self, x, *rest):
        return self.head(torch.tanh(self.body(x)), *rest)


def steps(kind, stage):
    """The loss of three steps and the head's weight after them."""
    torch.manual_seed(0)
    trained = engine.Engine(
        Model(kind),
        Optimizer(learning_rate=1e-2, warmup_ratio=0.0, schedule="constant"),
        Engine(zero_stage=stage, precision="fp32"),
        10,
    )
    data, losses = torch.Generator().manual_seed(1), []
    for _ in range(3):
        batch = (
            torch.randn(TOKENS, 8, generator=data),
            torch.randint(VOCABULARY, (TOKENS,), generator=data),
            torch.randn(TOKENS, generator=data) * 0.2 - 3.7,
            torch.randn(TOKENS, generator=data),
        )
        loss = trained(*(tensor[engine.rank() :: engine.world_size()] for tensor in batch), float(TOKENS))
        losses.append(engine.all_reduce(loss.detach().clone()).item())
        trained.backward(loss)
        trained.step()
    weights = trained.state_dict()
    return losses + ([] if weights is None else weights["head.weight"].float().reshape(-1).tolist())


def shards():
    """Largest differences of a split vocabulary from the whole one: log-prob, entropy, d hidden, d weight;
    NaN of a bad id.
    """
    random = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(10, WIDTH, generator=random),
        torch.randn(VOCABULARY, WIDTH, generator=random),
    )
    ids = torch.randint(VOCABULARY, (10,), generator=random)
    size = VOCABULARY // engine.world_size()
    mine = slice(engine.rank() * size, (engine.rank() + 1) * size)
    results = []
    for part, group in ((weight, None), (weight[mine].clone(), dist.group.WORLD)):
        leaves = [hidden.clone().requires_grad_(), part.requires_grad_()]
        logp, entropy = linear_logprob(
            *leaves, ids, group=group, temperature=0.8, return_entropy=True, chunk_tokens=4
        )
        (logp.sin() + entropy.cos()).sum().backward()
        results.append(
            [
                logp.detach(),
                entropy.detach(),
                leaves[0].grad,
                leaves[1].grad if group else leaves[1].grad[mine],
            ]
        )
    bad = linear_logprob(hidden, weight[mine], torch.full_like(ids, VOCABULARY), group=dist.group.WORLD)
    differences = [(a - b).abs().max().item() for a, b in zip(*results)]
    return {"differences": differences, "all_nan": bool(bad.isnan().all())}


if __name__ == "__main__":
    engine.start(Engine(precision="fp32"), 0)
    kinds = ("plain", "ours", "plain ppo", "ours ppo")
    out = {f"{kind}/{stage}": steps(kind, stage) for kind in kinds for stage in (0, 3)}
    split = shards()
    if engine.rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump({"steps": out, "shards": split}, file)
    engine.finish()
    os._exit(0)  # the results are written; how gloo's threads end is not what is tested here
