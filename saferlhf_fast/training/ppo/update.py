"""One batch of rollouts into the weights of actor and critics: passes, losses, optimiser steps.

Every loss divides by the count over the global batch, so the split into passes and ranks changes nothing.
With supervised (PTX) data the actor's step is ½(L_actor + coefficient · L_ptx), as in the reference
implementation.

Two ways. `update_in_one_pass`: with one optimiser step per batch the ratio to the old policy is 1 and the old
values are the new ones, so what the step's own forward passes say is what they start from, and no pass comes
before them. `update`: the old log-probs and values were asked for beforehand.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from ...config.sections import REWARD
from ...config.stages import PPOConfig
from ...kernels.ppo_lag_advantage import whitening
from ...kernels.ppo_loss import ppo_loss
from ...kernels.value_loss import value_loss
from ...models.packing import Packed, pack_into_microbatches
from ...models.policy import Objective
from ...rollout.roles import Roles
from ...rollout.types import Minibatch, Rollout, Scored, per_stream
from ...runtime import engine
from ..sft import sft_loss
from .advantage import advantages
from .multiplier import mask_invalid_scores
from .step_metrics import StepMetrics


@dataclass(frozen=True)
class OptimizerStep:
    """What all passes of one optimiser step share."""

    roles: Roles
    rollout: Rollout
    scored: Scored
    cfg: PPOConfig
    minibatch: Minibatch
    step_metrics: StepMetrics
    supervised: bool  # a loss on PTX data comes beside the policy's

    @cached_property
    def settings(self):
        """Of all losses: clip_ratio, reduction, normalizer."""
        ppo = self.cfg.ppo
        count = self.minibatch.sequences if ppo.reduction == "sequence-mean" else self.minibatch.tokens
        return {"clip_ratio": ppo.clip_ratio, "reduction": ppo.reduction, "normalizer": max(1, count)}

    def passes(self):
        """Yields each Pass of the step."""
        for rows in self.minibatch.passes:
            yield Pass(rows, self.rollout.tokens(rows), self.rollout.packed(rows))

    def train_actor(self, loss):
        """The backward of the policy loss of a pass."""
        self.roles.actor.backward(loss * (0.5 if self.supervised else 1.0))
        self.step_metrics.add("actor_loss", loss)

    def train_critic(self, critic, packed, value_n, old_value_n, returns):
        """One backward of a critic, for the losses of all streams that it has a head for. All but packed:

        {stream: [n]}.
        """
        total = 0.0
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
            total = total + loss
        critic.engine.backward(total)

    def count(self, stats):
        """Tallies a policy loss's statistics, which are means over its tokens: here their share of the
        minibatch's.
        """
        for name in ("clip_fraction", "approx_kl"):
            self.step_metrics.add(name, stats[name] * stats["tokens"] / max(1, self.minibatch.tokens))

    def weighted(self, advantages_n, old_logp_n, engine_logp_n):
        """Advantages times truncated importance weights where the recipe wants them; tallies how far the
        engine is off.
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


@dataclass(frozen=True)
class Pass:
    """Some rows of a rollout, packed.

    A rank without rows runs a dummy sequence, whose numbers are zeros and teach nothing.
    """

    rows: slice
    tokens: slice  # of N
    packed: Packed

    @property
    def is_dummy(self):
        """True where there are no rows."""
        return self.rows.stop == self.rows.start

    def of_tokens(self, values_N):
        """This pass's share of a number for each token; None of None."""
        if values_N is None:
            return None
        return values_N.new_zeros(sum(self.packed.counts)) if self.is_dummy else values_N[self.tokens]

    def of_rows(self, values_B):
        """This pass's share of a number for each row."""
        return values_B.new_zeros(len(self.packed.counts)) if self.is_dummy else values_B[self.rows]


def in_one_pass(cfg, roles):
    """True when old log-probs and values need no pass of their own: the settings allow it, and no model that
    was loaded drops anything out (adapters can bring dropout that no setting names).
    """
    return cfg.in_one_pass() and not roles.has_dropout()


