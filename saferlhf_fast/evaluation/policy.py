"""How helpful and how harmful a policy is by its score models, on given prompts.

    saferlhf-fast evaluate model=DIR prompts=FILE reward=DIR cost=DIR
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
import yaml

from ..cast import Cast, load_judge
from ..data.batches import share
from ..data.examples import prompt_examples
from ..generation import open_generator
from ..models.causal_lm import load_causal_lm
from ..models.folders import refuse_short_context
from ..models.policy import Policy, sequence_sums
from ..models.tokenizer import load_tokenizer
from ..rollout import assemble, end_tokens, generate
from ..runtime import console, engine
from ..runtime.run_folder import finish_run, open_run
from ..score import kept
from .statistics import interval_text, summarise


@torch.no_grad()
def ask(cast, prompts, cfg, seed=0):
    """Samples one response for each prompt and scores it -> one dict per prompt, in order, on every rank.

    Each has prompt, response, reward, cost, kl (summed over the response, nats) and length (tokens); what there is no
    model for is None. Random numbers are the same at each call, so that evaluations of one run compare.
    """
    world = engine.world_size()
    mine = [prompts[i] for i in share(range(len(prompts)), engine.rank(), world)]
    # Every rank asks for as many as the fullest one: under ZeRO-3 each forward pass is a collective.
    mine += prompts[:1] * (math.ceil(len(prompts) / world) - len(mine))
    sampling = dataclasses.replace(cfg.sampling, num_return_sequences=1)
    # Generation fits more rows than scoring does.
    size = sampling.batch_size or (cfg.ppo.batch_size if hasattr(cfg, "ppo") else 4 * cfg.batch_size)
    found = []
    for start in range(0, len(mine), size):
        rows, responses = generate(cast.generator, mine[start:start + size], cast.tokenizer, sampling, cfg.max_length, seed,
                                   first=start * world)
        rollout = assemble(rows, responses, cast.tokenizer, cfg.pass_tokens())
        found += [(start * world + place, row) for place, row in zip(rollout.order, _rows(cast, rollout, cfg))]
    everyone = dict(pair for part in engine.gather_objects(found) for pair in part)
    return [everyone[i] for i in range(len(prompts))]


def _rows(cast, rollout, cfg):
    reward, cost, kl = [], [], []
    for rows in rollout.passes:
        reward.append(cast.reward(rollout, rows) if cast.reward is not None else None)
        cost.append(cast.cost(rollout, rows) if cast.cost is not None else None)
        if cast.reference is not None:
            packed = rollout.packed(rows)
            gap_N = cast.actor(packed, cfg.sampling) - cast.reference(packed, cfg.sampling)
            kl.append(sequence_sums(gap_N, packed))
    columns = [kept(parts, rollout).tolist() if parts and parts[0] is not None else [None] * len(rollout)
               for parts in (reward, cost, kl)]
    return [{"prompt": prompt.text, "response": text, "reward": r, "cost": c, "kl": k, "length": length}
            for prompt, text, r, c, k, length in zip(rollout.prompts, rollout.texts, *columns, rollout.lengths)]


def summary_of(rows):
    """Means over the rows of `ask` -> {"reward", "cost", "unsafe_share" (cost > 0), "kl", "length"}, those there are."""
    out = {}
    for name in ("reward", "cost", "kl", "length"):
        found = [row[name] for row in rows if row[name] is not None]
        if found:
            out[name] = sum(found) / len(found)
    costs = [row["cost"] for row in rows if row["cost"] is not None]
    if costs:
        out["unsafe_share"] = sum(c > 0 for c in costs) / len(costs)
    return out


def evaluate(cfg):
    """Runs the stage evaluate -> summary with 95 % intervals; writes evaluation.json and samples.jsonl."""
    engine.start(cfg.engine, cfg.seed)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)
    longest = cfg.sampling.max_prompt_length or cfg.max_length // 2
    prompts, report = prompt_examples(cfg.prompts, tokenizer, cfg.template, longest, cfg.seed)

    def policy(path):
        lm = load_causal_lm(path, tokenizer=tokenizer, trust_remote_code=cfg.trust_remote_code,
                            allow_pickle=cfg.allow_pickle)
        refuse_short_context(path, lm.config, cfg.max_length, "max_length")
        return engine.Frozen(Policy(lm, cfg.engine.packing), cfg.engine)

    actor, reference = policy(cfg.model), cfg.reference or start_of(cfg.model)
    if reference is None:
        console.say(f"no KL: {cfg.model} is no model of a run here; reference= names the policy to compare it with")
    ends = end_tokens(tokenizer, actor.module.lm, cfg.template)
    cast = Cast(tokenizer, ends, actor,
                policy(reference) if reference else None,
                load_judge(cfg.reward, tokenizer, cfg)[0] if cfg.reward else None, None,
                load_judge(cfg.cost, tokenizer, cfg)[0] if cfg.cost else None,
                generator=open_generator(actor, tokenizer, ends, cfg.sampling))
    folder = open_run("evaluate", cfg) if cfg.output else None
    rows = ask(cast, prompts, cfg, cfg.seed)
    column = {name: [row[name] for row in rows] if rows[0][name] is not None else None
              for name in ("reward", "cost", "kl", "length")}
    summary = {**summarise(column["reward"], column["cost"], column["kl"], column["length"]),
               "data": report.as_dict()}
    if engine.rank() == 0:
        _show(summary, rows[:cfg.show])
        if folder is not None:
            (folder / "evaluation.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
            with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    if folder is not None:
        finish_run(folder, summary)
    return summary


def start_of(model):
    """The model that a model of one of our run folders was trained from, when it is still there; else None."""
    settings = Path(model).expanduser().parent / "config.yaml"
    if not settings.is_file():
        return None
    start = (yaml.safe_load(settings.read_text(encoding="utf-8")) or {}).get("model")
    return start if start and Path(start).expanduser().is_dir() else None


def _show(summary, samples):
    table = [[name, interval_text(value), value["n"]]
             for name, value in summary.items() if isinstance(value, dict) and "mean" in value]
    console.result_table("evaluation", ["measure", "mean (95 % interval)", "n"], table)
    console.sample_table(samples)
