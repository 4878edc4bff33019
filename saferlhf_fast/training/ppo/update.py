"""One batch of rollouts into the weights of actor and critics: passes, losses, optimiser steps.

Every loss divides by the count over the global batch, so the split into passes and ranks changes nothing. With supervised
(PTX) data the actor's step is ½(L_actor + coefficient · L_ptx), as in the reference implementation.

Two ways. `update_in_one_pass`: with one optimiser step per batch the ratio to the old policy is 1 and the old values are the
new ones, so what the step's own forward passes say is what they start from, and no pass comes before them. `update`: the old
log-probs and values were asked for beforehand.
"""

from itertools import accumulate

import torch

from ...kernels.ppo_lag_advantage import whitening
from ...kernels.ppo_loss import ppo_loss
from ...kernels.value_loss import value_loss
from ...models.packing import fill
from ...models.policy import Objective
from ...rollout.types import Scored
from ...runtime import engine
from ..sft import sft_loss
from .advantage import advantages
from .multiplier import believable


class Tally:
    """What a step tells, on the device until its end: local sums, to be added up over ranks, maxima, and what all share.

    bad: what was not finite on some rank; the step was then left out on all.
    """

    def __init__(self):
        self.sums, self.maxima, self.shared, self.advantages, self.bad = {}, {}, {}, [], []

    def add(self, name, value):
        """Adds to a local sum."""
        self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def largest(self, name, value):
        """Raises a local maximum."""
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value


def in_one_pass(cfg, cast):
    """True when old log-probs and values need no pass of their own: the settings allow it, and no model that was loaded drops
    anything out (adapters can bring dropout that no setting names)."""
    return cfg.in_one_pass() and not cast.has_dropout()


def update_in_one_pass(cast, rollout, scored, multiplier, cfg, ptx=None):
    """Trains actor and critics with one step on one batch -> Tally. multiplier: λ, 0-d, or None.

    ptx: SFT examples of the *global* batch, or None.
    """
    cast.train()
    tally, (minibatch,) = Tally(), rollout.minibatches
    settings = _settings(cfg, minibatch)
    for rows in minibatch.passes:
        packed = rollout.packed(rows)
        value_n = {}
        for critic in cast.critics:
            value_n |= critic(packed)
        between = Between(packed, rollout, rows, scored, value_n, multiplier, cfg, minibatch, settings, tally)
        if cfg.ppo.old_logp == "trainer":
            loss = cast.actor(packed, cfg.sampling, between=between)
        else:
            adv_n = between.advantages(slice(0, len(packed.counts)), slice(0, len(between.engine_logp_n)), between.engine_logp_n)
            loss, stats = cast.actor(packed, cfg.sampling, Objective(between.engine_logp_n, adv_n, settings))
            between.count(stats)
        cast.actor.backward(loss * (0.5 if ptx else 1.0))
        tally.add("actor_loss", loss)
        old_value_n = {name: value.detach() for name, value in value_n.items()}
        for critic in cast.critics:
            _critic_backward(critic, value_n, old_value_n, between.returns(), packed, settings, cfg, tally)
    _finish(cast, scored, ptx, cfg, tally)
    return tally


