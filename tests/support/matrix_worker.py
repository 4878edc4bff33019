"""Run by test_matrix.py in one or more processes: three optimiser steps of each cell of the matrix.

Between the first two steps there is a step that is not finite on one rank and is skipped on all ranks; the
references do not have it.

    torchrun … matrix_worker.py WORLD CELLS OUT

WORLD: a JSON file of the paths that the fixture `world` of test_matrix.py made
CELLS: a JSON file with a list of cells
OUT: gets one JSON line before each cell and one after it; after a crash it names the cell that failed
"""

import dataclasses
import gc
import json
import os
import sys
import time
import traceback

import torch
from matrix import LORA, UPDATES, WITH_ONE_CRITIC, WITH_PTX, Cell
from matrix import PPO as POLICY_STAGES

from saferlhf_fast.config.stages import PPO, Engine, Lora, Optimizer, PPOConfig
from saferlhf_fast.data.batches import share
from saferlhf_fast.data.examples import PromptExample, preference_examples, sft_examples
from saferlhf_fast.models.causal_lm import load_causal_lm
from saferlhf_fast.models.lora import add_lora
from saferlhf_fast.models.policy import Policy
from saferlhf_fast.models.score_model import load_score_model
from saferlhf_fast.models.tokenizer import load_tokenizer
from saferlhf_fast.rollout.batch import assemble
from saferlhf_fast.rollout.scoring import old_logprobs_and_values, score_rollout
from saferlhf_fast.rollout.types import Response
from saferlhf_fast.runtime import engine
from saferlhf_fast.training import dpo, sft
from saferlhf_fast.training.ppo.advantage import advantages
from saferlhf_fast.training.ppo.constraints import update_multipliers
from saferlhf_fast.training.ppo.load_roles import load_roles
from saferlhf_fast.training.ppo.multiplier import LagrangeMultiplier
from saferlhf_fast.training.ppo.step_metrics import averages
from saferlhf_fast.training.ppo.update import in_one_pass, update, update_in_one_pass
from saferlhf_fast.training.preference import pair_loss
from saferlhf_fast.training.supervised import SupervisedTask, evaluate, train_step

STEPS, GLOBAL_BATCH, BUDGET = 3, 7, 80  # sequences or pairs of a step; tokens of a pass
RATE, ADAPTERS = Optimizer(learning_rate=1e-3), Lora(rank=4)


def config(cell):
    """The Engine config of a cell."""
    return Engine(
        zero_stage=cell.zero,
        precision=cell.precision,
        offload_optimizer=cell.offload in ("states", "both"),
        offload_parameters=cell.offload in ("weights", "both"),
        frozen="auto" if cell.frozen == "-" else cell.frozen,
    )


def magnitudes(trained):
    """Mean magnitude of an engine's weights after the last step."""
    with trained.gathered():
        weights = [p.detach().double().abs().flatten().cpu() for p in trained.module.parameters()]
    return torch.cat(weights).mean().item()


def with_nan(loss, stats=None):
    """Makes a loss or score NaN on the last rank alone: all ranks must skip the step without any effect."""
    return loss * (float("nan") if engine.rank() == engine.world_size() - 1 else 1.0), stats


# ---------------------------------------------------------------- supervised stages


def adapted(model, cell):
    return add_lora(model, ADAPTERS) if cell.form == LORA else model


def task_of(cell, world, tokenizer):
    """Returns (module to train, examples, SupervisedTask) with the loss of the stage itself."""
    if cell.stage == "sft":
        examples, _ = sft_examples(world["sft"], tokenizer)
        return (
            Policy(adapted(load_causal_lm(world["model"]), cell)),
            examples,
            SupervisedTask(
                weigh=lambda e: sum(e.mask[1:]), tokens=lambda e: len(e.ids), loss=sft.sft_loss, save=None
            ),
        )
    kind = "better" if cell.stage == "dpo" else cell.stage
    examples, _ = preference_examples(world["pairs"], tokenizer, kind=kind)
    if cell.stage == "dpo":
        # Other weights: with the same ones every margin of the first step would be 0.
        reference = engine.Frozen(Policy(load_causal_lm(world["other"])), config(cell))
        module = Policy(adapted(load_causal_lm(world["model"]), cell))

        def loss(model, batch):
            return dpo.batch_loss(model, reference, batch, 0.1)
    else:
        module = adapted(load_score_model(world[cell.stage]), cell)

        def loss(model, batch):
            return pair_loss(model, batch, cell.stage, 0.001, cell.form == "token")

    return (
        module,
        examples,
        SupervisedTask(
            weigh=lambda e: 1, loss=loss, save=None, tokens=lambda e: len(e.first_ids) + len(e.second_ids)
        ),
    )


def supervised(cell, world, tokenizer):
    """Trains a supervised stage; returns {name: number} of each step."""
    module, examples, task = task_of(cell, world, tokenizer)
    trained = engine.Engine(module, RATE, config(cell), 10)
    rows = []
    for step in range(STEPS):
        batch = [examples[(step * GLOBAL_BATCH + i) % len(examples)] for i in range(GLOBAL_BATCH)]
        if step == 1 and cell != cell.reference:
            nan_task = dataclasses.replace(task, loss=lambda *given: with_nan(*task.loss(*given)))
            assert "loss" in train_step(trained, nan_task, batch, BUDGET)[1]
        values, bad = train_step(trained, task, batch, BUDGET)
        assert not bad, bad
        rows.append(values)
    rows.append({**evaluate(trained, task, examples[:5], BUDGET), "weights": magnitudes(trained)})
    return rows


