"""Compares a library's own functions with their replacements: time and peak memory, forward and backward.

    .venv-trl/bin/python bench/integrations.py trl
        measures, and writes bench/results/integrations-trl-<device>-<date>.json
    python bench/integrations.py --page
        prints the table of docs/integrations.md from the newest files

Run each library in the environment that `make test-integrations` creates, with PYTHONPATH set to the
checkout. Original ("theirs") and replacement ("ours") take turns in one process, so that a slower minute of
the machine slows both. Ratios are theirs / ours: above 1, the replacement is faster, or needs less memory.
"""

import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import types
from importlib import import_module, metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import memory  # noqa: E402
import torch  # noqa: E402
from ceilings import device_name, synchronize  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS, SECONDS = 7, 12.0
ROWS, WIDTH, VOCABULARY, HIDDEN = 4, 256, 32000, 512


def logits(kind, rows=(ROWS, WIDTH)):
    return (torch.randn(*rows, VOCABULARY) * 2).to(kind).requires_grad_(), torch.randint(VOCABULARY, rows)


def head(kind, count=ROWS * WIDTH):
    hidden, weight = (
        torch.randn(count, HIDDEN).to(kind),
        (torch.randn(VOCABULARY, HIDDEN) * 2 / HIDDEN**0.5).to(kind),
    )
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(VOCABULARY, (count,))


def tokens(count, rows=32, width=512):
    """Returns `count` tensors [rows, width] and a mask whose rows end somewhere in their second half."""
    lengths = torch.randint(width // 2, width + 1, (rows, 1))
    return *(torch.randn(rows, width) for _ in range(count)), torch.arange(width)[None] < lengths


def of_logits(name, kind, *options, rows=(ROWS, WIDTH), with_ids=True):
    def make():
        source, ids = logits(kind, rows)
        return lambda f: f(source, ids, *options) if with_ids else f(source, *options), [source]

    return name, f"{'x'.join(map(str, rows))}x{VOCABULARY} {str(kind)[6:]}", make


def of_tokens(name, count, call, learns=True):
    """call(f, tensors, mask) returns the outputs; the first tensor gets a gradient."""

    def make():
        *tensors, mask = tokens(count)
        tensors[0].requires_grad_(learns)
        return lambda f: call(f, tensors, mask), tensors[:1] if learns else []

    return name, "32x512 float32", make


def trl_cases():
    utils = "trl.trainer.utils:"
    for kind in (torch.float32, torch.bfloat16):
        for outputs in ((), ("entropy",), ("entropy", "mean_logits", "is_top1")):

            def make(kind=kind, outputs=outputs):
                hidden, weight, ids = head(kind)
                return (lambda f: f.apply(hidden, weight, None, ids, 1.0, 32768, None, 1.0, outputs)[:1]), [
                    hidden,
                    weight,
                ]

            extra = f", with {', '.join(outputs)}" if outputs else ""
            yield (
                f"{utils}_ChunkedLogProbFunction",
                f"{ROWS * WIDTH}x{HIDDEN}x{VOCABULARY} {str(kind)[6:]}{extra}",
                make,
            )
    for kind in (torch.float32, torch.bfloat16):
        yield of_logits(f"{utils}selective_log_softmax", kind)
        yield of_logits(f"{utils}entropy_from_logits", kind, with_ids=False)
        yield of_logits(f"{utils}selective_log_softmax_and_entropy", kind)


def verl_cases():
    functional, core = "verl.utils.torch_functional:", "verl.trainer.ppo.core_algos:"
    for kind in (torch.float32, torch.bfloat16):
        yield of_logits(f"{functional}logprobs_from_logits", kind)
        yield of_logits(f"{functional}entropy_from_logits", kind, with_ids=False)
        yield of_logits(
            f"{functional}entropy_from_logits_with_chunking", kind, rows=(ROWS * WIDTH,), with_ids=False
        )

        def make(kind=kind):
            hidden, weight, ids = head(kind)
            module = types.SimpleNamespace(impl_backend="torch", chunk_size=512)
            return (lambda f: f(module, hidden, weight, ids, 1.0)), [hidden, weight]

        yield (
            "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward",
            f"{ROWS * WIDTH}x{HIDDEN}x{VOCABULARY} {str(kind)[6:]}",
            make,
        )
    values = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "global_batch_info": {}}
    config = types.SimpleNamespace(**values, get=lambda name, default=None: default)
    yield of_tokens(f"{functional}masked_whiten", 1, lambda f, t, mask: f(t[0], mask))
    yield of_tokens(
        f"{core}compute_gae_advantage_return",
        2,
        lambda f, t, mask: f(*t, mask.long(), 1.0, 0.95),
        learns=False,
    )
    yield of_tokens(
        f"{core}compute_policy_loss_vanilla",
        3,
        lambda f, t, mask: f(t[1], t[0], t[2], mask.long(), "token-mean", config)[:1],
    )
    yield of_tokens(
        f"{core}compute_value_loss", 3, lambda f, t, mask: f(t[0], t[1], t[2], mask.long(), 0.2)[:1]
    )


