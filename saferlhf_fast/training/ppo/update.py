"""One batch of rollouts into the weights of actor and critics: passes, losses, optimiser steps.

There are two ways. `update_in_one_pass`: with one optimiser step per batch, old log-probs and values from a
pass of their own would equal those of the step's forward passes (so ρ = 1), and the latter serve as both.
`update`: the old log-probs, values and advantages were computed beforehand.

Losses, per response token, with mean over the global batch (optimizer_step.py)::

    actor    −min(ρ·A, clip(ρ, 1 ± ε)·A),   ρ = exp(logp − old_logp)
    critic   ½·max((V − ret)², (clip(V, V_old ± clip_value) − ret)²), each
    PTX      next-token cross-entropy on supervised data, times ptx_coeff, into the actor
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ...config.stages import PPOConfig
from ...kernels.ppo_lag_advantage import whitening
from ...kernels.ppo_loss import ppo_loss
from ...models.policy import Objective
from ...rollout.roles import Roles
from ...rollout.types import Rollout, Scored
from ...runtime import engine
from .advantage import advantages
from .optimizer_step import OptimizerStep, Pass, step_all_models
from .step_metrics import StepMetrics

if TYPE_CHECKING:
    from ...data.examples import SFTExample
    from ...rollout.types import Advantages


def in_one_pass(cfg: PPOConfig, roles: Roles) -> bool:
    """True when old log-probs and values need no pass of their own.

    The settings must allow it, and no loaded model may have dropout (adapters can have dropout that no
    setting names).
    """
    return cfg.in_one_pass() and not roles.has_dropout()


def update_in_one_pass(
    roles: Roles,
    rollout: Rollout,
    scored: Scored,
    lambdas: Mapping[str, torch.Tensor],
    cfg: PPOConfig,
    ptx: "Sequence[SFTExample] | None" = None,
) -> StepMetrics:
    """Trains actor and critics by one optimiser step, in the passes that give the old log-probs and values.

    Args:
        roles: Actor and critics, at the weights that sampled the rollout.
        rollout: The batch of this rank.
        scored: Scores of the frozen models; without logp_N and values.
        lambdas: λ as a 0-d tensor by name of the constraint.
        cfg: Settings of the stage.
        ptx: SFT examples of the global batch, or None.

    Returns:
        The step's losses and statistics.
    """
    roles.train()
    step_metrics, (minibatch,) = StepMetrics(), rollout.minibatches
    step = OptimizerStep(roles, rollout, scored, cfg, minibatch, step_metrics, bool(ptx))
    for this_pass in step.passes():
        packed = this_pass.packed
        value_n: dict[str, torch.Tensor] = {}
        for critic in roles.critics:
            value_n |= critic(packed)
        old_value_n = {name: value.detach() for name, value in value_n.items()}
        on_policy = OnPolicyLoss(step, this_pass, old_value_n, lambdas)
        if cfg.ppo.old_logp == "trainer":
            loss = roles.actor(packed, cfg.sampling, chunk_loss=on_policy)
        else:
            loss = on_policy.from_engine_logp()
        step.train_actor(loss)
        for critic in roles.critics:
            step.train_critic(critic, packed, value_n, old_value_n, on_policy.returns())
    step_all_models(roles, scored, ptx, cfg, step_metrics)
    return step_metrics


class OnPolicyLoss:
    """The policy loss of the policy that sampled: advantages, importance weights, loss.

    The actor's head calls it (models/on_policy_loss.py) for chunks of whole sequences, with log-probs that
    are old and new at once.
    """

    def __init__(
        self,
        step: OptimizerStep,
        this_pass: Pass,
        value_n: Mapping[str, torch.Tensor],
        lambdas: Mapping[str, torch.Tensor],
    ) -> None:
        """Takes this pass's share of scores, log-probs and values.

        Args:
            step: The optimiser step.
            this_pass: The rows and tokens of the pass.
            value_n: The critics' values in this pass by stream, [n], without graph.
            lambdas: λ as a 0-d tensor by name of the constraint.
        """
        self.step, self.this_pass, self.value_n, self.lambdas = step, this_pass, value_n, lambdas
        self.ref_logp_n = this_pass.select_tokens(step.scored.ref_logp_N)
        engine_logp_N = step.rollout.engine_logp_N
        self.engine_logp_n = None if engine_logp_N is None else this_pass.select_tokens(engine_logp_N)
        self.reward_b = this_pass.select_rows(step.scored.reward_B)
        self.cost_b = {name: this_pass.select_rows(cost_B) for name, cost_B in step.scored.costs.items()}
        self.returns_by_chunk: dict[str, list[torch.Tensor]] = {name: [] for name in value_n}

    def __call__(
        self, sequences: slice, tokens: slice, logp_c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a chunk, whose ratio is 1, and its gradient.

        Args:
            sequences: The chunk's sequences in the pass.
            tokens: Their tokens in n.
            logp_c: [c] log-probs, fp32, in nats, without graph.

        Returns:
            (loss, d loss / d logp_c), [] and [c].
        """
        advantages_c = self.advantages(sequences, tokens, logp_c)
        with torch.enable_grad():
            leaf = logp_c.detach().requires_grad_()
            loss, stats = ppo_loss(
                leaf, logp_c, advantages_c, cu_seqlens=self._offsets(sequences), **self.step.settings
            )
        (grad_c,) = torch.autograd.grad(loss, leaf)
        self._count(stats)
        return loss.detach(), grad_c

    def from_engine_logp(self) -> torch.Tensor:
        """The loss of the whole pass with the rollout engine's log-probs as the old ones.

        They are known before the actor's forward, so the advantages are too.
        """
        assert self.engine_logp_n is not None, "require_engine_logprobs passes no rollout without them"
        all_sequences = slice(0, len(self.this_pass.packed.counts))
        all_tokens = slice(0, len(self.engine_logp_n))
        objective = Objective(
            self.engine_logp_n,
            self.advantages(all_sequences, all_tokens, self.engine_logp_n),
            self.step.settings,
        )
        loss, stats = self.step.roles.actor(self.this_pass.packed, self.step.cfg.sampling, objective)
        self._count(stats)
        return loss

    def advantages(self, sequences: slice, tokens: slice, old_logp_c: torch.Tensor) -> torch.Tensor:
        """[c] advantages of some sequences, times importance weights; zeros for a dummy."""
        values = {name: value_n[tokens] for name, value_n in self.value_n.items()}
        if self.this_pass.is_dummy:  # it trains nothing: its returns are its values
            self._store_returns(values)
            return torch.zeros_like(old_logp_c)
        costs = {name: cost_b[sequences] for name, cost_b in self.cost_b.items()}
        scored = Scored(self.ref_logp_n[tokens], self.reward_b[sequences], costs, old_logp_c, values)
        adv = advantages(self._offsets(sequences), scored, self.lambdas, self.step.cfg.ppo)
        self.step.step_metrics.advantages.append(adv.stats)
        self._store_returns(adv.returns)
        engine_logp_c = None if self.engine_logp_n is None else self.engine_logp_n[tokens]
        return self.step.weighted(adv.advantages_N, old_logp_c, engine_logp_c)

    def returns(self) -> dict[str, torch.Tensor]:
        """Returns of the whole pass by stream, [n]; call it after all chunks."""
        return {name: torch.cat(chunks) for name, chunks in self.returns_by_chunk.items()}

    def _store_returns(self, returns: Mapping[str, torch.Tensor]) -> None:
        for name, return_c in returns.items():
            self.returns_by_chunk[name].append(return_c)

    def _count(self, stats: Mapping[str, torch.Tensor]) -> None:
        if not self.this_pass.is_dummy:
            self.step.count(stats)

    def _offsets(self, sequences: slice) -> torch.Tensor:
        """cu_seqlens of some sequences, int32."""
        counts = self.this_pass.packed.counts[sequences]
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(
            self.ref_logp_n.device, non_blocking=True
        )


