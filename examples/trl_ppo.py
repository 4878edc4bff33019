r"""PPO and PPO-Lag for TRL's users: TRL's data sets, chat templates and models on this package's loop.

TRL removed PPO in 1.16. This takes what its PPO took: a policy (SFTTrainer's folder), a score model
(RewardTrainer's folder: AutoModelForSequenceClassification(num_labels=1)), prompts (prompt-only or
preference, as text or as messages), and its flags. PPO-Lag adds a second score model, the cost, and keeps its
mean under a threshold. Needs saferlhf-fast[train]; TRL itself is used where it is installed (TrlParser with
--config, ModelConfig, ScriptArguments) and not needed otherwise. All of this package's settings, checkpoints
and reports: saferlhf-fast ppo-lag --help.

    python examples/trl_ppo.py                                    # a toy from random weights
    python examples/trl_ppo.py --algorithm ppo                    # without the cost
    python examples/trl_ppo.py --model_name_or_path SFT_DIR --reward_model_path RM_DIR \
        --cost_model_path CM_DIR --dataset_name trl-lib/ultrafeedback-prompt --dataset_train_split train \
        --output_dir runs/ppo-lag --total_episodes 10000

examples/README.md has the table of TRL's flags, this package's settings, and what differs.
"""

import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from yaml import YAMLError

from saferlhf_fast.commands.run import run_stage
from saferlhf_fast.config.load import load
from saferlhf_fast.errors import UserError

try:
    from trl import ModelConfig, ScriptArguments
    from trl import TrlParser as Parser
except ImportError:
    from transformers import HfArgumentParser as Parser

    @dataclass
    class ScriptArguments:
        """What of TRL's class of this name is used here."""

        dataset_name: str | None = None
        dataset_config: str | None = None
        dataset_train_split: str = "train"

    @dataclass
    class ModelConfig:
        """What of TRL's class of this name is used here."""

        model_name_or_path: str | None = None


@dataclass
class PPOArguments:
    """TRL's names and defaults of PPO's settings, and what PPO-Lag adds to them."""

    algorithm: Literal["ppo", "ppo-lag"] = "ppo-lag"
    output_dir: str | None = None
    sft_model_path: str | None = None
    reward_model_path: str | None = None
    cost_model_path: str | None = field(
        default=None, metadata={"help": "score model: the higher, the more harmful"}
    )
    cost_threshold: float | None = field(default=None, metadata={"help": "d, in the cost model's units"})
    cost_threshold_quantile: float | None = field(
        default=None,
        metadata={
            "help": "d as this quantile of the starting policy's costs: for a cost model without a zero, as "
            "RewardTrainer makes it"
        },
    )
    lambda_init: float = 1.0
    lambda_lr: float = 0.1
    lambda_window: int = 1024
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    total_episodes: int | None = None
    num_train_epochs: float = 1.0
    learning_rate: float = 3e-6
    kl_coef: float = 0.05
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 0.7
    response_length: int = 53
    max_prompt_length: int = 512
    ds3_gather_for_generation: bool = True
    gradient_checkpointing: bool = False
    bf16: bool = False
    no_whiten: bool = False
    seed: int = 42