class Between:
    """What lies between a pass's log-probs and its losses: advantages, importance weights, the policy loss, for whole
    sequences at a time. Called by the actor's head (models/on_policy_loss.py) with the log-probs that are old and new
    at once.
    """

    def __init__(self, packed, rollout, rows, scored, value_n, multiplier, cfg, minibatch, settings, tally):
        self.packed, self.multiplier, self.cfg = packed, multiplier, cfg
        self.minibatch, self.settings, self.tally = minibatch, settings, tally
        self.real, at = rows.stop > rows.start, rollout.tokens(rows)
        count = len(packed.counts)
        self.ref_logp_n = _part(scored.ref_logp_N, at, packed, self.real)
        self.engine_logp_n = _part(rollout.engine_logp_N, at, packed, self.real)
        self.reward_b, self.cost_b = (
            None if part is None else part[rows] if self.real else part.new_zeros(count)
            for part in (scored.reward_B, scored.cost_B))
        self.value_n = {name: value.detach() for name, value in value_n.items()}
        self.return_parts = []

    def __call__(self, sequences, tokens, logp_c):
        """-> (loss, d loss / d logp_c) of a chunk, whose ratio is 1."""
        advantages_c = self.advantages(sequences, tokens, logp_c)
        with torch.enable_grad():
            leaf = logp_c.detach().requires_grad_()
            loss, stats = ppo_loss(leaf, logp_c, advantages_c, cu_seqlens=self._offsets(sequences), **self.settings)
        grad_c, = torch.autograd.grad(loss, leaf)
        self.count(stats)
        return loss.detach(), grad_c

    def advantages(self, sequences, tokens, old_logp_c):
        """Of some sequences, importance weights included; zeros for a filler."""
        values = [self.value_n[name][tokens] if name in self.value_n else None for name in ("reward", "cost")]
        if not self.real:                            # nothing is learned from it: its returns are its values
            self.return_parts.append(values)
            return torch.zeros_like(old_logp_c)
        scored = Scored(self.ref_logp_n[tokens], self.reward_b[sequences],
                        None if self.cost_b is None else self.cost_b[sequences], old_logp_c, *values)
        adv = advantages(self._offsets(sequences), scored, self.multiplier, self.cfg.ppo)
        self.tally.advantages.append(adv.stats)
        self.return_parts.append([adv.reward_returns_N, adv.cost_returns_N])
        engine_logp_c = None if self.engine_logp_n is None else self.engine_logp_n[tokens]
        return _weighted(adv.advantages_N, old_logp_c, engine_logp_c, self.cfg, self.tally, self.minibatch, True)

    def returns(self):
        """{"reward": returns_n, "cost": … or None} of the whole pass, once all chunks were here."""
        return {name: None if parts[0] is None else torch.cat(parts)
                for name, parts in zip(("reward", "cost"), zip(*self.return_parts))}

    def count(self, stats):
        """Tallies a policy loss's statistics, each token as much as any other of the minibatch."""
        if self.real:
            _count(stats, self.minibatch, self.tally)

    def _offsets(self, sequences):
        counts = self.packed.counts[sequences]
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(self.ref_logp_n.device, non_blocking=True)


def update(cast, rollout, scored, adv, cfg, ptx=None):
    """Trains actor and critics on one batch, in as many epochs and minibatches as the recipe says -> Tally of the last epoch.

    ptx: SFT examples of the *global* batch, or None.
    """
    cast.train()
    whitened = whitener(adv.stats) if cfg.ppo.whiten else {}
    for _ in range(cfg.ppo.epochs):
        tally = Tally()
        tally.advantages.append(adv.stats)
        for i, minibatch in enumerate(rollout.minibatches):
            settings = _settings(cfg, minibatch)
            for rows in minibatch.passes:
                _known_pass(cast, rollout, scored, adv, rows, cfg, minibatch, {**settings, **whitened}, settings, ptx, tally)
            _finish(cast, scored, (ptx[i::len(rollout.minibatches)] or ptx) if ptx else None, cfg, tally)
            if tally.bad:                                # what comes after a bad step would start from the same numbers
                return tally
        for name in tally.sums:
            tally.sums[name] = tally.sums[name] / len(rollout.minibatches)
    return tally


def _known_pass(cast, rollout, scored, adv, rows, cfg, minibatch, actor_settings, settings, ptx, tally):
    """Forward and backward of all trained models on some rows, whose old log-probs, values and advantages are known."""
    packed, at, real = rollout.packed(rows), rollout.tokens(rows), rows.stop > rows.start
    old_logp_n = _part(scored.logp_N, at, packed, real)
    weighted_n = _weighted(_part(adv.advantages_N, at, packed, real), old_logp_n,
                           _part(rollout.engine_logp_N, at, packed, real), cfg, tally, minibatch, real)
    loss, stats = cast.actor(packed, cfg.sampling, Objective(old_logp_n, weighted_n, actor_settings))
    cast.actor.backward(loss * (0.5 if ptx else 1.0))
    tally.add("actor_loss", loss)
    if real:
        _count(stats, minibatch, tally)
    old_value_n = {name: _part(getattr(scored, f"{name}_values_N"), at, packed, real) for name in ("reward", "cost")}
    returns = {"reward": _part(adv.reward_returns_N, at, packed, real), "cost": _part(adv.cost_returns_N, at, packed, real)}
    for critic in cast.critics:
        value_n = critic(packed)
        # Nothing is learned from a filler: its returns are its values. Zeros would pull the critic towards 0.
        known = (old_value_n, returns) if real else [{name: value.detach() for name, value in value_n.items()}] * 2
        _critic_backward(critic, value_n, *known, packed, settings, cfg, tally)


def _settings(cfg, minibatch):
    """What all losses of an optimiser step share."""
    ppo = cfg.ppo
    count = minibatch.sequences if ppo.reduction == "sequence-mean" else minibatch.tokens
    return {"clip_ratio": ppo.clip_ratio, "reduction": ppo.reduction, "normalizer": max(1, count)}