def openrlhf_cases():
    from stubs import stub

    stub("flash_attn", "vllm", without=["flash_attn.ops"])
    utils, loss = "openrlhf.models.utils:", "openrlhf.models.loss:"
    for kind in (torch.float32, torch.bfloat16):
        yield of_logits(f"{utils}log_probs_from_logits", kind)
    yield of_logits(f"{utils}compute_entropy", torch.float32, with_ids=False)
    policy = types.SimpleNamespace(
        policy_loss_type="ppo",
        is_correction_level="off",
        token_level_loss=True,
        clip_eps_low=0.2,
        clip_eps_high=0.2,
        dual_clip=None,
    )
    value = types.SimpleNamespace(clip_eps=0.2, token_level_loss=True)
    yield of_tokens(f"{loss}PolicyLoss.forward", 3, lambda f, t, mask: f(policy, *t, mask)[:1])
    yield of_tokens(f"{loss}ValueLoss.forward", 3, lambda f, t, mask: f(value, *t, mask))
    yield of_tokens(
        "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_advantages_and_returns",
        2,
        lambda f, t, mask: f(None, *t, mask, 1.0, 0.95),
        learns=False,
    )


def safe_rlhf_cases():
    rl, algorithms = "safe_rlhf.trainers.rl_trainer:RLTrainer.", "safe_rlhf.algorithms."
    trainer = types.SimpleNamespace(
        gamma=1.0,
        gae_lambda=0.95,
        clip_range_ratio=0.2,
        clip_range_value=0.2,
        log_lambda=torch.nn.Parameter(torch.zeros(())),
    )
    for kind in (torch.float32, torch.bfloat16):
        yield of_logits("safe_rlhf.utils:gather_log_probabilities", kind)
    yield of_tokens(
        f"{rl}get_advantages_and_returns", 2, lambda f, t, mask: f(trainer, *t, mask, 0), learns=False
    )
    yield of_tokens(f"{rl}critic_loss_fn", 3, lambda f, t, mask: f(trainer, *t, mask))
    yield of_tokens(
        f"{algorithms}ppo.trainer:PPOTrainer.actor_loss_fn", 3, lambda f, t, mask: f(trainer, *t, mask)
    )
    yield of_tokens(
        f"{algorithms}ppo_lag.trainer:PPOLagTrainer.actor_loss_fn", 4, lambda f, t, mask: f(trainer, *t, mask)
    )