def update(
    roles: Roles,
    rollout: Rollout,
    scored: Scored,
    adv: "Advantages",
    cfg: PPOConfig,
    ptx: "Sequence[SFTExample] | None" = None,
) -> StepMetrics:
    """Trains actor and critics on one batch, in as many epochs and minibatches as the recipe says.

    Args:
        roles: Actor and critics.
        rollout: The batch of this rank.
        scored: Scores, and the old log-probs and values.
        adv: Advantages and returns of the batch.
        cfg: Settings of the stage.
        ptx: SFT examples of the global batch, or None.

    Returns:
        The losses and statistics of the last epoch.
    """
    roles.train()
    whitened = whitener(adv.stats) if cfg.ppo.whiten else {}
    minibatches = rollout.minibatches
    for _ in range(cfg.ppo.epochs):
        step_metrics = StepMetrics()
        step_metrics.advantages.append(adv.stats)
        for i, minibatch in enumerate(minibatches):
            step = OptimizerStep(roles, rollout, scored, cfg, minibatch, step_metrics, bool(ptx))
            for this_pass in step.passes():
                _train_on_pass(step, this_pass, adv, whitened)
            ptx_share = (ptx[i :: len(minibatches)] or ptx) if ptx else None
            step_all_models(roles, scored, ptx_share, cfg, step_metrics)
            if step_metrics.bad:  # the next minibatch would start from the same bad numbers
                return step_metrics
        for name in step_metrics.sums:
            step_metrics.sums[name] = step_metrics.sums[name] / len(minibatches)
    return step_metrics


