"""The loop of the stages ppo-lag and ppo: maximise reward while the mean cost stays at or under a threshold.

    saferlhf-fast ppo-lag model=DIR reward=DIR cost=DIR data=FILE output=DIR
    saferlhf-fast ppo     model=DIR reward=DIR data=FILE output=DIR            (no constraint)

Objective, for prompts x from the data, responses y ~ π_θ(· | x), reward R(x, y), cost C(x, y), threshold d:

    max_θ E[R]   subject to   J_C = E[C] ≤ d
    min_{λ ≥ 0} max_θ  E[R] − λ · (E[C] − d)                                   (its Lagrangian)

θ ascends by PPO with the advantage A = (A_r − λ·A_c)/(1 + λ), λ by the mean cost of the last episodes. `ppo`
is the same without the cost: λ = 0, A = A_r; with `ppo.shaping` it maximises R − ν·C with one critic.

Source: Dai et al. (2023), Safe RLHF, arXiv 2310.12773, and its reference implementation.

This page leaves out data (ppo/prompts.py), loading of models (ppo/load_roles.py), evaluation and the choice
of the policy to keep (ppo/selection.py), and what a step reports (ppo/step_metrics.py, ppo/after_step.py).
Shapes: B responses of this rank, N response tokens of them, packed one response behind the other.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.checks import check_settings
from ..config.load import to_dict
from ..config.sections import REWARD
from ..models.tokenizer import load_tokenizer
from ..rollout.prefetch import RolloutPrefetcher
from ..rollout.sample import require_engine_logprobs
from ..rollout.sample_and_score import sample_and_score, summary_of
from ..rollout.scoring import old_logprobs_and_values, score_rollout
from ..rollout.types import per_stream
from ..runtime import console, disk, engine
from ..runtime.checkpoint.checkpointer import Checkpoints
from ..runtime.checkpoint.state import ResumableDict
from ..runtime.metrics import Metrics
from ..runtime.run_folder import finish_run, open_run
from .anomalies import (
    EngineGapAlarm,
    LossSpikeMonitor,
    MultiplierSaturation,
    NonFiniteGuard,
    SpareMassAlarm,
)
from .ppo.advantage import advantages
from .ppo.after_step import AfterStep
from .ppo.constraints import (
    by_checkpoint_name,
    make_multipliers,
    one_or_each,
    saturation_monitors,
    set_thresholds,
    update_multipliers,
)
from .ppo.load_roles import engines_of, export_metadata_writers, load_roles
from .ppo.multiplier import MultiplierRule
from .ppo.prompts import load_data, ptx_batches, rollouts_of, total_steps
from .ppo.selection import Observer, PolicySelection
from .ppo.step_metrics import averages
from .ppo.update import in_one_pass, update, update_in_one_pass

if TYPE_CHECKING:
    from ..config.stages import PPOConfig
    from ..data.examples import SFTExample
    from ..rollout.roles import Roles
    from ..rollout.types import Rollout, Scored


def loop(
    roles: "Roles",
    rollouts: "Iterable[tuple[int, Rollout]]",
    ptx: "Iterable[list[SFTExample] | None]",
    multipliers: Mapping[str, MultiplierRule],
    cfg: "PPOConfig",
    steps: int,
    after_step: "Callable[[int, dict[str, float], Rollout, Scored, list[str]], None]",
) -> None:
    """Takes one step for each rollout.

    Args:
        roles: Actor, reference, reward and cost scorers, critics, and the engine that samples.
        rollouts: Yields (step, Rollout); taking one samples it.
        ptx: Yields the SFT examples of each step's global batch, or None.
        multipliers: The rule that moves λ by name of the constraint; empty in the stage ppo.
        cfg: Settings of the stage.
        steps: The last step.
        after_step: Called with step, metrics, rollout, scores and the names of what was not finite.
    """
    one_pass = in_one_pass(cfg, roles)
    console.say(
        "score and update share their forward passes"
        if one_pass
        else "old log-probs and values have a pass of their own"
    )
    for (step, rollout), ptx_batch in zip(rollouts, ptx):
        # 1. Sample y ~ π_θ(· | x) for this rank's prompts -> rollout: token ids of B prompts and responses.
        #    With ppo.overlap it was sampled during the step before.
        require_engine_logprobs(rollout, cfg)

        # 2. Score by the frozen models -> scored: ref_logp_N = log π_ref(y_t | x, y_<t) from the reference,
        #    reward_B = R(x, y) from the reward model, cost_B = C(x, y) from the cost model.
        scored = score_rollout(rollout, roles, cfg)

        # 3. Move λ before the actor by its rule (ppo/multiplier.py): log λ += lr · λ · (J_C − d), or PID.
        #    J_C is the mean cost of the last multiplier.window episodes of all ranks, this batch included.
        update_multipliers(multipliers, scored, rollout)
        lambdas = {name: multiplier.value for name, multiplier in multipliers.items()}

        # 4. Advantages, from the actor's logp_N (kl_t = logp_t − ref_logp_t) and the critics' values V_N:
        #      r_t = clip(−β·kl_t + [t last]·R, ±clip_score)      A_r, returns_r = GAE(r, V_r)
        #      c_t = clip(+β·kl_t + [t last]·C, ±clip_score)      A_c, returns_c = GAE(c, V_c)
        #      A = (A_r − λ·A_c) / (1 + λ)
        # 5. Update actor and critics, with ρ = exp(logp_new − logp):
        #      L_actor  = −mean min(ρ·A, clip(ρ, 1 ± ε)·A);  with PTX data ½·(L_actor + ptx_coeff·L_ptx)
        #      L_critic = ½·mean max((V − returns)², (clip(V, V_old ± clip_value) − returns)²), each
        #    When a number is not finite on one rank, no model is changed on any rank.
        if one_pass:  # the only step on this batch: the forward passes of 5 give logp_N and V_N to 4 as well
            step_metrics = update_in_one_pass(roles, rollout, scored, lambdas, cfg, ptx_batch)
        else:
            scored = dataclasses.replace(scored, **old_logprobs_and_values(rollout, roles, cfg))
            adv = advantages(rollout.cu_seqlens, scored, lambdas, cfg.ppo)  # 4: A_N, returns_N
            step_metrics = update(roles, rollout, scored, adv, cfg, ptx_batch)  # 5

        # 6. Give the new weights to the sampling engine (with ppo.overlap it has a snapshot), and report.
        if not cfg.ppo.overlap or step == steps:
            roles.rollout_engine.refresh()
        values = averages(rollout, scored, step_metrics, multipliers, cfg.ppo.shaping)
        after_step(step, values, rollout, scored, step_metrics.bad)


def train_ppo_lag(cfg: "PPOConfig", observe: Observer | None = None, restart: bool = False) -> dict[str, Any]:
    """Runs the stage ppo-lag: PPO on reward under the constraint mean cost ≤ threshold.

    Writes the kept actor to <output>/model, evaluations of the starting and the kept policy, metrics and
    checkpoints. Every rank must call it.

    Args:
        cfg: Settings of the stage, with a cost model.
        observe: Computes more metrics of the rows of an evaluation, which are logged with it and change
            nothing.
        restart: As in `run_folder.open_run`.

    Returns:
        The summary of the run: steps, the kept step, mean numbers before and after, threshold, λ at the kept
        step, skipped steps, counts of the data.

    Raises:
        UserError: If settings, models or data do not fit together.
        NonFinite: If too many steps in a row gave numbers that are not finite.

    Source:
        Dai et al. (2023), Safe RLHF: Safe Reinforcement Learning from Human Feedback, arXiv 2310.12773.
    """
    return _train(cfg, "ppo-lag", observe, restart)


def train_ppo(cfg: "PPOConfig", observe: Observer | None = None, restart: bool = False) -> dict[str, Any]:
    """Runs the stage ppo: PPO on reward alone, or on R − ν·C with `ppo.shaping`.

    Args:
        cfg: Settings of the stage; a cost model is optional and, without `ppo.shaping`, only reported.
        observe: As in `train_ppo_lag`.
        restart: As in `run_folder.open_run`.

    Returns:
        The summary of the run, as `train_ppo_lag` gives it; threshold and multiplier are None.

    Raises:
        UserError: If settings, models or data do not fit together.
        NonFinite: If too many steps in a row gave numbers that are not finite.

    Source:
        Schulman et al. (2017), arXiv 1707.06347; the reward-shaping baseline of Dai et al. (2023), Safe RLHF,
        arXiv 2310.12773.
    """
    return _train(cfg, "ppo", observe, restart)


def _train(cfg: "PPOConfig", stage: str, observe: Observer | None, restart: bool) -> dict[str, Any]:
    """The run around the loop: data, models, first evaluation, steps, kept policy, summary."""
    check_settings(stage, cfg)  # a caller from Python comes by no other check
    engine.start(cfg.engine, cfg.seed)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)
    prompts, held_out, ptx, report = load_data(cfg, tokenizer)
    steps, constrained = total_steps(len(prompts), cfg), stage == "ppo-lag"
    roles = load_roles(cfg, tokenizer, steps * cfg.ppo.optimizer_steps(), constrained)
    folder = open_run(stage, cfg, restart)
    for line in report.lines():
        console.say(line)
    metrics = Metrics(folder, cfg.log, to_dict(cfg), stage)

    multipliers = make_multipliers(cfg) if constrained else {}
    selection = PolicySelection(roles, held_out, cfg, folder, multipliers, observe)
    guard, prefetcher = NonFiniteGuard(min(cfg.engine.max_skips, steps)), RolloutPrefetcher()
    evaluations = ResumableDict(before=None)
    # the names are those in checkpoints
    state: dict[str, Any] = {"skips": guard, "known": evaluations, "keep": selection, "metrics": metrics}
    state |= {"ahead": prefetcher, **by_checkpoint_name(multipliers)}
    writers = export_metadata_writers(roles, tokenizer)
    with (
        Checkpoints(cfg, stage, folder, engines_of(roles), state, writers) as checkpoints,
        console.track(steps, stage, cfg.log.progress) as bar,
    ):
        start = checkpoints.resume()
        selection.warn_if_disk_is_scarce(engines_of(roles).values(), steps - start)
        bar.begin_at(start)
        if evaluations["before"] is None:  # the starting policy: what the run is compared with
            rows = evaluations["before"] = sample_and_score(roles, held_out, cfg)
            _write(folder / "evaluation_before.json", rows)
            set_thresholds(cfg, multipliers, rows)
            metrics.log(0, selection.metrics(rows))
        if start:  # the sampling engine was opened with the starting weights
            roles.rollout_engine.refresh()
        losses = [per_stream("critic_loss", name, multipliers) for name in (REWARD, *multipliers)]
        monitors: list[LossSpikeMonitor | MultiplierSaturation] = [LossSpikeMonitor((*losses, "ptx_loss"))]
        monitors += saturation_monitors(cfg, multipliers)
        by_engine = cfg.ppo.old_logp == "engine" and in_one_pass(cfg, roles)
        alarms = EngineGapAlarm(cfg.sampling, engine.precision(cfg.engine), by_engine), SpareMassAlarm()
        after_step = AfterStep(
            cfg, stage, steps, metrics, bar, guard, monitors, alarms, selection, checkpoints
        )
        rollouts = rollouts_of(roles, prompts, cfg, steps, start, prefetcher)
        loop(roles, rollouts, ptx_batches(ptx, cfg, start), multipliers, cfg, steps, after_step)
        checkpoints.finish()
    scorers = {name: spec.path for name, spec in cfg.scorers().items()}
    card = {"stage": stage, "model": cfg.model, "cost": None, **scorers}
    after, kept_step, kept_multiplier = selection.settle(card)
    _write(folder / "evaluation_after.json", after)
    metrics.close()
    summary = {
        "steps": steps,
        "kept_step": kept_step,
        "before": summary_of(evaluations["before"]),
        "after": summary_of(after),
        "threshold": one_or_each({name: multiplier.threshold for name, multiplier in multipliers.items()}),
        "multiplier": kept_multiplier,
        "skipped_steps": guard.total,
        "data": report.as_dict(),
    }
    finish_run(folder, summary)
    return summary


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    if engine.rank() == 0:
        disk.write_text(path, json.dumps(rows, indent=1))
