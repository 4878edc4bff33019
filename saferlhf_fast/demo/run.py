"""The whole loop on the embedded world, from nothing: does PPO-Lag do what the paper says?

    saferlhf-fast demo                        one seed
    saferlhf-fast demo --seeds 0 1 2          three seeds

The steps: data from the world; SFT; annotated pairs of the policy's answers and others; reward and cost
model; PPO, and PPO-Lag, which differs by the constraint alone; a table on held-out prompts. Every stage is
the stage of the command line, on files in the run folder. Tables and curves show gold scores beside the
scores of the models; training and selection never see gold scores.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..config.stages import DemoConfig
from ..data.batches import share
from ..data.examples import PromptExample, prompt_examples
from ..data.templates import Template
from ..errors import UserError
from ..evaluation.evaluate import load_evaluation_roles
from ..evaluation.report import write_report
from ..models.causal_lm import load_causal_lm, save_causal_lm
from ..models.policy import Policy
from ..models.tokenizer import load_tokenizer
from ..rollout.batch import end_tokens, generate
from ..rollout.engines import open_generator
from ..rollout.sample_and_score import sample_and_score, summary_of
from ..runtime import console, disk, engine
from ..runtime.run_folder import finish_run, open_run
from ..training.ppo_lag import train_ppo, train_ppo_lag
from ..training.preference import train_cost, train_reward
from ..training.sft import train as train_sft
from . import recipe
from .report import CLAIMS, write_demo_report
from .world import World

Rows: TypeAlias = Sequence[Mapping[str, Any]]
Observer: TypeAlias = Callable[[Rows], dict[str, float]]

COLUMNS = ("helpfulness", "cost", "unsafe_share", "model_reward", "model_cost", "kl", "multiplier")
TITLES = ("policy", "gold helpfulness", "gold cost", "gold unsafe", "model reward", "model cost", "KL", "λ")


def run(cfg: DemoConfig, restart: bool = False) -> dict[str, Any]:
    """Runs the demo for each seed.

    Args:
        cfg: its config.
        restart: as in `run_folder.open_run`.

    Returns:
        The contents of demo.json.

    Raises:
        UserError: a seed is given twice.
    """
    if len(set(cfg.seeds)) != len(cfg.seeds):
        raise UserError(f"seeds: expected different numbers, got {cfg.seeds}")
    folder = open_run("demo", cfg, restart)
    result: dict[str, Any] = {"threshold": None, "seeds": {}}
    for seed in cfg.seeds:
        result["seeds"][str(seed)] = one_seed(seed, folder / f"seed-{seed}", cfg)
        result["threshold"] = result["seeds"][str(cfg.seeds[0])]["threshold"]
        if engine.rank() == 0:
            disk.write_text(folder / "demo.json", json.dumps(result, indent=1))
        show(seed, result["seeds"][str(seed)])
    finish_run(folder, result)
    if engine.rank() == 0:
        console.say(f"report: {write_demo_report(folder)}")
        console.say(f"figures: {folder / 'demo.json'}")
        console.say(
            "the same on pretrained weights and real data: make models && saferlhf-fast run pku_small "
            "root=/where/data/is models=.models"
        )
    return result


class Clock:
    """Seconds of each part of a run, in order; parts of the same name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends the part `name`; the next one begins."""
        now = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self.since, 1)
        self.since = now


def one_seed(seed: int, folder: Path, cfg: DemoConfig) -> dict[str, Any]:
    """Runs all stages for one seed and returns its entry in demo.json."""
    clock, world = Clock(), World(seed)
    sizes = recipe.TINY if cfg.quick else recipe.FULL
    write_world(world, folder, sizes)
    engine.start(recipe.engine(), seed)
    make_base(world, folder / "base", seed)
    clock.lap("world")
    trained(train_sft, recipe.sft(folder, seed, cfg, sizes))
    clock.lap("sft")
    # Pairs from the SFT policy's answers and the world's own, good and bad ones.
    prompts = world.annotation_prompts(sizes.pairs)
    sampled = {
        f"sft at {t}": answers(folder / "sft" / "model", prompts, t, seed) for t in recipe.TEMPERATURES
    }
    write(
        folder / "data" / "pairs.jsonl", world.preference_records(prompts, sampled, own=recipe.WORLD_ANSWERS)
    )
    clock.lap("annotation")
    trained(train_reward, recipe.preference(folder, "reward", seed, cfg, sizes))
    clock.lap("reward")
    trained(train_cost, recipe.preference(folder, "cost", seed, cfg, sizes))
    clock.lap("cost")
    gold = gold_observer(world)
    trained(train_ppo, recipe.ppo(folder, "ppo", seed, cfg, sizes), gold)
    clock.lap("ppo")
    lag = trained(train_ppo_lag, recipe.ppo(folder, "ppo-lag", seed, cfg, sizes), gold)
    clock.lap("ppo-lag")
    entry: dict[str, Any] = {"threshold": lag["threshold"]}
    for name, where, multiplier in (
        ("sft", "sft", 0.0),
        ("ppo", "ppo", 0.0),
        ("ppo_lag", "ppo-lag", lag["multiplier"]),
    ):
        entry[name] = {**evaluate_policy(world, folder, where, seed), "multiplier": multiplier}
    clock.lap("evaluation")
    entry["seconds"] = {**clock.seconds, "total": round(sum(clock.seconds.values()), 1)}
    return entry


def trained(train: Callable[..., dict[str, Any]], cfg: Any, *more: Observer) -> dict[str, Any]:
    """Runs a stage, writes its report and returns its summary.

    Args:
        train: the stage's function.
        cfg: its config.
        *more: further arguments of `train`.
    """
    summary = train(cfg, *more)
    if engine.rank() == 0:
        write_report(Path(cfg.output))
    return summary


def write_world(world: World, folder: Path, sizes: recipe.Sizes) -> None:
    """Writes the world's data to files, which the stages read as they read any data source."""
    write(folder / "data" / "sft.jsonl", world.sft_records(sizes.sft))
    write(folder / "data" / "prompts.jsonl", world.prompt_records("train", sizes.prompts))
    write(folder / "data" / "validation.jsonl", world.prompt_records("validation", sizes.validation))
    write(folder / "data" / "test.jsonl", world.prompt_records("test", sizes.test))


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines on rank 0; the other ranks wait for it.

    Args:
        path: the file; its folder is created.
        rows: a line for each.
    """
    if engine.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    if engine.started():
        engine.barrier()


def make_base(world: World, folder: Path, seed: int) -> None:
    """Writes a small Llama with random weights, and the world's tokenizer, to `folder`."""
    if engine.rank() == 0:
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = world.tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **recipe.ARCHITECTURE,
        )
        engine.seed_all(seed)
        save_causal_lm(folder, LlamaForCausalLM(config), tokenizer, card={"stage": "random weights"})
    engine.barrier()


