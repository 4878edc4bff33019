"""One optimiser step of PPO: its passes, their losses, and the step of all trained models.

Every loss divides by a count over the global batch, so the cut into passes and ranks changes nothing. With
supervised (PTX) data the actor's step minimises ½ · (L_actor + ptx_coeff · L_ptx), as in safe-rlhf.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ...config.sections import REWARD
from ...config.stages import PPOConfig
from ...kernels.value_loss import value_loss
from ...models.packing import Packed, pack_into_microbatches
from ...rollout.roles import Critic, Roles
from ...rollout.types import Minibatch, Rollout, Scored, per_stream
from ...runtime import engine
from ..sft import sft_loss
from .episode_costs import mask_invalid_scores
from .step_metrics import StepMetrics

if TYPE_CHECKING:
    from ...data.examples import SFTExample


@dataclass(frozen=True)
class Pass:
    """Some rows of a rollout, packed for one forward and backward pass.

    A rank that has no rows left runs a dummy sequence, because other ranks wait for it. Its numbers are zeros
    and train nothing.
    """

    rows: slice  # of B
    tokens: slice  # of N
    packed: Packed

    @property
    def is_dummy(self) -> bool:
        """True where the pass has no rows."""
        return self.rows.stop == self.rows.start

    def select_tokens(self, values_N: torch.Tensor) -> torch.Tensor:
        """[n] from [N]: this pass's share of a number for each token."""
        return values_N.new_zeros(sum(self.packed.counts)) if self.is_dummy else values_N[self.tokens]

    def select_rows(self, values_B: torch.Tensor) -> torch.Tensor:
        """[b] from [B]: this pass's share of a number for each row."""
        return values_B.new_zeros(len(self.packed.counts)) if self.is_dummy else values_B[self.rows]


@dataclass(frozen=True)
class OptimizerStep:
    """What all passes of one optimiser step share."""

    roles: Roles
    rollout: Rollout
    scored: Scored
    cfg: PPOConfig
    minibatch: Minibatch
    step_metrics: StepMetrics
    supervised: bool  # the policy loss shares the step with a loss on PTX data

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings of all losses: clip_ratio (ε), reduction, normalizer (a count over the global batch)."""
        ppo = self.cfg.ppo
        count = self.minibatch.sequences if ppo.reduction == "sequence-mean" else self.minibatch.tokens
        return {"clip_ratio": ppo.clip_ratio, "reduction": ppo.reduction, "normalizer": max(1, count)}

    def passes(self) -> Iterator[Pass]:
        """Yields the passes of the step."""
        for rows in self.minibatch.passes:
            yield Pass(rows, self.rollout.tokens(rows), self.rollout.packed(rows))

    def train_actor(self, loss: torch.Tensor) -> None:
        """Runs the backward of a pass's policy loss; the factor ½ leaves the other half to the PTX loss."""
        self.roles.trained_actor.backward(loss * (0.5 if self.supervised else 1.0))
        self.step_metrics.add("actor_loss", loss)

    def train_critic(
        self,
        critic: Critic,
        packed: Packed,
        value_n: Mapping[str, torch.Tensor],
        old_value_n: Mapping[str, torch.Tensor],
        returns: Mapping[str, torch.Tensor],
    ) -> None:
        """Runs one backward of ½·mean(max((V − ret)², (clip(V, V_old ± clip_value) − ret)²)) over all heads.

        Args:
            critic: A critic, with one stream or several.
            packed: The tokens of the pass.
            value_n: V by stream, [n], with graph.
            old_value_n: V_old by stream, [n]: the values that the advantages were computed from.
            returns: ret by stream, [n].
        """
        losses = []
        for name in critic.names:
            loss, _ = value_loss(
                value_n[name],
                old_value_n[name],
                returns[name],
                clip_value=self.cfg.ppo.clip_value,
                cu_seqlens=packed.cu_seqlens,
                reduction=self.settings["reduction"],
                normalizer=self.settings["normalizer"],
            )
            self.step_metrics.add(per_stream("critic_loss", name, self.roles.constraints), loss)
            losses.append(loss)
        critic.engine.backward(sum(losses[1:], start=losses[0]))

    def count(self, stats: Mapping[str, torch.Tensor]) -> None:
        """Adds the statistics of a policy loss (means over the tokens of a pass) to the step's metrics."""
        for name in ("clip_fraction", "approx_kl"):
            self.step_metrics.add(name, stats[name] * stats["tokens"] / max(1, self.minibatch.tokens))

    def weighted(
        self, advantages_n: torch.Tensor, old_logp_n: torch.Tensor, engine_logp_n: torch.Tensor | None
    ) -> torch.Tensor:
        """A · min(π_trainer / π_engine, cap): truncated importance weights, where the recipe has a cap.

        Also adds to the step's metrics how far the rollout engine's log-probs are from the trainer's.

        Args:
            advantages_n: [n] advantages A.
            old_logp_n: [n] log-probs of the policy that sampled, by the trainer, in nats.
            engine_logp_n: [n] the same by the rollout engine; None where it reports none.

        Returns:
            [n] advantages, weighted or as they were.
        """
        ppo, step_metrics = self.cfg.ppo, self.step_metrics
        if engine_logp_n is None or ppo.old_logp == "engine":
            return advantages_n
        gap_n = old_logp_n - engine_logp_n
        share = 1.0 / max(1, self.minibatch.tokens)
        step_metrics.add("engine_gap_mean", gap_n.abs().sum() * share)
        step_metrics.add("engine_gap_share", (gap_n.exp() - 1.0).abs().gt(0.01).sum() * share)
        if gap_n.numel():
            step_metrics.largest("engine_gap_max", gap_n.abs().max())
        if ppo.importance_cap is None:
            return advantages_n
        weight_n = gap_n.exp().clamp(max=ppo.importance_cap)
        step_metrics.add("importance_weight", weight_n.sum() * share)
        return advantages_n * weight_n


