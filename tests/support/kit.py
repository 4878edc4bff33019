"""Tiny models and data for tests: a Llama with a word-level tokenizer, files like those of PKU-SafeRLHF."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import forked

WORDS = [
    "yes",
    "no",
    "maybe",
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "stop",
    "go",
    "help",
    "harm",
    "please",
    "what",
    "is",
    "the",
    "colour",
    "number",
    "of",
    "day",
    "night",
    "USER:",
    "ASSISTANT:",
    "BEGINNING",
    "OF",
    "CONVERSATION:",
]
ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


def shared():
    """The folder of real data and models, or None where there is none."""
    folder = Path(os.environ.get("SAFERLHF_DATA", ROOT.parent / "shared"))
    return folder if (folder / "models" / "stories260k").is_dir() else None


def make_tokenizer(pad_is_eos=False, extra=()):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"] + ([] if pad_is_eos else ["<pad>"])
    vocab = {word: i for i, word in enumerate([*specials, *WORDS, *extra])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>" if pad_is_eos else "<pad>",
    )


def make_model(folder, seed=0, hidden=32, vocab=None, pad_is_eos=False, extra=(), architecture="llama"):
    """Writes a 2-layer Llama (or GPT-2) and its tokenizer; returns the folder as a string."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(pad_is_eos, extra)
    torch.manual_seed(seed)
    common = {
        "vocab_size": vocab or len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if architecture == "llama":
        lm = LlamaForCausalLM(LlamaConfig(intermediate_size=2 * hidden, num_key_value_heads=2, **common))
    else:
        lm = GPT2LMHeadModel(GPT2Config(**common))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_data(folder, n=24, seed=0):
    """Writes sft.jsonl, pairs.jsonl (the fields of the v0 schema) and prompts.jsonl; returns {name: path}."""
    rng = random.Random(seed)
    plain = [w for w in WORDS if w.islower()]

    def words(low, high):
        return " ".join(rng.choice(plain) for _ in range(rng.randint(low, high)))

    prompts = [f"what is {words(1, 4)} {i % 7}" for i in range(n)]
    contents = {
        "sft": [{"instruction": p, "input": "", "output": words(2, 6)} for p in prompts],
        "pairs": [pair(p, "yes " + words(1, 5), "harm " + words(1, 5), rng.randint(0, 1)) for p in prompts],
        "prompts": [{"prompt": p} for p in prompts],
    }
    paths = {}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, values in contents.items():
        paths[name] = str(Path(folder) / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in values))
    return paths


def pair(prompt, good, bad, at):
    """A preference row of the v0 schema whose good response is at position `at`."""
    first, second = (good, bad) if at == 0 else (bad, good)
    return {
        "prompt": prompt,
        "response_0": first,
        "response_1": second,
        "is_response_0_safe": at == 0,
        "is_response_1_safe": at == 1,
        "better_response_id": at,
        "safer_response_id": at,
    }


def command(*arguments, processes=1, timeout=240, fresh=False, **env):
    """Runs `saferlhf-fast …` in separate processes; returns a CompletedProcess with text output.

    fresh: starts new interpreters (several of them under torchrun) instead of forked ones.
    """
    program = ["-m", "saferlhf_fast", *map(str, arguments)]
    if not fresh:
        return forked.run(program, processes, timeout, env)
    if processes > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *program]
    return subprocess.run(
        [sys.executable, *program],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
    )


def free_port():
    """A free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def losses(folder, key="train/loss"):
    """One metric over the steps of a run."""
    return [row[key] for row in rows(folder) if key in row]


def steps(folder):
    """The steps that a run has logged."""
    return [row["step"] for row in rows(folder)]


def rows(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def make_scores(folder, base, seed=1):
    """Writes an untrained reward model and cost model on the backbone of `base`.

    Returns {"reward": path, "cost": path}.
    """
    import torch

    from saferlhf_fast.models.score_checkpoint import save_score_model
    from saferlhf_fast.models.score_model import score_model_from_backbone
    from saferlhf_fast.models.tokenizer import load_tokenizer

    paths, tokenizer = {}, load_tokenizer(base)
    for i, kind in enumerate(("reward", "cost")):
        torch.manual_seed(seed + i)
        paths[kind] = str(Path(folder) / kind)
        save_score_model(paths[kind], score_model_from_backbone(base, kind=kind), tokenizer, kind=kind)
    return paths


def write_rows(path, rows):
    """Writes JSON lines; returns the path as a string."""
    Path(path).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def files(folder):
    """{relative name: content} of every file in a folder, to check later that nothing has changed."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


def main(*arguments):
    """Runs `saferlhf-fast …` in this process; returns the exit code."""
    from saferlhf_fast import cli

    return cli.main([str(a) for a in arguments])


def no_report():
    """A context in which no run writes report.html, since that takes longer than a tiny run."""
    return mock.patch("saferlhf_fast.evaluation.report.write_report")


def run(stage, output, report=False, **settings):
    """Runs a stage in this process without progress bars; returns its folder.

    A dot in the name of a setting is written as __. report: whether report.html is written.
    """
    words = [f"{key.replace('__', '.')}={value}" for key, value in {"output": output, **settings}.items()]
    quiet = [] if stage == "evaluate" else ["log.progress=false"]
    with contextlib.nullcontext() if report else no_report():
        code = main(stage, *words, *quiet)
    assert code == 0, f"{stage} ended with exit code {code}"
    return Path(output)


def summary(folder):
    """The summary of a finished run."""
    return json.loads((Path(folder) / "summary.json").read_text())


def make_easy(folder):
    """Writes data that a tiny model learns in a few steps; returns {name: path}.

    The answer repeats a word of the prompt. In the pairs `yes` begins the good response, `harm` the bad one.
    """
    nouns = ["red", "green", "blue", "one", "two", "three", "day", "night", "number", "colour"]
    prompts = [f"what is {a} of {b}" for a in nouns for b in nouns if a != b][::3]
    rows = {
        "sft": [{"instruction": p, "input": "", "output": f"the {p.split()[2]} stop"} for p in prompts],
        "pairs": [
            pair(p, f"yes {p.split()[2]}", f"harm {p.split()[2]}", i % 2) for i, p in enumerate(prompts)
        ],
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    return {name: write_rows(Path(folder) / f"{name}.jsonl", values) for name, values in rows.items()}