def _part(values_N, at, packed, real):
    """A pass's share of packed values; zeros for a filler, whose losses are then zero."""
    if values_N is None:
        return None
    return values_N[at] if real else values_N.new_zeros(sum(packed.counts))


def _weighted(advantages_n, old_logp_n, engine_logp_n, cfg, tally, minibatch, real):
    """Advantages times truncated importance weights where the recipe wants them; tallies how far the engine is off."""
    if engine_logp_n is None or cfg.ppo.old_logp == "engine" or not real:
        return advantages_n
    gap_n = old_logp_n - engine_logp_n
    share = 1.0 / max(1, minibatch.tokens)
    tally.add("engine_gap_mean", gap_n.abs().sum() * share)
    tally.add("engine_gap_share", (gap_n.exp() - 1.0).abs().gt(0.01).sum() * share)
    if gap_n.numel():
        tally.largest("engine_gap_max", gap_n.abs().max())
    if cfg.ppo.importance_cap is None:
        return advantages_n
    weight_n = gap_n.exp().clamp(max=cfg.ppo.importance_cap)
    tally.add("importance_weight", weight_n.sum() * share)
    return advantages_n * weight_n


def _count(stats, minibatch, tally):
    """A policy loss's statistics are means over its tokens: here their share of the minibatch's."""
    for name in ("clip_fraction", "approx_kl"):
        tally.add(name, stats[name] * stats["tokens"] / max(1, minibatch.tokens))


def _critic_backward(critic, value_n, old_value_n, returns, packed, settings, cfg, tally):
    """One backward of a critic, for the losses of all streams that it has a head for."""
    total = 0.0
    for name in critic.names:
        loss, _ = value_loss(value_n[name], old_value_n[name], returns[name], clip_value=cfg.ppo.clip_value,
                             cu_seqlens=packed.cu_seqlens, reduction=settings["reduction"],
                             normalizer=settings["normalizer"])
        tally.add(f"{name}_critic_loss", loss)
        total = total + loss
    critic.engine.backward(total)


def _finish(cast, scored, ptx, cfg, tally):
    """The supervised loss, one look at what must be finite, the optimiser steps: of all models or, on all ranks, of none."""
    if ptx:
        _ptx(cast, ptx, cfg, tally)
    losses = {name: value for name, value in tally.sums.items() if name.endswith("loss")}
    models = [(cast.actor, ("actor",)), *((c.engine, tuple(f"{name}_critic" for name in c.names)) for c in cast.critics)]
    norms = {f"gradient of {' and '.join(names)}": model.local_norm() for model, names in models}
    scores = {f"score of the {name} model": believable(score_B) for name, score_B in
              (("reward", scored.reward_B), ("cost", scored.cost_B))}
    scores |= {"log-prob of the reference": scored.ref_logp_N, "log-prob of the policy": scored.logp_N}
    tally.bad = bad = engine.not_finite({**scores, **losses, **norms})
    for model, names in models:
        if bad:
            step = {"lr": model.lr, "grad_norm": float("nan"), "skipped": False}
            model.discard()
        else:
            step = model.step()
        if step["skipped"]:
            tally.bad = [*tally.bad, f"gradient of {' and '.join(names)}"]
        for name in names:
            tally.shared |= {f"{name}_lr": step["lr"], f"{name}_grad_norm": step["grad_norm"]}


def _ptx(cast, examples, cfg, tally):
    """The supervised loss on the global batch `examples`, this rank's share of it."""
    weight = sum(sum(e.mask[1:]) for e in examples)
    lengths = [len(e.ids) for e in examples]
    shortest = examples[min(range(len(examples)), key=lengths.__getitem__)]
    for mine in fill(lengths, cfg.pass_tokens(), engine.world_size())[engine.rank()]:
        # A rank that has run out joins the collectives with an example at weight zero.
        loss, _ = sft_loss(cast.actor, [examples[i] for i in mine] or [shortest])
        loss = loss * ((1.0 if mine else 0.0) / weight)
        cast.actor.backward(loss * (0.5 * cfg.ppo.ptx_coeff))
        tally.add("ptx_loss", loss)


def whitener(stats):
    """Whitening statistics of this rank -> ppo_loss's scale and shift over the global batch; one all-reduce."""
    sums = engine.all_reduce(torch.stack([stats["count"], stats["sum"], stats["sum_squares"]]).double())
    scale, shift = whitening(*sums.unbind())
    return {"advantage_scale": scale.float(), "advantage_shift": shift.float()}
