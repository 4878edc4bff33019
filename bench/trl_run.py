"""Compares TRL's GRPO and DPO trainers with and without `integrations.patch("trl")`: losses, time, memory.

    .venv-trl/bin/python bench/trl_run.py --vocabulary 32000 --steps 20
        runs both trainers both ways; prints a table and writes bench/results/trl-run-<device>-<date>.json

It uses a small Llama with random weights and prompts of random words, and downloads nothing. Each run has its
own process with the same seed, so that its peak resident memory is its own. `--side dpo --patched` is one
such run; it prints JSON.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
COMPARED = {
    "dpo": ("loss", "grad_norm", "logps/chosen", "logits/chosen", "mean_token_accuracy"),
    "grpo": ("loss", "grad_norm", "entropy", "kl"),
}


def parts(options):
    """Returns (model, tokenizer): a Llama of 2 layers with random weights; one word per id."""
    import torch
    from step_words import one_word_an_id
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config), one_word_an_id(options.vocabulary)


def words(generator, options, low, high):
    """Returns a text of low … high random words."""
    import torch

    count = int(torch.randint(low, high + 1, (1,), generator=generator))
    return " ".join(
        f"w{i}" for i in torch.randint(4, options.vocabulary, (count,), generator=generator).tolist()
    )


def trainer(options, folder):
    """Returns TRL's trainer on random data."""
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    lm, tokenizer = parts(options)
    # the trainers read the reference from a folder, by the model's name
    model = os.path.join(folder, "policy")
    lm.save_pretrained(model)
    generator = torch.Generator().manual_seed(1)
    longest = options.tokens
    common = {
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "bf16": False,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
    }
    if options.side == "dpo":
        rows = [
            {
                "prompt": words(generator, options, 4, 8),
                "chosen": " " + words(generator, options, longest // 2, longest),
                "rejected": " " + words(generator, options, longest // 2, longest),
            }
            for _ in range(4 * options.steps)
        ]
        return DPOTrainer(
            model,
            args=DPOConfig(max_length=2 * longest, **common),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
        )

    def reward(completions, **_):
        """Returns the share of words with an even number."""
        return [
            sum(word[-1:] in "02468" for word in text.split()) / max(len(text.split()), 1)
            for text in completions
        ]

    rows = [{"prompt": words(generator, options, 4, 8)} for _ in range(4 * options.steps)]
    return GRPOTrainer(
        model,
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(
            num_generations=4, num_iterations=2, max_completion_length=longest, beta=0.04, **common
        ),
    )


def run(options):
    """Runs once in this process.

    It returns losses and metrics per step, seconds, peak MiB, and calls of replacements.
    """
    report = None
    if options.patched:
        from saferlhf_fast import integrations

        report = integrations.patch("trl", quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        trained = trainer(options, folder)
        began = time.perf_counter()
        trained.train()
        seconds = time.perf_counter() - began
    logged = [row for row in trained.state.log_history if "loss" in row]
    return {
        "steps": [{name: row[name] for name in COMPARED[options.side]} for row in logged],
        "seconds": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "calls": report.calls if report else {},
    }


def child(options, side, patched):
    """Calls `run` in a new process."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--side",
        side,
        "--vocabulary",
        str(options.vocabulary),
        "--steps",
        str(options.steps),
        "--width",
        str(options.width),
        "--tokens",
        str(options.tokens),
    ] + ["--patched"] * patched
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def largest_differences(original, patched):
    """Returns {metric: the largest difference over the steps}."""
    return {
        name: max(
            abs(one[name] - two[name]) for one, two in zip(original["steps"], patched["steps"], strict=True)
        )
        for name in original["steps"][0]
    }


def compare(options):
    """Runs both trainers with and without the patch and returns the rows."""
    rows = {}
    for side in COMPARED:
        original, patched = (child(options, side, with_patch) for with_patch in (False, True))
        rows[side] = {"theirs": original, "ours": patched, "apart": largest_differences(original, patched)}
        print(
            f"{side}: {len(original['steps'])} steps, {original['seconds']:.1f} -> "
            f"{patched['seconds']:.1f} s, peak {original['peak_mib']:.0f} -> {patched['peak_mib']:.0f} MiB, "
            f"replacements called {sum(patched['calls'].values())} times; largest "
            "differences: " + ", ".join(f"{name} {value:.1e}" for name, value in rows[side]["apart"].items()),
            flush=True,
        )
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=128, help="hidden size")
    parser.add_argument("--tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--side", choices=list(COMPARED))
    parser.add_argument("--patched", action="store_true")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run(options)))
        return
    import torch
    import trl
    from ceilings import device_name
    from run import slug

    rows, date, device = compare(options), datetime.date.today().isoformat(), device_name()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    path = HERE / "results" / f"trl-run-{slug(device)}-{date}.json"
    results = {
        "device": device,
        "date": date,
        "commit": commit,
        "trl": trl.__version__,
        "torch": torch.__version__,
        "settings": vars(options),
        "rows": rows,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