def train(dataset: Any, script: ScriptArguments, model: ModelConfig, ppo: PPOArguments) -> dict[str, Any]:
    """Runs the stage.

    Args:
        dataset: a datasets.Dataset of prompts; None for the one that `script` names.
        script: names a data set.
        model: names the policy.
        ppo: everything else.

    Returns:
        The stage's summary.
    """
    batch = ppo.per_device_train_batch_size * ppo.gradient_accumulation_steps
    if dataset is None:
        first = first_row(script)
        data: Any = {
            "path": script.dataset_name,
            "split": script.dataset_train_split,
            **({} if script.dataset_config is None else {"name": script.dataset_config}),
        }
    else:
        first = dataset[0]
        data = str(Path(tempfile.mkdtemp()) / "prompts")
        dataset.save_to_disk(data)
    settings = {
        "model": model.model_name_or_path or ppo.sft_model_path,
        "reward": ppo.reward_model_path,
        "data": data,
        "output": ppo.output_dir,
        "seed": ppo.seed,
        # Text prompts are taken as they are, messages go through the tokenizer's chat template, as in TRL.
        "template": "none" if isinstance(first.get("prompt", first.get("chosen")), str) else "tokenizer",
        "max_length": ppo.max_prompt_length + ppo.response_length,
        "gradient_checkpointing": ppo.gradient_checkpointing,
        "engine.precision": "bf16" if ppo.bf16 else "fp32",
        "ppo.batch_size": batch,
        "ppo.micro_batch_size": ppo.per_device_train_batch_size,
        "ppo.epochs": ppo.num_ppo_epochs,
        "ppo.minibatches": ppo.num_mini_batches,
        "ppo.prompt_epochs": ppo.num_train_epochs,
        "ppo.kl_coeff": ppo.kl_coef,
        "ppo.clip_ratio": ppo.cliprange,
        "ppo.clip_value": ppo.cliprange_value,
        "ppo.gamma": ppo.gamma,
        "ppo.lam": ppo.lam,
        "ppo.whiten": not ppo.no_whiten,
        "optim.learning_rate": ppo.learning_rate,
        "critic_optim.learning_rate": ppo.learning_rate,
        "sampling.temperature": ppo.temperature,
        "sampling.max_new_tokens": ppo.response_length,
        "sampling.max_prompt_length": ppo.max_prompt_length,
        "sampling.gather": ppo.ds3_gather_for_generation,
    }
    if ppo.total_episodes is not None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        settings["ppo.max_steps"] = math.ceil(ppo.total_episodes / (batch * world))
        settings["ppo.prompt_epochs"] = 1e6  # as often as it takes
    if ppo.algorithm == "ppo-lag":
        settings |= {
            "cost": ppo.cost_model_path,
            "multiplier.init": ppo.lambda_init,
            "multiplier.lr": ppo.lambda_lr,
            "multiplier.window": ppo.lambda_window,
        }
        for name in ("threshold", "threshold_quantile"):
            if getattr(ppo, f"cost_{name}") is not None:
                settings[f"multiplier.{name}"] = getattr(ppo, f"cost_{name}")
    return run_stage(
        ppo.algorithm, load(ppo.algorithm, None, {key: v for key, v in settings.items() if v is not None})
    )


def first_row(script: ScriptArguments) -> dict[str, Any]:
    """The first row of the data set that the arguments name: are its prompts text or messages?"""
    from saferlhf_fast.config.stages import Source
    from saferlhf_fast.data.sources import load_sources

    source = Source(path=script.dataset_name, name=script.dataset_config, split=script.dataset_train_split)
    return load_sources(source)[0].rows[0].fields


# ---------------------------------------------------------------- the toy


def make_toy(folder: Path, ppo: PPOArguments, rows: int = 512) -> tuple[Any, ModelConfig]:
    """Trains small models on this package's embedded world.

    The policy is trained on demonstrations, each score model on pairs of answers, as SFTTrainer and
    RewardTrainer would do it, and saved as they save: save_pretrained, with the tokenizer beside it.

    Args:
        folder: where the models are saved.
        ppo: gets the paths of the score models, and an output_dir where it has none.
        rows: prompts; demonstrations and pairs are multiples of it.

    Returns:
        (Dataset of prompts, ModelConfig of the policy).
    """
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from saferlhf_fast.demo.world import World

    world = World(0)
    tokenizer = world.tokenizer()
    torch.manual_seed(ppo.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    policy = LlamaForCausalLM(config)
    dialogues = [encode(tokenizer, row["instruction"], row["output"]) for row in world.sft_records(2 * rows)]
    fit(
        policy,
        dialogues,
        lambda lm, batch: (
            lm(**batch, labels=batch["input_ids"].where(batch["attention_mask"].bool(), -100)).loss
        ),
        tokenizer,
        folder / "policy",
    )
    pairs = world.preference_records(world.annotation_prompts(4 * rows))
    mixed = [row for row in pairs if row["is_response_0_safe"] != row["is_response_1_safe"]]
    for name, label, rows_of_kind, epochs in (("reward", "better", pairs, 1), ("cost", "safer", mixed, 3)):
        # The first answer of a pair has to get the higher score: the better one as reward, the harmful one
        # beside a safe one as cost.
        ranked = [
            encode(tokenizer, row["prompt"], row[f"response_{row[f'{label}_response_id'] ^ place}"])
            for row in rows_of_kind
            for place in ((0, 1) if name == "reward" else (1, 0))
        ]
        fit(
            LlamaForSequenceClassification(config),
            ranked,
            lambda score_model, batch: (
                -torch.nn.functional.logsigmoid(
                    score_model(**batch).logits.view(-1, 2).diff(dim=1).neg()
                ).mean()
            ),
            tokenizer,
            folder / name,
            epochs,
        )
    ppo.reward_model_path, ppo.cost_model_path = str(folder / "reward"), str(folder / "cost")
    ppo.output_dir = ppo.output_dir or str(folder / "run")
    prompts = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in world.prompts("train", rows)]
    return datasets.Dataset.from_list(prompts), ModelConfig(model_name_or_path=str(folder / "policy"))


