"""Stages ppo and ppo-lag: the loop. PPO-Lag maximises reward while the mean cost stays under a threshold.

    saferlhf-fast ppo-lag model=DIR reward=DIR cost=DIR data=FILE output=DIR
    saferlhf-fast ppo     model=DIR reward=DIR data=FILE output=DIR            (no constraint)

Objective: max_θ E[R]  subject to  J_C = E[C] ≤ d,  with x ~ data, y ~ π_θ(· | x), reward R(x, y), cost C(x,
y) and threshold d. Its Lagrangian:  min_{λ ≥ 0} max_θ  E[R] − λ · (E[C] − d).  θ climbs it by PPO, λ
(ppo/multiplier.py) by the mean cost of the last episodes; with several constraints each has its own C, d and
λ.

Per token t: r_t = clip(−β·kl_t + [t last]·R), c_t = clip(+β·kl_t + [t last]·C); A = (A_r − λ·A_c)/(1 + λ)
with both advantages by GAE. `ppo` is the same without the cost side; `ppo.shaping` makes it maximise R − ν·C
with one critic. Source: Safe RLHF (arXiv 2310.12773) and its reference implementation.

Beside this page: ppo/prompts.py (what is read, in which order), ppo/load_roles.py (the models),
ppo/selection.py (evaluations and which policy is kept), ppo/step_metrics.py (what a step reports).
"""

import dataclasses
import json
from pathlib import Path

from ..config.checks import check_settings
from ..config.load import to_dict
from ..config.sections import REWARD
from ..models.tokenizer import load_tokenizer
from ..rollout.prefetch import RolloutPrefetcher
from ..rollout.sample import require_engine_logprobs
from ..rollout.sample_and_score import sample_and_score, summary_of
from ..rollout.scoring import old_logprobs_and_values, score_rollout
from ..rollout.types import per_stream
from ..runtime import console, engine
from ..runtime.checkpoint.checkpointer import Checkpoints, ResumableDict
from ..runtime.metrics import Metrics
from ..runtime.run_folder import finish_run, open_run
from .anomalies import LossSpikeMonitor, NonFiniteGuard
from .ppo.advantage import advantages
from .ppo.constraints import (
    by_checkpoint_name,
    make_multipliers,
    one_or_each,
    saturation_monitors,
    set_thresholds,
    update_multipliers,
)
from .ppo.load_roles import engines_of, export_metadata_writers, load_roles
from .ppo.prompts import load_data, ptx_batches, rollouts_of, total_steps
from .ppo.selection import PolicySelection
from .ppo.step_metrics import averages, sample_rows, save_batch
from .ppo.update import in_one_pass, update, update_in_one_pass
from .stage_helpers import save_policy


def loop(roles, rollouts, ptx, multipliers, cfg, steps, after_step):
    """Takes a step of PPO for each of `rollouts`. roles: every model by its role · cfg: of the stage.

    rollouts: yields (step, Rollout) · ptx: yields the global batch of SFT examples of each step, or None ·
    multipliers: {name of a constraint: its rule}, {} without one · steps: the last step · after_step(step,
    metrics, rollout, scored, bad), where bad names what was not finite.
    """
    at_once = in_one_pass(cfg, roles)
    console.say(
        "score and update share their forward passes"
        if at_once
        else "old log-probs and values have a pass of their own"
    )
    # 1. The policy answers this rank's prompts: now, or with ppo.overlap while the step before was made.
    for (step, rollout), ptx_batch in zip(rollouts, ptx):
        require_engine_logprobs(rollout, cfg)
        # 2. The frozen models say what they think of it: reference, reward, cost.
        scored = score_rollout(rollout, roles, cfg)
        # 3. λ moves with the mean cost of the last episodes, before the actor does.
        update_multipliers(multipliers, scored, rollout)
        lambdas = {name: multiplier.value for name, multiplier in multipliers.items()}
        if at_once:
            # 4. + 5. One forward pass of actor and critics gives log-probs and values, advantages in between,
            #    losses.
            step_metrics = update_in_one_pass(roles, rollout, scored, lambdas, cfg, ptx_batch)
        else:
            # 4. Actor and critics at the weights that made the rollout; KL shaping, both GAE, combination:
            #    one launch.
            scored = dataclasses.replace(scored, **old_logprobs_and_values(rollout, roles, cfg))
            adv = advantages(rollout.cu_seqlens, scored, lambdas, cfg.ppo)
            # 5. Clipped losses into actor and critics; nothing, on any rank, when a number is not finite on
            #    one.
            step_metrics = update(roles, rollout, scored, adv, cfg, ptx_batch)
        if not cfg.ppo.overlap or step == steps:
            roles.generator.refresh()
        after_step(
            step,
            averages(rollout, scored, step_metrics, multipliers, cfg.ppo.shaping),
            rollout,
            scored,
            step_metrics.bad,
        )