def update_in_one_pass(roles, rollout, scored, lambdas, cfg, ptx=None):
    """Trains actor and critics with one step on one batch -> StepMetrics. lambdas: {constraint: λ, 0-d}.

    ptx: SFT examples of the *global* batch, or None.
    """
    roles.train()
    step_metrics, (minibatch,) = StepMetrics(), rollout.minibatches
    step = OptimizerStep(roles, rollout, scored, cfg, minibatch, step_metrics, bool(ptx))
    for part in step.passes():
        packed, value_n = part.packed, {}
        for critic in roles.critics:
            value_n |= critic(packed)
        old_value_n = {name: value.detach() for name, value in value_n.items()}
        on_policy = OnPolicyLoss(step, part, old_value_n, lambdas)
        if cfg.ppo.old_logp == "trainer":
            loss = roles.actor(packed, cfg.sampling, chunk_loss=on_policy)
        else:
            loss = on_policy.from_engine_logp()
        step.train_actor(loss)
        for critic in roles.critics:
            step.train_critic(critic, packed, value_n, old_value_n, on_policy.returns())
    _finish(roles, scored, ptx, cfg, step_metrics)
    return step_metrics


class OnPolicyLoss:
    """The policy loss of the policy that sampled, for whole sequences at a time: advantages, importance
    weights, loss.

    The actor's head calls it (models/on_policy_loss.py) with log-probs that are old and new at once.
    """

    def __init__(self, step, part, value_n, lambdas):
        """value_n: {stream: the critics' values in this pass, without graph}."""
        self.step, self.part, self.value_n, self.lambdas = step, part, value_n, lambdas
        self.ref_logp_n = part.of_tokens(step.scored.ref_logp_N)
        self.engine_logp_n = part.of_tokens(step.rollout.engine_logp_N)
        self.reward_b = part.of_rows(step.scored.reward_B)
        self.cost_b = {name: part.of_rows(cost_B) for name, cost_B in step.scored.costs.items()}
        self.return_parts = {name: [] for name in value_n}

    def __call__(self, sequences, tokens, logp_c):
        """-> (loss, d loss / d logp_c) of a chunk, whose ratio is 1."""
        advantages_c = self.advantages(sequences, tokens, logp_c)
        with torch.enable_grad():
            leaf = logp_c.detach().requires_grad_()
            loss, stats = ppo_loss(
                leaf, logp_c, advantages_c, cu_seqlens=self._offsets(sequences), **self.step.settings
            )
        (grad_c,) = torch.autograd.grad(loss, leaf)
        self._count(stats)
        return loss.detach(), grad_c

    def from_engine_logp(self):
        """The loss of the whole pass with the engine's log-probs as the old ones, which are known before the
        actor's forward.
        """
        everything = slice(0, len(self.part.packed.counts)), slice(0, len(self.engine_logp_n))
        objective = Objective(
            self.engine_logp_n, self.advantages(*everything, self.engine_logp_n), self.step.settings
        )
        loss, stats = self.step.roles.actor(self.part.packed, self.step.cfg.sampling, objective)
        self._count(stats)
        return loss

    def advantages(self, sequences, tokens, old_logp_c):
        """Of some sequences, importance weights included; zeros for a dummy."""
        values = {name: value_n[tokens] for name, value_n in self.value_n.items()}
        if self.part.is_dummy:  # nothing is learned from it: its returns are its values
            self._keep(values)
            return torch.zeros_like(old_logp_c)
        costs = {name: cost_b[sequences] for name, cost_b in self.cost_b.items()}
        scored = Scored(self.ref_logp_n[tokens], self.reward_b[sequences], costs, old_logp_c, values)
        adv = advantages(self._offsets(sequences), scored, self.lambdas, self.step.cfg.ppo)
        self.step.step_metrics.advantages.append(adv.stats)
        self._keep(adv.returns)
        engine_logp_c = None if self.engine_logp_n is None else self.engine_logp_n[tokens]
        return self.step.weighted(adv.advantages_N, old_logp_c, engine_logp_c)

    def returns(self):
        """{stream: returns_n} of the whole pass, once all chunks were here."""
        return {name: torch.cat(parts) for name, parts in self.return_parts.items()}

    def _keep(self, returns):
        for name, part in returns.items():
            self.return_parts[name].append(part)

    def _count(self, stats):
        if not self.part.is_dummy:
            self.step.count(stats)

    def _offsets(self, sequences):
        counts = self.part.packed.counts[sequences]
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(
            self.ref_logp_n.device, non_blocking=True
        )