# ---------------------------------------------------------------- policy optimisation


def stored_rollout(step, tokenizer, cfg):
    """This rank's share of a rollout of random tokens in uneven lengths.

    The rollout of all ranks is the same for any number of processes.
    """
    draw = torch.Generator().manual_seed(step)
    rows = []
    for _ in range(GLOBAL_BATCH):
        prompt_length, response_length = torch.randint(3, 7, (2,), generator=draw).tolist()
        ids = torch.randint(4, len(tokenizer), (prompt_length + response_length,), generator=draw).tolist()
        engine_logp = (
            (torch.rand(response_length, generator=draw) - 3.9).tolist() if cfg.ppo.importance_cap else None
        )
        rows.append((ids[:prompt_length], Response(ids[prompt_length:], engine_logp, True)))
    own_rows = [rows[i] for i in share(range(GLOBAL_BATCH), engine.rank(), engine.world_size())]
    return assemble(
        [PromptExample(prompt, "", ()) for prompt, _ in own_rows],
        [response for _, response in own_rows],
        tokenizer,
        cfg.pass_tokens(),
        minibatches=cfg.ppo.minibatches,
    )


def learn(roles, rollout, scored, value, cfg, texts):
    """One step of the actor and the critics; returns its StepMetrics."""
    if in_one_pass(cfg, roles):
        return update_in_one_pass(roles, rollout, scored, value, cfg, texts)
    scored = dataclasses.replace(scored, **old_logprobs_and_values(rollout, roles, cfg))
    return update(roles, rollout, scored, advantages(rollout.cu_seqlens, scored, value, cfg.ppo), cfg, texts)


def policy_optimisation(cell, world, tokenizer):
    """Trains a stage of policy optimisation on stored rollouts with all models.

    Returns {name: number} of each step, as the stages log them.
    """
    constrained = cell.stage == "ppo-lag"
    ppo = PPO(
        **UPDATES[cell.form],
        shaping=None if constrained else 0.5,
        shared_critic=constrained and cell.form in WITH_ONE_CRITIC,
    )
    cfg = PPOConfig(
        model=world["model"],
        reward=world["reward"],
        cost=world["cost"],
        data="none",
        output="none",
        max_length=64,
        ppo=ppo,
        optim=RATE,
        critic_optim=RATE,
        engine=config(cell),
        lora=ADAPTERS if cell.form == LORA else Lora(),
    )
    roles = load_roles(cfg, tokenizer, 12, constrained)
    multipliers = {"cost": LagrangeMultiplier(window=8, lr=0.5)} if constrained else {}
    texts = sft_examples(world["sft"], tokenizer)[0][:4] if cell.form in WITH_PTX else None
    rows = []
    for step in range(STEPS):
        rollout = stored_rollout(step, tokenizer, cfg)
        scored = score_rollout(rollout, roles, cfg)
        update_multipliers(multipliers, scored, rollout)
        value = {name: multiplier.value for name, multiplier in multipliers.items()}
        if step == 1 and cell != cell.reference:
            nan_scores = dataclasses.replace(scored, reward_B=with_nan(scored.reward_B)[0])
            assert learn(roles, rollout, nan_scores, value, cfg, texts).bad
        step_metrics = learn(roles, rollout, scored, value, cfg, texts)
        assert not step_metrics.bad, step_metrics.bad
        rows.append(averages(rollout, scored, step_metrics, multipliers, cfg.ppo.shaping))
    rows.append({f"weights of {i}": magnitudes(trained) for i, trained in enumerate(roles.trained)})
    return rows


def main(world, cells, out):
    engine.start(Engine(precision="fp32"), 0)
    with open(world) as file, open(cells) as cells_file:
        world, cells = json.load(file), [Cell(*cell) for cell in json.load(cells_file)]
    tokenizer = load_tokenizer(world["model"])

    def write_line(**values):
        if engine.rank() == 0 or "error" in values:
            with open(out, "a") as file:
                file.write(json.dumps(values) + "\n")

    for cell in cells:
        write_line(begun=cell)
        start = time.perf_counter()
        torch.manual_seed(0)
        try:
            rows = (policy_optimisation if cell.stage in POLICY_STAGES else supervised)(
                cell, world, tokenizer
            )
        except Exception:
            write_line(cell=cell, error=traceback.format_exc()[-3000:], rank=engine.rank())
            os._exit(1)  # the other ranks may wait for this one; a new launch runs the cells after this one
        write_line(cell=cell, rows=rows, seconds=round(time.perf_counter() - start, 2))
        gc.collect()  # engines have reference cycles
    engine.finish()
    os._exit(0)  # the results are written; the end of gloo's threads is not tested here


if __name__ == "__main__":
    main(*sys.argv[1:])
