"""Sampling ahead: while one batch is learned from, the next is sampled by the weights before that step, in a
thread.

The batch is then one PPO step stale when its turn comes, which importance weights correct
(ppo.importance_cap, or ppo.old_logp=engine). A batch is sampled in portions of sampling.batch_size prompts,
and the frozen models are asked about each portion as soon as it is there. An engine that samples with the
trainer's own weights gets a copy of the policy, which takes the weights over between two steps; one that has
its own takes them then too.

On CUDA the thread has a stream of its own. Leaves out ZeRO-3 (two threads must not start collectives) and one
shared base (whose adapter is state of the shared base).
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from ..runtime import engine
from .batch import Sampled, arrange, assemble, generate
from .engines import open_generator
from .engines.gathered_weights import weight_sharing_copy
from .sample import step_seed
from .scoring import frozen_scores


def prefetched_rollouts(roles, batches, cfg, prefetcher):
    """Yields (step, Rollout) of each (step, prompts): the first at once, then each sampled during the step
    before its own.

    prefetcher: an `RolloutPrefetcher`, which keeps for a checkpoint by which weights the batch after the
    current one is sampled.
    """
    if cfg.sampling.engine == "vllm-server":  # it has the weights that were pushed last
        snapshot, source = None, roles.generator
    else:
        snapshot = prefetcher.snapshot = PolicySnapshot(roles.actor)
        prefetcher.give(snapshot)
        source = open_generator(snapshot, roles.tokenizer, roles.ends, cfg.sampling)
    threads = ThreadPoolExecutor(1, "rollout")
    stream = torch.cuda.Stream() if engine.device().type == "cuda" else None
    steps = iter(batches)
    try:
        pending = _begin(threads, stream, source, roles, next(steps, None), cfg)
        while pending is not None:
            step, future = pending
            rows, responses, said = future.result()
            rollout = assemble(
                rows,
                responses,
                roles.tokenizer,
                cfg.pass_tokens(),
                minibatches=cfg.ppo.minibatches,
                n=cfg.sampling.num_return_sequences,
                version=min(1, step - 1),
                frozen_scores=said,
            )
            if snapshot is not None:  # the weights after the step before: the next batch's
                snapshot.take()
            source.refresh()
            pending = _begin(threads, stream, source, roles, next(steps, None), cfg)
            yield step, rollout
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        if source is not roles.generator:
            source.close()


def _begin(threads, stream, source, roles, numbered, cfg):
    """Starts to sample a batch -> (step, its future), or None after the last."""
    if numbered is None:
        return None
    step, prompts = numbered
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())  # the copied weights are there
    return step, threads.submit(_sample, stream, source, roles, prompts, cfg, step)


def _sample(stream, source, roles, prompts, cfg, step):
    """In the thread -> (PromptExamples, Responses, frozen_scores)."""
    portion = cfg.sampling.batch_size or len(prompts)
    rows, responses, said = [], [], []
    with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
        for start in range(0, len(prompts), portion):
            new = generate(
                source,
                prompts[start : start + portion],
                roles.tokenizer,
                cfg.sampling,
                cfg.max_length,
                step_seed(cfg, step),
                first=start * engine.world_size(),
            )
            local = arrange(
                [Sampled(i, *row) for i, row in enumerate(zip(*new))], roles.tokenizer, cfg.pass_tokens()
            )
            found = dict(zip(local.order, frozen_scores(local, roles, cfg)))
            rows, responses, said = (
                rows + new[0],
                responses + new[1],
                said + [found[i] for i in range(len(found))],
            )
        if stream is not None:
            stream.synchronize()
    return rows, responses, said


class RolloutPrefetcher:
    """The weights by which the next batch is being sampled: a checkpoint after a step needs them, since the
    run that goes on samples that batch anew. With a vLLM server they are not at hand, and that one batch is
    sampled by the current weights.
    """

    def __init__(self):
        self.snapshot = self.weights = None

    def give(self, snapshot):
        """Hands the weights of a checkpoint to a new snapshot."""
        if self.weights is not None:
            for parameter, weight in zip(snapshot.module.lm.parameters(), self.weights):
                parameter.data.copy_(weight)

    def state_dict(self):
        """For a checkpoint."""
        return {"weights": None if self.snapshot is None else list(self.snapshot.module.lm.parameters())}

    def load_state_dict(self, values):
        """From a checkpoint."""
        self.weights = values["weights"]


class PolicySnapshot:
    """A copy of an actor's policy that a rollout engine can sample with while the actor learns; see
    engine.Frozen.
    """

    def __init__(self, actor):
        self.actor, self.sharded = actor, False
        self.module = SimpleNamespace(lm=weight_sharing_copy(actor.module.lm).eval())
        for parameter in self.module.lm.parameters():
            parameter.data = parameter.data.clone()

    @torch.no_grad()
    def take(self):
        """Takes the actor's weights over."""
        for mine, theirs in zip(self.module.lm.parameters(), self.actor.module.lm.parameters()):
            mine.copy_(theirs)