def update(roles, rollout, scored, adv, cfg, ptx=None):
    """Trains actor and critics on one batch, in as many epochs and minibatches as the recipe says ->
    StepMetrics of the last epoch.

    ptx: SFT examples of the *global* batch, or None.
    """
    roles.train()
    whitened = whitener(adv.stats) if cfg.ppo.whiten else {}
    for _ in range(cfg.ppo.epochs):
        step_metrics = StepMetrics()
        step_metrics.advantages.append(adv.stats)
        for i, minibatch in enumerate(rollout.minibatches):
            step = OptimizerStep(roles, rollout, scored, cfg, minibatch, step_metrics, bool(ptx))
            for part in step.passes():
                _known_pass(step, part, adv, whitened)
            _finish(
                roles, scored, (ptx[i :: len(rollout.minibatches)] or ptx) if ptx else None, cfg, step_metrics
            )
            # what comes after a bad step would start from the same numbers
            if step_metrics.bad:
                return step_metrics
        for name in step_metrics.sums:
            step_metrics.sums[name] = step_metrics.sums[name] / len(rollout.minibatches)
    return step_metrics


def _known_pass(step, part, adv, whitened):
    """Forward and backward of all trained models on some rows, whose old log-probs, values and advantages are
    known.
    """
    roles, scored = step.roles, step.scored
    old_logp_n, advantages_n = part.of_tokens(scored.logp_N), part.of_tokens(adv.advantages_N)
    if not part.is_dummy:
        advantages_n = step.weighted(advantages_n, old_logp_n, part.of_tokens(step.rollout.engine_logp_N))
    loss, stats = roles.actor(
        part.packed, step.cfg.sampling, Objective(old_logp_n, advantages_n, {**step.settings, **whitened})
    )
    step.train_actor(loss)
    if not part.is_dummy:
        step.count(stats)
    old_value_n = {name: part.of_tokens(value_N) for name, value_N in scored.values.items()}
    returns = {name: part.of_tokens(return_N) for name, return_N in adv.returns.items()}
    for critic in roles.critics:
        value_n = critic(part.packed)
        # Nothing is learned from a dummy: its returns are its values. Zeros would pull the critic towards 0.
        known = (
            [{name: value.detach() for name, value in value_n.items()}] * 2
            if part.is_dummy
            else (old_value_n, returns)
        )
        step.train_critic(critic, part.packed, value_n, *known)


def _finish(roles, scored, ptx, cfg, step_metrics):
    """The supervised loss, one look at what must be finite, the optimiser steps: of all models or, on all
    ranks, of none.
    """
    if ptx:
        _ptx(roles, ptx, cfg, step_metrics)
    losses = {name: value for name, value in step_metrics.sums.items() if "loss" in name}
    models = {"actor": roles.actor} | {
        " and ".join(f"{name}_critic" for name in c.names): c.engine for c in roles.critics
    }
    norms = {f"gradient of {name}": model.local_norm() for name, model in models.items()}
    scores = {
        f"score of the {name} model": mask_invalid_scores(score_B)
        for name, score_B in {REWARD: scored.reward_B, **scored.costs}.items()
    }
    scores |= {"log-prob of the reference": scored.ref_logp_N, "log-prob of the policy": scored.logp_N}
    step_metrics.bad = bad = engine.not_finite({**scores, **losses, **norms})
    streams = {"actor": (), **{name: critic.names for name, critic in zip(list(models)[1:], roles.critics)}}
    for name, model in models.items():
        if bad:
            step = {"lr": model.lr, "grad_norm": float("nan"), "skipped": False}
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


def _ptx(roles, examples, cfg, step_metrics):
    """The supervised loss on the global batch `examples`, this rank's share of it."""
    weight = sum(sum(e.mask[1:]) for e in examples)
    lengths = [len(e.ids) for e in examples]
    shortest = examples[min(range(len(examples)), key=lengths.__getitem__)]
    for mine in pack_into_microbatches(lengths, cfg.pass_tokens(), engine.world_size())[engine.rank()]:
        # A rank that has run out joins the collectives with an example at weight zero.
        loss, _ = sft_loss(roles.actor, [examples[i] for i in mine] or [shortest])
        loss = loss * ((1.0 if mine else 0.0) / weight)
        roles.actor.backward(loss * (0.5 * cfg.ppo.ptx_coeff))
        step_metrics.add("ptx_loss", loss)


def whitener(stats):
    """Whitening statistics of this rank -> ppo_loss's scale and shift over the global batch; one all-reduce."""
    sums = engine.all_reduce(torch.stack([stats["count"], stats["sum"], stats["sum_squares"]]).double())
    scale, shift = whitening(*sums.unbind())
    return {"advantage_scale": scale.float(), "advantage_shift": shift.float()}