def answers(model: Path, prompts: Sequence[str], temperature: float, seed: int) -> list[str]:
    """One sampled answer of the policy in folder `model` to each prompt.

    Args:
        model: folder of the policy.
        prompts: texts of the user's messages.
        temperature: of the sampling distribution.
        seed: of the sampling.

    Returns:
        The answers without special tokens, in the order of the prompts, on every rank.
    """
    tokenizer = load_tokenizer(str(model))
    policy = engine.Frozen(Policy(load_causal_lm(str(model), tokenizer=tokenizer)), recipe.engine())
    template = Template(tokenizer, "auto")
    messages = [({"role": "user", "content": p},) for p in prompts]
    examples = [
        PromptExample(ids, p, m) for ids, p, m in zip(template.encode_prompts(messages), prompts, messages)
    ]
    own_indices = share(range(len(prompts)), engine.rank(), engine.world_size())
    sampling = recipe.sampling(temperature, 256)
    generator = open_generator(policy, tokenizer, end_tokens(tokenizer, policy.module.lm, "auto"), sampling)
    _, responses = generate(generator, [examples[i] for i in own_indices], sampling, recipe.MAX_LENGTH, seed)
    texts = [tokenizer.decode(r.ids, skip_special_tokens=True).strip() for r in responses]
    of_ranks = engine.gather_objects(dict(zip(own_indices, texts)))
    merged = {i: text for of_rank in of_ranks for i, text in of_rank.items()}
    return [merged[i] for i in range(len(prompts))]


def gold_observer(world: World) -> Observer:
    """What a stage calls with the rows of an evaluation: gold means, which the curves alone show."""

    def observe(rows: Rows) -> dict[str, float]:
        return {f"gold/{k}": v for k, v in gold_means(world, rows).items()}

    return observe


def gold_means(world: World, rows: Rows) -> dict[str, float]:
    """Gold helpfulness, cost and unsafe share of the rows of `sample_and_score`."""
    golds = [world.gold_scores(row["prompt"], row["response"]) for row in rows]
    n = len(golds)
    return {
        "helpfulness": sum(g.helpfulness for g in golds) / n,
        "cost": sum(g.cost for g in golds) / n,
        "unsafe_share": sum(g.severity > 0 for g in golds) / n,
    }


def evaluate_policy(world: World, folder: Path, policy: str, seed: int) -> dict[str, float]:
    """Gold and model figures of one policy on the held-out prompts; its rows are written to the folder.

    Args:
        world: the seed's world.
        folder: that of the seed.
        policy: the folder in it where the policy is.
        seed: of the sampling.
    """
    settings = recipe.evaluation(folder, policy, seed)
    tokenizer = load_tokenizer(settings.model)
    roles = load_evaluation_roles(settings, tokenizer)
    prompts, _ = prompt_examples(settings.prompts, tokenizer, "auto", recipe.MAX_LENGTH, seed)
    rows = sample_and_score(roles, prompts, settings, seed)
    write(Path(folder) / f"test-{policy}.jsonl", rows)
    model = summary_of(rows)
    return {
        **gold_means(world, rows),
        "model_reward": model["reward"],
        "model_cost": model["cost"],
        "kl": model["kl"],
        "length": model["length"],
    }


def show(seed: int, entry: Mapping[str, Any]) -> None:
    """Prints the table of one seed, and which claims hold.

    Args:
        seed: the seed.
        entry: what `one_seed` returned for it.
    """
    names = {"sft": "SFT", "ppo": "PPO", "ppo_lag": "PPO-Lag"}
    rows = [[label, *(f"{entry[key][c]:.3f}" for c in COLUMNS)] for key, label in names.items()]
    console.result_table(
        f"seed {seed}, held-out prompts · threshold on model cost {entry['threshold']:.3f}", TITLES, rows
    )
    console.say("seconds: " + ", ".join(f"{k} {v}" for k, v in entry["seconds"].items()))
    for claim, holds in CLAIMS:
        console.say(f"{'yes' if holds(entry) else 'NO '}  {claim}")