def train_ppo_lag(cfg, observe=None, restart=False):
    """Runs the stage ppo-lag -> summary. The actor lies in <output>/model.

    observe: rows of an evaluation (see `sample_and_score`) -> more metrics to log with it; nothing else reads
    them · restart: as in `run_folder.open_run`.
    """
    return _train(cfg, "ppo-lag", observe, restart)


def train_ppo(cfg, observe=None, restart=False):
    """Runs the stage ppo -> summary.

    The actor lies in <output>/model. observe, restart: as in `train_ppo_lag`.
    """
    return _train(cfg, "ppo", observe, restart)


def _train(cfg, stage, observe, restart):
    check_settings(stage, cfg)  # who calls from Python comes past no other check
    engine.start(cfg.engine, cfg.seed)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)
    prompts, held_out, ptx, report = load_data(cfg, tokenizer)
    steps = total_steps(len(prompts), cfg)
    roles = load_roles(cfg, tokenizer, steps * cfg.ppo.optimizer_steps(), constrained=stage == "ppo-lag")
    folder = open_run(stage, cfg, restart)
    for line in report.lines():
        console.say(line)
    metrics = Metrics(folder, cfg.log, to_dict(cfg), stage)

    multipliers = make_multipliers(cfg) if stage == "ppo-lag" else {}
    keep = PolicySelection(roles, held_out, cfg, folder, multipliers, observe)
    skips, known, prefetcher = (
        NonFiniteGuard(min(cfg.engine.max_skips, steps)),
        ResumableDict(before=None),
        RolloutPrefetcher(),
    )
    state = {
        "skips": skips,
        "known": known,
        "keep": keep,
        "metrics": metrics,
        "ahead": prefetcher,
        **by_checkpoint_name(multipliers),
    }
    with (
        Checkpoints(
            cfg, stage, folder, engines_of(roles), state, export_metadata_writers(roles, tokenizer)
        ) as checkpoints,
        console.track(steps, stage, cfg.log.progress) as bar,
    ):
        start = checkpoints.resume()
        bar.begin_at(start)
        # what the run is compared with, and where a threshold can be
        if known["before"] is None:
            known["before"] = sample_and_score(roles, held_out, cfg)
            _write(folder / "evaluation_before.json", known["before"])
            set_thresholds(cfg, multipliers, known["before"])
            metrics.log(0, keep.metrics(known["before"]))
        if start:  # the engine was opened on the weights before
            roles.generator.refresh()
        critic_losses = [per_stream("critic_loss", name, multipliers) for name in (REWARD, *multipliers)]
        alarms = [LossSpikeMonitor((*critic_losses, "ptx_loss")), *saturation_monitors(cfg, multipliers)]

        def after_step(step, values, rollout, scored, bad):
            skips.note(step, bad, lambda: save_batch(cfg, step, rollout, scored))
            if step % cfg.log.interval == 0 or step == steps:
                metrics.log(step, {f"train/{k}": v for k, v in values.items()})
            bar.advance(tokens=values["tokens"], line=console.step_line(step, steps, values))
            if step % cfg.log.sample_interval == 0:
                console.sample_table(sample_rows(rollout, scored, cfg.log.samples))
            for alarm in alarms:
                alarm.look(step, values)
            if (cfg.evaluation.interval and step % cfg.evaluation.interval == 0) or step == steps:
                metrics.log(step, keep.offer(step))
            if cfg.save_interval and step % cfg.save_interval == 0 and step < steps:
                save_policy(roles.actor, folder / f"step-{step}", tokenizer, {"stage": stage, "step": step})
            checkpoints.after_step(step, keep.score(step))

        rollouts = rollouts_of(roles, prompts, cfg, steps, start, prefetcher)
        loop(roles, rollouts, ptx_batches(ptx, cfg, start), multipliers, cfg, steps, after_step)
        checkpoints.finish()
    scorers = {name: spec.path for name, spec in cfg.scorers().items()}
    after, kept_step, multiplier_then = keep.settle(
        {"stage": stage, "model": cfg.model, "cost": None, **scorers}
    )
    _write(folder / "evaluation_after.json", after)
    metrics.close()
    summary = {
        "steps": steps,
        "kept_step": kept_step,
        "before": summary_of(known["before"]),
        "after": summary_of(after),
        "threshold": one_or_each({name: multiplier.threshold for name, multiplier in multipliers.items()}),
        "multiplier": multiplier_then,
        "skipped_steps": skips.total,
        "data": report.as_dict(),
    }
    finish_run(folder, summary)
    return summary


def _write(path, values):
    if engine.rank() == 0:
        Path(path).write_text(json.dumps(values, indent=1), encoding="utf-8")