def _train_on_pass(
    step: OptimizerStep, this_pass: Pass, adv: "Advantages", whitened: Mapping[str, torch.Tensor]
) -> None:
    """Forward and backward of all trained models on some rows, with known old numbers and advantages."""
    roles, scored = step.roles, step.scored
    assert scored.logp_N is not None, "the actor's log-probs are computed before the update"
    old_logp_n, advantages_n = (
        this_pass.select_tokens(scored.logp_N),
        this_pass.select_tokens(adv.advantages_N),
    )
    engine_logp_N = step.rollout.engine_logp_N
    if not this_pass.is_dummy:
        engine_logp_n = None if engine_logp_N is None else this_pass.select_tokens(engine_logp_N)
        advantages_n = step.weighted(advantages_n, old_logp_n, engine_logp_n)
    settings: dict[str, Any] = {**step.settings, **whitened}
    loss, stats = roles.actor(
        this_pass.packed, step.cfg.sampling, Objective(old_logp_n, advantages_n, settings)
    )
    step.train_actor(loss)
    if not this_pass.is_dummy:
        step.count(stats)
    old_value_n = {name: this_pass.select_tokens(value_N) for name, value_N in scored.values.items()}
    return_n = {name: this_pass.select_tokens(return_N) for name, return_N in adv.returns.items()}
    for critic in roles.critics:
        value_n = critic(this_pass.packed)
        if this_pass.is_dummy:
            # It must train nothing, so its returns are its values. Zeros would pull the critic towards 0.
            own_value_n = {name: value.detach() for name, value in value_n.items()}
            step.train_critic(critic, this_pass.packed, value_n, own_value_n, own_value_n)
        else:
            step.train_critic(critic, this_pass.packed, value_n, old_value_n, return_n)


def whitener(stats: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scale and shift that whiten the advantages over the global batch; one all-reduce.

    Args:
        stats: count, sum and sum_squares of this rank's advantages, 0-d.

    Returns:
        advantage_scale and advantage_shift, as `ppo_loss` takes them.
    """
    sums = engine.all_reduce(torch.stack([stats["count"], stats["sum"], stats["sum_squares"]]).double())
    scale, shift = whitening(*sums.unbind())
    return {"advantage_scale": scale.float(), "advantage_shift": shift.float()}
