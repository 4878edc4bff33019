"""TRL's own trainers with this package's kernels in the place of TRL's: the same losses in float32.

    python examples/trl_patched.py                    # DPOTrainer on a tiny model from random weights, twice
    python examples/trl_patched.py --trainer grpo
    python examples/trl_patched.py --model DIR --dataset NAME_OR_FOLDER --split train

With your own model the data set has preference pairs (dpo) or prompts (grpo). Needs TRL 1.16
(pip install 'trl==1.16.0'). The line is

    with integrations.patch("trl"):
        trainer.train()

`patch` prints which functions it replaced and at which places, and which it left and why;
docs/integrations.md has the measurements. The end of the block restores everything. `report.calls` counts the
calls of the replacements: with 0 calls the trainer uses other functions, and nothing is gained.
"""

import argparse
import sys
import tempfile
import time
from typing import Any

import torch

try:
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
except ImportError:
    sys.exit("examples/trl_patched.py needs TRL: pip install 'trl==1.16.0'")

from arguments import number

from saferlhf_fast import integrations


def run(args: argparse.Namespace, model: str, tokenizer: Any, dataset: Any) -> tuple[list[float], float]:
    """Trains once, from the same weights and seed each time.

    Args:
        args: those of the command line.
        model: folder or name of a causal LM.
        tokenizer: its tokenizer.
        dataset: preference pairs (dpo) or prompts (grpo).

    Returns:
        (losses of each step, seconds).
    """
    torch.manual_seed(args.seed)
    common = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.rows,
        "seed": args.seed,
        "logging_steps": 1,
        "model_init_kwargs": {"dtype": "float32"},
        "report_to": [],
        "save_strategy": "no",
        "learning_rate": args.lr,
        "disable_tqdm": True,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
    }
    if args.trainer == "dpo":
        trainer = DPOTrainer(
            model, args=DPOConfig(**common), train_dataset=dataset, processing_class=tokenizer
        )
    else:
        settings = GRPOConfig(
            **common, num_generations=args.rows // 2, max_completion_length=args.tokens, beta=0.04
        )
        trainer = GRPOTrainer(
            model, reward_funcs=variety, args=settings, train_dataset=dataset, processing_class=tokenizer
        )
    began = time.perf_counter()
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], time.perf_counter() - began


def variety(completions: list[Any], **_: Any) -> list[float]:
    """The toy's reward for GRPO: the share of words that occur once."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [len(set(text.split())) / max(len(text.split()), 1) for text in texts]


def toy(args: argparse.Namespace) -> tuple[str, Any, Any]:
    """A tiny Llama in a folder, from which the trainers also load their reference; its tokenizer; data.

    The data are preference pairs or prompts of the embedded world.
    """
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM

    from saferlhf_fast.demo.world import World

    world = World(0)
    tokenizer = world.tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    if args.trainer == "grpo":
        rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in world.prompts("train", 64)]
    else:
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                **{
                    name: [
                        {"role": "assistant", "content": row[f"response_{row['safer_response_id'] ^ other}"]}
                    ]
                    for name, other in (("chosen", 0), ("rejected", 1))
                },
            }
            for row in world.preference_records(world.annotation_prompts(64))
        ]
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer, datasets.Dataset.from_list(rows)


def real(args: argparse.Namespace) -> tuple[str, Any, Any]:
    """A model and a data set, from folders or the Hub."""
    import datasets
    from transformers import AutoTokenizer

    return (
        args.model,
        AutoTokenizer.from_pretrained(args.model),
        datasets.load_dataset(args.dataset, split=args.split),
    )


def main() -> None:
    """Trains without and with the patch and prints both, side by side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainer", choices=("dpo", "grpo"), default="dpo")
    parser.add_argument("--model", help="a causal LM; without it a tiny one is made")
    parser.add_argument("--dataset", help="preference pairs (dpo) or prompts (grpo), in TRL's formats")
    parser.add_argument("--split", default="train")
    parser.add_argument("--steps", type=number(int, 1), default=5)
    parser.add_argument("--rows", type=number(int, 1), default=8)
    parser.add_argument(
        "--tokens", type=number(int, 1), default=12, help="most tokens of a completion (grpo)"
    )
    parser.add_argument("--lr", type=number(float, 0), default=1e-3)
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    args = parser.parse_args()
    if args.model and not args.dataset:
        parser.error("--model needs --dataset")
    if args.trainer == "grpo" and (args.rows < 4 or args.rows % 2):
        parser.error(
            f"--rows: expected an even number, 4 or more (two prompts, half of the rows for each), got "
            f"{args.rows}"
        )
    torch.manual_seed(args.seed)
    try:
        inputs = (real if args.model else toy)(args)
    except (OSError, ValueError) as error:
        # A path or a file with other contents than expected.
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    plain_losses, plain_seconds = run(args, *inputs)
    with integrations.patch("trl") as report:
        patched_losses, patched_seconds = run(args, *inputs)
    print("step   loss, TRL alone   loss, patched")
    for step, (plain, patched) in enumerate(zip(plain_losses, patched_losses), 1):
        print(f"{step:4d} {plain:17.6f} {patched:15.6f}")
    gap = max(abs(plain - patched) for plain, patched in zip(plain_losses, patched_losses))
    print(
        f"{args.trainer}: largest difference {gap:.1e}; {plain_seconds:.1f} s alone, {patched_seconds:.1f} s "
        f"patched; {sum(report.calls.values())} calls of saferlhf-fast"
    )


if __name__ == "__main__":
    main()
