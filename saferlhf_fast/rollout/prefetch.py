"""Prefetch: while the update uses one batch, a thread samples the next with the weights before that update.

A batch is then one PPO step stale when its update comes, which importance weights correct
(ppo.importance_cap, or ppo.old_logp=engine). A batch is sampled in portions of sampling.batch_size prompts,
and the frozen models score each portion as soon as it is sampled. An engine that samples with the trainer's
own weights gets a copy of the policy, which is updated between two steps; an engine with weights of its own
is updated then too.

On CUDA the thread has a stream of its own. Leaves out ZeRO-3 (two threads must not start collectives) and
adapters on a shared base (which adapter is on is state of the base).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ..runtime import engine
from .batch import Sampled, arrange, assemble, generate
from .engines import RolloutEngine, SamplingActor, open_generator
from .engines.gathered_weights import weight_sharing_copy
from .sample import step_seed
from .scoring import frozen_scores
from .types import FrozenScores, Response, Rollout

if TYPE_CHECKING:
    from ..config.stages import PPOConfig
    from ..data.examples import PromptExample
    from .roles import Roles

    Batch = tuple[int, Sequence[PromptExample]]

SampledBatch = tuple["list[PromptExample]", list[Response], list[FrozenScores]]
"""Each response's prompt, the responses, and the frozen models' scores of each."""


def prefetched_rollouts(
    roles: "Roles", batches: "Iterable[Batch]", cfg: "PPOConfig", prefetcher: "RolloutPrefetcher"
) -> Iterator[tuple[int, Rollout]]:
    """Samples the first batch at once, and each further one during the step before its own.

    Args:
        roles: The policy, its rollout engine and the frozen models.
        batches: (step, prompts of this rank).
        cfg: The stage's config.
        prefetcher: Keeps the weights that sample the next batch, for a checkpoint.

    Yields:
        (step, Rollout).
    """
    snapshot: PolicySnapshot | None = None
    generator: RolloutEngine = roles.rollout_engine
    if cfg.sampling.engine != "vllm-server":  # the server has the weights that were pushed last
        snapshot = prefetcher.snapshot = PolicySnapshot(roles.actor)
        prefetcher.restore(snapshot)
        generator = open_generator(snapshot, roles.tokenizer, roles.ends, cfg.sampling)
    threads = ThreadPoolExecutor(1, "rollout")
    stream = torch.cuda.Stream() if engine.device().type == "cuda" else None
    steps = iter(batches)
    try:
        pending = _begin(threads, stream, generator, roles, next(steps, None), cfg)
        while pending is not None:
            step, future = pending
            rows, responses, scores = future.result()
            rollout = assemble(
                rows,
                responses,
                roles.tokenizer,
                cfg.pass_tokens(),
                minibatches=cfg.ppo.minibatches,
                n=cfg.sampling.num_return_sequences,
                version=min(1, step - 1),
                frozen_scores=scores,
            )
            if snapshot is not None:  # the weights after the previous step sample the next batch
                snapshot.copy_weights()
            generator.refresh()
            pending = _begin(threads, stream, generator, roles, next(steps, None), cfg)
            yield step, rollout
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        if generator is not roles.rollout_engine:
            generator.close()


def _begin(
    threads: ThreadPoolExecutor,
    stream: torch.cuda.Stream | None,
    generator: RolloutEngine,
    roles: "Roles",
    batch: "Batch | None",
    cfg: "PPOConfig",
) -> tuple[int, Future[SampledBatch]] | None:
    """Starts to sample a batch; (step, its future), or None after the last batch."""
    if batch is None:
        return None
    step, prompts = batch
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())  # until the weights are copied
    return step, threads.submit(_sample, stream, generator, roles, prompts, cfg, step)


def _sample(
    stream: torch.cuda.Stream | None,
    generator: RolloutEngine,
    roles: "Roles",
    prompts: "Sequence[PromptExample]",
    cfg: "PPOConfig",
    step: int,
) -> SampledBatch:
    """Samples and scores one batch; runs in the thread."""
    portion = cfg.sampling.batch_size or len(prompts)
    rows: list[PromptExample] = []
    responses: list[Response] = []
    scores: list[FrozenScores] = []
    with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
        for start in range(0, len(prompts), portion):
            new_rows, new_responses = generate(
                generator,
                prompts[start : start + portion],
                cfg.sampling,
                cfg.max_length,
                step_seed(cfg, step),
                first=start * engine.world_size(),
            )
            local = arrange(
                [Sampled(i, *row) for i, row in enumerate(zip(new_rows, new_responses))],
                roles.tokenizer,
                cfg.pass_tokens(),
            )
            by_place = dict(zip(local.order, frozen_scores(local, roles, cfg)))
            rows += new_rows
            responses += new_responses
            scores += [by_place[i] for i in range(len(by_place))]
        if stream is not None:
            stream.synchronize()
    return rows, responses, scores


class RolloutPrefetcher:
    """The weights that sample the next batch, for a checkpoint: a resumed run samples that batch again.

    With a vLLM server they are not available, and that one batch is sampled by the current weights.
    """

    def __init__(self) -> None:
        self.snapshot: PolicySnapshot | None = None
        self.weights: Sequence[torch.Tensor] | None = None

    def restore(self, snapshot: "PolicySnapshot") -> None:
        """Copies the weights of a checkpoint into a new snapshot, where there are any."""
        if self.weights is not None:
            for parameter, weight in zip(snapshot.module.lm.parameters(), self.weights):
                parameter.data.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"weights": None if self.snapshot is None else list(self.snapshot.module.lm.parameters())}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.weights = values["weights"]


class PolicySnapshot:
    """A copy of an actor's policy, with which a rollout engine samples while the actor learns.

    It has the attributes of engine.Frozen that rollout engines read.
    """

    def __init__(self, actor: SamplingActor) -> None:
        """Copies the current weights.

        Args:
            actor: Trains the policy, or has it frozen.
        """
        self.actor, self.sharded = actor, False
        self.module = SimpleNamespace(lm=weight_sharing_copy(actor.module.lm).eval())
        for parameter in self.module.lm.parameters():
            parameter.data = parameter.data.clone()

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Copies the actor's current weights."""
        for copied, trained in zip(self.module.lm.parameters(), self.actor.module.lm.parameters()):
            copied.copy_(trained)