def transformers_sides():
    """Yields cases of a Llama of two layers: its class's forward with labels, and the patched one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from saferlhf_fast import integrations

    for vocabulary, width in ((32000, 512), (128000, 256)):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=8,
                max_position_embeddings=512,
            )
        )
        for labelled in ("all", "every second"):
            ids = torch.randint(vocabulary, (ROWS, WIDTH))
            labels = ids if labelled == "all" else ids.masked_fill(torch.arange(WIDTH) % 2 == 0, -100)
            with integrations.patch("transformers", model, quiet=True):
                shape = f"{ROWS}x{WIDTH}, V={vocabulary}, H={width}, {labelled} labelled"
                yield (
                    "transformers:LlamaForCausalLM, labels",
                    shape,
                    lambda f, ids=ids, labels=labels: f(input_ids=ids, labels=labels).loss,
                    list(model.parameters()),
                    {"theirs": types.MethodType(type(model).forward, model), "ours": model.forward},
                )


CASES = {
    "trl": trl_cases,
    "verl": verl_cases,
    "openrlhf": openrlhf_cases,
    "safe_rlhf": safe_rlhf_cases,
    "transformers": None,
}


def sides(name):
    """Yields (function, shape, call, leaves, {"theirs": function, "ours": function}) of each case."""
    if name == "transformers":
        torch.manual_seed(0)
        yield from transformers_sides()
        return
    from saferlhf_fast.integrations import sites

    cases = list(CASES[name]())
    entries = {
        entry.target: entry for entry in import_module(f"saferlhf_fast.integrations.{name}").LIBRARY.replace
    }
    for target, shape, make in cases:
        torch.manual_seed(0)
        import_module(entries[target].module)
        holder, attribute = sites.resolve(target)
        original = vars(holder)[attribute]
        yield target, shape, *make(), {"theirs": original, "ours": entries[target].make(original)}


def step(call, function, leaves):
    """Runs forward, and backward if there are leaves; returns outputs and gradients."""
    result = call(function)
    results = result if isinstance(result, (tuple, list)) else (result,)
    outputs = [output for output in results if isinstance(output, torch.Tensor)]
    learning = [output for output in outputs if output.requires_grad]
    gradients = (
        torch.autograd.grad(learning, leaves, [torch.ones_like(output) for output in learning])
        if leaves
        else ()
    )
    return *(output.detach() for output in outputs), *gradients


def measure(call, leaves, functions):
    """Returns {name: (median seconds, peak bytes above inputs and outputs)}; the functions take turns."""
    times = {name: [] for name in functions}
    for function in functions.values():
        step(call, function, leaves)
    began = time.perf_counter()
    while len(times["ours"]) < ROUNDS or (time.perf_counter() - began < 0.5 and len(times["ours"]) < 200):
        for name, function in functions.items():
            start = time.perf_counter()
            step(call, function, leaves)
            synchronize(DEVICE)
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > SECONDS and len(times["ours"]) >= 3:
            break
    peaks = {
        name: memory.above(lambda function=function: step(call, function, leaves), leaves, DEVICE)
        for name, function in functions.items()
    }
    return {name: (statistics.median(times[name]), peaks[name]) for name in functions}


def rows(name):
    """Yields one row per case, and prints it at once."""
    for target, shape, call, leaves, functions in sides(name):
        measured = measure(call, leaves, functions)
        row = {"function": target, "shape": shape}
        for side, (seconds, peak) in measured.items():
            row |= {f"{side}_ms": seconds * 1e3, f"{side}_mib": None if peak is None else peak / 2**20}
        print(
            f"{target.partition(':')[2]:38} {shape:48} {row['theirs_ms']:9.3f} -> {row['ours_ms']:8.3f} ms  "
            f"{row['theirs_mib']:8.1f} -> {row['ours_mib']:7.1f} MiB",
            flush=True,
        )
        yield row
        del call, leaves, functions
        gc.collect()


def version(name):
    """Returns the version that pip knows, or the package's own."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return import_module(name).__version__


def main(arguments):
    if arguments == ["--page"]:
        print(page())
        return 0
    if len(arguments) != 1 or arguments[0] not in CASES:
        print(
            f"expected one of {', '.join(CASES)}, or --page; got {' '.join(arguments) or 'nothing'}",
            file=sys.stderr,
        )
        return 2
    name = arguments[0]
    torch.set_default_device(DEVICE)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))

    def git(*words):
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()

    device, date = device_name(), datetime.date.today().isoformat()
    results = {
        "library": name,
        "version": version(name),
        "device": device,
        "date": date,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "command": f"python bench/integrations.py {name}",
        "rows": list(rows(name)),
    }
    from run import slug

    path = HERE / "results" / f"integrations-{name}-{slug(device)}-{date}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)
    return 0


def page():
    """Returns the measured tables in Markdown, one per library, from its newest file."""
    lines = []
    for name in CASES:
        path = max(
            (HERE / "results").glob(f"integrations-{name}-*.json"),
            default=None,
            key=lambda path: path.name[-15:],
        )
        if path is None:
            continue
        results = json.loads(path.read_text())
        lines += [
            f"### {name} {results['version']}",
            "",
            f"{results['device']}, torch {results['torch']}, {results['date']}, commit {results['commit']}, "
            f"`OMP_NUM_THREADS={results['threads']} {results['command']}`.",
            "",
            "| function | shape | original | patched | faster "
            "| memory, original | memory, patched | smaller |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in results["rows"]:
            cells = [
                f"`{row['function'].partition(':')[2]}`",
                row["shape"],
                _ms(row["theirs_ms"]),
                _ms(row["ours_ms"]),
                _ratio(row["theirs_ms"], row["ours_ms"]),
                _mib(row["theirs_mib"]),
                _mib(row["ours_mib"]),
                _ratio(row["theirs_mib"], row["ours_mib"], 1.0),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _ms(value):
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2f} ms"


def _mib(value):
    return "not measured" if value is None else "< 1 MiB" if value < 1 else f"{value:.0f} MiB"


def _ratio(original, patched, floor=0.0):
    """Returns original / patched, or "–" if both are below the resolution."""
    if original is None or patched is None or max(original, patched) < 2 * floor:
        return "–"
    return (
        f"{original / max(patched, floor or 1e-9):.2f}x" if patched >= floor else f"> {original / floor:.0f}x"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
