"""Compares plans with real peaks on this CPU: python bench/plan_memory.py [case …] [--json FILE]

Each case creates small random models, and data whose sequences are as long as the recipe allows. It runs a
stage of two steps in a new process and measures its peak resident memory (VmHWM, reset when the first step
begins). From this it subtracts the resident memory of a process that has imported the same and built a toy
engine, and compares the result with the plan. The C library returns every large block at once, so that
resident memory is used memory. Left out: GPUs, and memory while models are read from files.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
TRAIN = {"batch_size": 4, "accumulation": 2, "max_length": 256, "max_steps": 2}
PPO = {
    "max_length": 256,
    "ppo": {"batch_size": 8, "micro_batch_size": 4, "max_steps": 2},
    "sampling": {"engine": "generate", "max_new_tokens": 96},
    "evaluation": {"data": "few.jsonl"},
}
CASES = {
    "sft": ("sft", {"train": TRAIN}),
    "sft one pass": ("sft", {"train": {**TRAIN, "accumulation": 1}}),
    "sft checkpointing": ("sft", {"train": {**TRAIN, "gradient_checkpointing": True}}),
    "sft lora": ("sft", {"train": TRAIN, "lora": {"rank": 8}}),
    "sft qlora": ("sft", {"train": TRAIN, "lora": {"rank": 8, "bits": 4}}),
    "sft bf16": ("sft", {"train": TRAIN, "engine": {"precision": "bf16"}}),
    "sft zero-2": ("sft", {"train": TRAIN, "engine": {"zero_stage": 2}}),
    "sft zero-3 bf16": ("sft", {"train": TRAIN, "engine": {"zero_stage": 3, "precision": "bf16"}}),
    "sft 8-bit": (
        "sft",
        {"train": {**TRAIN, "gradient_checkpointing": True}, "optim": {"kind": "adamw-8bit"}},
    ),
    "sft adafactor": (
        "sft",
        {"train": {**TRAIN, "gradient_checkpointing": True}, "optim": {"kind": "adafactor"}},
    ),
    "sft offload": ("sft", {"train": TRAIN, "engine": {"zero_stage": 2, "offload_optimizer": True}}),
    "sft padded": ("sft", {"train": TRAIN, "engine": {"packing": False}}),
    "reward": ("reward", {"train": {**TRAIN, "batch_size": 2}}),
    "dpo": ("dpo", {"train": {**TRAIN, "batch_size": 2}}),
    "ppo-lag": ("ppo-lag", PPO),
    "ppo-lag two passes": ("ppo-lag", {**PPO, "ppo": {**PPO["ppo"], "single_pass": False}}),
    "ppo-lag lora": ("ppo-lag", {**PPO, "lora": {"rank": 8}}),
    "ppo-lag qlora": ("ppo-lag", {**PPO, "lora": {"rank": 8, "bits": 4}}),
    "ppo-lag shared critic": ("ppo-lag", {**PPO, "ppo": {**PPO["ppo"], "shared_critic": True}}),
    "ppo-lag overlap": ("ppo-lag", {**PPO, "ppo": {**PPO["ppo"], "overlap": True, "importance_cap": 2.0}}),
    "ppo-lag rollout": (
        "ppo-lag",
        {
            **PPO,
            "gradient_checkpointing": True,
            "lora": {"rank": 8},
            "ppo": {"batch_size": 64, "micro_tokens": 256, "max_steps": 2},
        },
    ),
    "ppo-lag checkpointing": ("ppo-lag", {**PPO, "gradient_checkpointing": True}),
}
"""{name: (stage, settings)}; models and data are added."""


# ---------------------------------------------------------------- models and data


def make(folder, shape=None):
    """Writes a causal LM, two score models and data into a folder; random weights, one token per word."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from saferlhf_fast.models.causal_lm import save_causal_lm
    from saferlhf_fast.models.score_checkpoint import save_score_model
    from saferlhf_fast.models.score_model import score_model_from_backbone

    shape, folder = {**SHAPE, **(shape or {})}, Path(folder)
    torch.manual_seed(0)
    tokenizer = tokenizer_of(shape["vocab_size"])
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    save_causal_lm(folder / "lm", LlamaForCausalLM(LlamaConfig(**shape, **ids)), tokenizer)
    for kind in ("reward", "cost"):
        score = score_model_from_backbone(folder / "lm", kind=kind)
        save_score_model(folder / kind, score, tokenizer, kind=kind)
    _data(folder, TRAIN["max_length"])


