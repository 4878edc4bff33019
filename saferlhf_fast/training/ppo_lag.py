"""Stages ppo and ppo-lag: the loop. PPO-Lag maximises reward while the mean cost stays under a threshold.

    saferlhf-fast ppo-lag model=DIR reward=DIR cost=DIR data=FILE output=DIR
    saferlhf-fast ppo     model=DIR reward=DIR data=FILE output=DIR            (no constraint)

Per token t: r_t = clip(−β·kl_t + [t last]·R), c_t = clip(+β·kl_t + [t last]·C); A = (A_r − λ·A_c)/(1 + λ) with both
advantages by GAE; λ follows the mean cost of the last episodes (ppo/multiplier.py). `ppo` is the same without
the cost side; `ppo.shaping` makes it maximise R − ν·C with one critic.
Source: Safe RLHF (arXiv 2310.12773) and its reference implementation.
"""

import dataclasses
import json
from itertools import islice
from pathlib import Path

from ..config.load import to_dict
from ..errors import UserError
from ..models.export_files import describe
from ..models.tokenizer import load_tokenizer
from ..rollout.batch import assemble, generate
from ..rollout.prefetch import Ahead, rollouts_ahead, step_seed
from ..rollout.sample_and_score import ask, summary_of
from ..rollout.scoring import ask_trained, judge
from ..runtime import console, engine
from ..runtime.checkpoint.checkpointer import Checkpoints, Memory
from ..runtime.metrics import Metrics
from ..runtime.run_folder import finish_run, open_run
from .anomalies import AtBound, Skips, Spikes
from .ppo.advantage import advantages
from .ppo.load_roles import load_cast
from .ppo.multiplier import make_multiplier, suggestion
from .ppo.prompts import load_data, prompt_batches, ptx_batches, total_steps
from .ppo.selection import PolicySelection
from .ppo.step_metrics import averages, sample_rows
from .ppo.update import in_one_pass, update, update_in_one_pass
from .stage_helpers import save_policy


def loop(cast, prompts, ptx, multiplier, cfg, steps, after_step, start=0, skips=None, ahead=None):
    """Steps start + 1 to `steps` of PPO; λ = multiplier.value, None without a constraint. after_step(step, metrics, rollout,
    scored). skips: a `Skips` for steps with numbers that are not finite · ahead: a `prefetch.Ahead`, if the recipe overlaps."""
    skips = skips or Skips(cfg.engine.max_skips)
    at_once = in_one_pass(cfg, cast)
    console.say("score and update share their forward passes" if at_once else "old log-probs and values have a pass of their own")
    batches = enumerate(islice(prompt_batches(prompts, cfg, steps), start, None), start + 1)
    rollouts = rollouts_ahead(cast, batches, cfg, ahead or Ahead()) if cfg.ppo.overlap else rollouts_now(cast, batches, cfg)
    # 1. The current policy answers this rank's prompts, or the one before it has while the last step was made.
    for step, (rollout, ptx_batch) in enumerate(zip(rollouts, islice(ptx_batches(ptx, cfg), start, None)), start + 1):
        refuse_silence(rollout, cfg)
        # 2. The frozen models say what they think of it: reference, reward, cost.
        scored = judge(rollout, cast, cfg)
        # 3. λ moves with the mean cost of the last episodes, before the actor does.
        if multiplier is not None:
            multiplier.update(engine.all_gather(scored.cost_B, rollout.order, rollout.size))
        value = multiplier.value if multiplier is not None else None
        if at_once:
            # 4. + 5. One forward pass of actor and critics gives log-probs and values, advantages in between, losses.
            tally = update_in_one_pass(cast, rollout, scored, value, cfg, ptx_batch)
        else:
            # 4. Actor and critics at the weights that made the rollout; KL shaping, both GAE, combination: one launch.
            scored = dataclasses.replace(scored, **ask_trained(rollout, cast, cfg))
            adv = advantages(rollout.cu_seqlens, scored, value, cfg.ppo)
            # 5. Clipped losses into actor and critics; nothing, on any rank, when a number is not finite on one.
            tally = update(cast, rollout, scored, adv, cfg, ptx_batch)
        skips.note(step, tally.bad, lambda: save_batch(cfg, step, rollout, scored))       # noqa: B023 (called at once)
        if not cfg.ppo.overlap or step == steps:
            cast.generator.refresh()
        after_step(step, averages(rollout, scored, tally, multiplier, cfg.ppo.shaping), rollout, scored)