def step_all_models(
    roles: Roles,
    scored: Scored,
    ptx: "Sequence[SFTExample] | None",
    cfg: PPOConfig,
    step_metrics: StepMetrics,
) -> None:
    """Adds the PTX gradient, checks what must be finite, and steps all trained models or, on all ranks, none.

    Args:
        roles: Actor and critics, with the gradients of all passes.
        scored: Scores and log-probs of the rollout, which must be finite too.
        ptx: SFT examples of the global batch, or None.
        cfg: Settings of the stage.
        step_metrics: Losses of the step. Gets learning rates, gradient norms and `bad`.
    """
    if ptx:
        _train_on_ptx(roles, ptx, cfg, step_metrics)
    models = {"actor": roles.trained_actor} | {
        " and ".join(f"{name}_critic" for name in c.names): c.engine for c in roles.critics
    }
    step_metrics.bad = bad = _not_finite(models, scored, step_metrics)
    streams = {"actor": (), **{name: critic.names for name, critic in zip(list(models)[1:], roles.critics)}}
    for name, model in models.items():
        if bad:
            step: engine.StepResult = {"lr": model.lr, "grad_norm": float("nan"), "skipped": False}
            model.discard()
        else:
            step = model.step()
        if step["skipped"]:
            step_metrics.bad = [*step_metrics.bad, f"gradient of {name}"]
        for key in ("lr", "grad_norm"):
            labels = [per_stream(f"critic_{key}", stream, roles.constraints) for stream in streams[name]] or [
                f"{name}_{key}"
            ]
            step_metrics.shared |= dict.fromkeys(labels, step[key])


def _not_finite(models: Mapping[str, engine.Engine], scored: Scored, step_metrics: StepMetrics) -> list[str]:
    """Names of the scores, log-probs, losses and gradient norms that are not finite on some rank."""
    losses = {name: value for name, value in step_metrics.sums.items() if "loss" in name}
    norms = {f"gradient of {name}": model.local_norm() for name, model in models.items()}
    scores: dict[str, torch.Tensor | None] = {
        f"score of the {name} model": mask_invalid_scores(score_B)
        for name, score_B in {REWARD: scored.reward_B, **scored.costs}.items()
    }
    scores |= {"log-prob of the reference": scored.ref_logp_N, "log-prob of the policy": scored.logp_N}
    return engine.not_finite({**scores, **losses, **norms})


def _train_on_ptx(
    roles: Roles, examples: "Sequence[SFTExample]", cfg: PPOConfig, step_metrics: StepMetrics
) -> None:
    """Runs the backward of ½ · ptx_coeff · L_ptx on this rank's share of the global batch `examples`."""
    weight = sum(sum(e.mask[1:]) for e in examples)
    lengths = [len(e.ids) for e in examples]
    shortest = examples[min(range(len(examples)), key=lengths.__getitem__)]
    passes = pack_into_microbatches(lengths, cfg.pass_tokens(), engine.world_size())
    for indices in passes[engine.rank()]:
        # A rank that has no examples left joins the collectives with one example at weight zero.
        loss, _ = sft_loss(roles.trained_actor, [examples[i] for i in indices] or [shortest])
        loss = loss * ((1.0 if indices else 0.0) / weight)
        roles.trained_actor.backward(loss * (0.5 * cfg.ppo.ptx_coeff))
        step_metrics.add("ptx_loss", loss)