def tokenizer_of(size):
    """Returns a tokenizer with `size` ids: four special tokens, then w4, w5, …, split at white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    vocabulary |= {f"w{i}": i for i in range(4, size)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _data(folder, longest):
    def words(count, seed):
        return " ".join(f"w{4 + (seed * 977 + i * 131) % 4000}" for i in range(count))

    # the template, the prompt and two special tokens take the other 24 tokens
    answer = longest - 24
    sft = [{"instruction": words(4, i), "output": words(answer, i)} for i in range(32)]
    pairs = [
        {
            "prompt": words(4, i),
            "response_0": words(answer, i),
            "response_1": words(answer, i + 1),
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            "better_response_id": 0,
            "safer_response_id": 0,
        }
        for i in range(32)
    ]
    prompts = [{"prompt": words(longest - 112, i)} for i in range(32)]
    for name, rows in (("sft", sft), ("pairs", pairs), ("prompts", prompts), ("few", prompts[:1])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )


def settings_of(case, folder):
    """Returns (stage, config) of a case with the models and data that `make` wrote."""
    from saferlhf_fast.config.load import build

    kind, values = CASES[case]
    folder = Path(folder)
    paths = {
        "model": str(folder / "lm"),
        "output": str(folder / f"run-{case.replace(' ', '-')}"),
        "overwrite": True,
        "data": str(folder / {"sft": "sft", "ppo-lag": "prompts"}.get(kind, "pairs")) + ".jsonl",
    }
    if kind == "ppo-lag":
        paths |= {"reward": str(folder / "reward"), "cost": str(folder / "cost")}
        values = {**values, "evaluation": {"data": str(folder / "few.jsonl")}}
    quiet = {"log": {"progress": False, "trackers": []}, "engine": {"threads": 1, **values.get("engine", {})}}
    return kind, build(kind, {**paths, **values, **quiet})


# ---------------------------------------------------------------- predicted and measured


def predicted(case, folder, gpus=1):
    """Returns the StagePlan of a case on this CPU."""
    from saferlhf_fast.commands.plan.phases import Hardware
    from saferlhf_fast.commands.plan.stage_phases import plan_stage

    kind, cfg = settings_of(case, folder)
    return plan_stage(kind, kind, cfg, Hardware(gpus, 1 << 40, "cpu"), {})


def measured(case, folder):
    """Runs a case in a new process and returns its peak in bytes during training."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", str(folder), case],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{case}: the stage ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def _child(folder, case):
    """Runs a case and prints its peak as JSON."""
    import torch

    from saferlhf_fast.commands import run
    from saferlhf_fast.config.stages import Optimizer
    from saferlhf_fast.evaluation import report
    from saferlhf_fast.runtime import console, engine

    kind, cfg = settings_of(case, folder)
    engine.start(cfg.engine, 0)
    for module in (
        "training.sft",
        "training.dpo",
        "training.preference",
        "training.ppo_lag",
        "data.examples",
        "evaluation.report",
        "models.lora",
        "rollout.engines.hf_generate",
    ):
        import_module(f"saferlhf_fast.{module}")
    import peft  # noqa: F401

    if getattr(getattr(cfg, "lora", None), "bits", None):
        import bitsandbytes  # noqa: F401
        import transformers.integrations.bitsandbytes  # noqa: F401

    toy = engine.Engine(torch.nn.Linear(8, 8), Optimizer(), dataclasses.replace(cfg.engine, config=None), 10)
    for _ in range(2):
        toy.backward(toy(torch.ones(2, 8, dtype=engine.precision(cfg.engine))).float().sum())
        toy.step()
    (torch.ones(2048, 512) @ torch.ones(512, 2048)).sum()  # allocates the buffers that a matrix product keeps
    del toy
    before, peak, real = _resident("VmRSS"), {}, console.track

    def track(*args, **kwargs):
        _reset()
        return real(*args, **kwargs)

    def end(self):
        peak["peak"] = _resident("VmHWM") - before

    # The process ends with the case, so nothing is restored. No report is written, because it is not part of
    # training.
    console.track, console.Track.end, report.write_report = track, end, lambda *args, **kwargs: None
    run.run_stage(kind, cfg)
    print(json.dumps(peak))


def _resident(name):
    gc.collect()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def _reset():
    """Resets the peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def compare(cases, folder, shape=None):
    """Yields a row for each case: case, phase of the peak, predicted and measured (MiB), ratio."""
    make(folder, shape)
    for case in cases:
        plan = predicted(case, folder)
        worst = max((m for m in plan.phases if m.name != "loading"), key=lambda moment: moment.total)
        real = measured(case, folder)
        yield {
            "case": case,
            "moment": worst.name,
            "predicted": round(worst.total / 2**20),
            "measured": round(real / 2**20),
            "ratio": round(worst.total / real, 3),
            "parts": {k: round(v / 2**20) for k, v in worst.parts.items() if v},
        }


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python bench/plan_memory.py", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(args.child, args.cases[0])
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in compare(args.cases or list(CASES), folder):
            print(
                f"{row['case']:24} {row['moment']:22} predicted {row['predicted']:6} MiB  measured "
                f"{row['measured']:6} MiB  "
                f"ratio {row['ratio']:.3f}",
                flush=True,
            )
            rows.append(row)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