def rollouts_now(cast, batches, cfg):
    """Yields the Rollout of each (step, prompts), sampled by the policy as it is when it is asked for."""
    for step, mine in batches:
        yield sample(cast, mine, cfg, step)


def sample(cast, mine, cfg, step):
    """-> Rollout of this rank's prompts at the current weights."""
    rows, responses = generate(cast.generator, mine, cast.tokenizer, cfg.sampling, cfg.max_length, step_seed(cfg, step))
    return assemble(rows, responses, cast.tokenizer, cfg.pass_tokens(), minibatches=cfg.ppo.minibatches,
                    n=cfg.sampling.num_return_sequences)


def refuse_silence(rollout, cfg):
    """UserError when the recipe starts from log-probs that the rollout engine does not tell."""
    if rollout.engine_logp_N is None and (cfg.ppo.old_logp == "engine" or cfg.ppo.importance_cap is not None):
        key = "importance_cap" if cfg.ppo.old_logp == "trainer" else "old_logp"
        raise UserError(f"ppo.{key}: needs the log-probs of the rollout engine; sampling.engine={cfg.sampling.engine} gave none")


def train_ppo_lag(cfg, observe=None):
    """Runs the stage ppo-lag -> summary. The actor lies in <output>/model.

    observe: rows of an evaluation (see `ask`) -> more metrics to log with it; nothing else reads them.
    """
    if cfg.cost is None:
        raise UserError("cost: expected a cost model for ppo-lag, got none; the stage ppo runs without one")
    if cfg.ppo.shaping is not None:
        raise UserError("ppo.shaping: expected none in ppo-lag, whose λ does its work; the stage ppo takes it")
    return _train(cfg, "ppo-lag", observe)


def train_ppo(cfg, observe=None):
    """Runs the stage ppo -> summary. The actor lies in <output>/model. observe: as in `train_ppo_lag`."""
    if cfg.ppo.shaping is not None and cfg.cost is None:
        raise UserError("cost: expected a cost model for ppo.shaping, got none")
    return _train(cfg, "ppo", observe)