def encode(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """Ids of a dialogue of one turn, through the chat template."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer(
        tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False
    ).input_ids


def fit(
    model: Any,
    rows: list[list[int]],
    loss_of: Callable[[Any, dict[str, Any]], Any],
    tokenizer: Any,
    folder: Path,
    epochs: int = 3,
    size: int = 32,
) -> None:
    """A plain training loop over encoded rows, in order (pairs stay together); saves the model.

    Args:
        model: a model of transformers.
        rows: token ids of each row.
        loss_of: the loss of (model, padded batch).
        tokenizer: pads the rows, and is saved with the model.
        folder: where the model is saved.
        epochs: passes over the rows.
        size: rows of a batch.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for at in [at for _ in range(epochs) for at in range(0, len(rows), size)]:
        batch = tokenizer.pad({"input_ids": rows[at : at + size]}, return_tensors="pt")
        loss = loss_of(model, dict(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


TOY = [
    "--response_length",
    "16",
    "--max_prompt_length",
    "64",
    "--per_device_train_batch_size",
    "32",
    "--total_episodes",
    "640",
    "--num_ppo_epochs",
    "2",
    "--learning_rate",
    "2e-3",
    "--cliprange_value",
    "5",
    "--temperature",
    "1.0",
    "--cost_threshold_quantile",
    "0.5",
    "--lambda_lr",
    "0.3",
    "--lambda_window",
    "64",
]


def main() -> None:
    """Reads the arguments, trains, and prints reward and cost of the policy before and after."""
    words = sys.argv[1:]
    if not any(
        word.startswith(("--model_name_or_path", "--sft_model_path", "--config", "-h", "--help"))
        for word in words
    ):
        words = [*TOY, *words]
    parser = Parser((ScriptArguments, ModelConfig, PPOArguments))
    # TRL's own parser also takes --config.
    parse = getattr(parser, "parse_args_and_config", parser.parse_args_into_dataclasses)
    try:
        script, model, ppo = parse(words)
    except (OSError, ValueError, YAMLError) as error:
        # An unknown flag, or a --config that cannot be read.
        parser.error(" ".join(str(error).split()))
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "total_episodes",
        "response_length",
    ):
        # Reported before the toy's models are trained.
        if (value := getattr(ppo, name)) is not None and value < 1:
            parser.error(f"--{name}: expected a whole number, 1 or more, got {value}")
    dataset = None
    if model.model_name_or_path is None and ppo.sft_model_path is None:
        dataset, model = make_toy(Path(tempfile.mkdtemp()), ppo)
    else:
        needed = {
            "dataset_name": script.dataset_name,
            "reward_model_path": ppo.reward_model_path,
            "output_dir": ppo.output_dir,
        }
        needed |= {"cost_model_path": ppo.cost_model_path} if ppo.algorithm == "ppo-lag" else {}
        if missing := [f"--{name}" for name, value in needed.items() if not value]:
            parser.error(f"with a model of your own {ppo.algorithm} also needs {', '.join(missing)}")
    try:
        summary = train(dataset, script, model, ppo)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    before, after = summary["before"], summary["after"]
    line = (
        f"{ppo.algorithm}: {summary['steps']} steps, reward {before['reward']:.2f} -> {after['reward']:.2f}"
    )
    if ppo.algorithm == "ppo-lag":
        line += (
            f", cost {before['cost']:.2f} -> {after['cost']:.2f} (threshold {summary['threshold']:.2f}), "
            f"lambda {summary['multiplier']:.3f}"
        )
    print(f"{line}, KL {after['kl']:.2f}; the policy is in {ppo.output_dir}/model")


if __name__ == "__main__":
    main()