def _train(cfg, stage, observe):
    engine.start(cfg.engine, cfg.seed)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)
    prompts, held_out, ptx, report = load_data(cfg, tokenizer)
    steps = total_steps(len(prompts), cfg)
    cast = load_cast(cfg, tokenizer, steps * cfg.ppo.optimizer_steps(), constrained=stage == "ppo-lag")
    folder = open_run(stage, cfg)
    for line in report.lines():
        console.say(line)
    metrics = Metrics(folder, cfg.log, to_dict(cfg), stage)

    multiplier = make_multiplier(cfg.multiplier, 0.0, engine.device()) if stage == "ppo-lag" else None
    keep = PolicySelection(cast, held_out, cfg, folder, tokenizer, multiplier, observe)
    skips, known, ahead = Skips(min(cfg.engine.max_skips, steps)), Memory(before=None), Ahead()
    spikes = Spikes(("reward_critic_loss", "cost_critic_loss", "ptx_loss"))
    state = {"skips": skips, "known": known, "keep": keep, "metrics": metrics, "ahead": ahead,
             **({} if multiplier is None else {"multiplier": multiplier})}
    with (Checkpoints(cfg, stage, folder, engines_of(cast), state, descriptions(cast, tokenizer)) as checkpoints,
          console.track(steps, stage, cfg.log.progress) as bar):
        start = checkpoints.resume()
        bar.begin_at(start)
        if known["before"] is None:
            known["before"] = first_look(cast, held_out, cfg, folder, multiplier)
            metrics.log(0, keep.metrics(known["before"]))
        if start:                                        # the engine was opened on the weights before
            cast.generator.refresh()
        bound = None if multiplier is None else AtBound(cfg.multiplier.max, multiplier.threshold)

        def after_step(step, values, rollout, scored):
            if step % cfg.log.interval == 0 or step == steps:
                metrics.log(step, {f"train/{k}": v for k, v in values.items()})
            bar.advance(tokens=values["tokens"], line=console.step_line(step, steps, values))
            if step % cfg.log.sample_interval == 0:
                console.sample_table(sample_rows(rollout, scored, cfg.log.samples))
            for alarm in filter(None, (spikes, bound)):
                alarm.look(step, values)
            if (cfg.evaluation.interval and step % cfg.evaluation.interval == 0) or step == steps:
                metrics.log(step, keep.offer(step))
            if cfg.save_interval and step % cfg.save_interval == 0 and step < steps:
                save_policy(cast.actor, folder / f"step-{step}", tokenizer, {"stage": stage, "step": step})
            checkpoints.after_step(step, keep.score(step))

        loop(cast, prompts, ptx, multiplier, cfg, steps, after_step, start, skips, ahead)
        checkpoints.finish()
    after, kept_step, multiplier_then = keep.settle({"stage": stage, "model": cfg.model, "reward": cfg.reward, "cost": cfg.cost})
    _write(folder / "evaluation_after.json", after)
    metrics.close()
    summary = {"steps": steps, "kept_step": kept_step, "before": summary_of(known["before"]), "after": summary_of(after),
               "threshold": None if multiplier is None else multiplier.threshold,
               "multiplier": multiplier_then, "skipped_steps": skips.total, "data": report.as_dict()}
    finish_run(folder, summary)
    return summary


def first_look(cast, held_out, cfg, folder, multiplier):
    """The starting policy on the evaluation prompts, -> rows: what the run is compared with, and where a threshold can lie."""
    before = ask(cast, held_out, cfg)
    _write(folder / "evaluation_before.json", before)
    threshold = starting_threshold(cfg, before)
    if multiplier is not None:
        multiplier.threshold = threshold
    return before


def engines_of(cast):
    """{name: Engine} of the trained models, by which a checkpoint knows them."""
    critics = {"critic" if len(c.names) > 1 else f"{c.names[0]}_critic": c.engine for c in cast.critics}
    return {"actor": cast.actor, **critics}


def descriptions(cast, tokenizer):
    """{name: function that describes a trained model for exports}."""
    return {name: describe(model.module, tokenizer) for name, model in engines_of(cast).items()}


def starting_threshold(cfg, before):
    """d: the recipe's number, or the quantile of the starting policy's costs; prints what lies within reach."""
    costs = [row["cost"] for row in before if row.get("cost") is not None]
    if not costs:
        return cfg.multiplier.threshold
    import torch
    costs = torch.tensor(costs)
    console.say(suggestion(costs))
    if cfg.multiplier.threshold_quantile is None:
        return cfg.multiplier.threshold
    return torch.quantile(costs, cfg.multiplier.threshold_quantile).item()


def save_batch(cfg, step, rollout, scored):
    """Writes the texts and scores of a batch that gave a non-finite loss -> path of this rank's file."""
    path = Path(cfg.output).expanduser() / f"nonfinite_batch_step{step}_rank{engine.rank()}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for row in sample_rows(rollout, scored, len(rollout)):
            file.write(json.dumps(row) + "\n")
    return path


def _write(path, values):
    if engine.rank() == 0:
        Path(path).write_text(json.dumps(values, indent=1), encoding="utf-8")
