"""Measures a whole PPO-Lag step, and compares it with other trainers.

The measurement is `python bench/bench_step.py --growth --processes --json auto`.

Each side (a trainer) runs in its own process, one after the other, on the same machine, with the same random
models, the same prompts and the same number of response tokens (step_work.py: lengths of real PKU-SafeRLHF
rows). Each side's file says what it runs and what it leaves out: step_saferlhf_fast.py (the sides `ours`, and
`unfused`: the padded form in plain torch), step_safe_rlhf.py (the side `ref`: the reference implementation's
trainer), step_trl.py (the side `trl`: the closest trainer of TRL). Before any ratio is computed, the sides'
log-probs, scores, values and critic losses on stored responses are compared: a side that computes something
else has no speed. Times are medians over `--repeat` steps after a warm-up (the warm-up of `ref` is its check
and a short rollout; the steps of `--growth` are too long to need one).

On a CPU the peak is a process's peak resident memory (VmHWM), Python, libraries and models included; on CUDA
it is torch's `max_memory_allocated`. Compare ratios of one run. Do not measure while other work runs on the
machine.
"""

import argparse
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import step_rows  # noqa: E402
import step_side  # noqa: E402
import step_work  # noqa: E402

SIDES = ("ours", *step_rows.OTHERS)
GROWTH = (4, 16)
# relative, for the check's sums; bf16 rounds each log-prob to 3 digits
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
EXAMPLES = """examples:
  python bench/bench_step.py                                 ours, unfused, and ref and trl if they import
  python bench/bench_step.py --only unfused --quick          8 prompts, one step: does it run?
  PYTHONPATH=../safe-rlhf python bench/bench_step.py --only ref --json rows.json
  python bench/bench_step.py --device cuda --model 1.5b --json auto

The reference is found by `import safe_rlhf` (it needs optree), TRL by `import trl`; build/peers is also
searched (bench/README.md). Without them their rows say "not run"."""


def parser():
    result = argparse.ArgumentParser(
        prog="bench/bench_step.py",
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--json",
        metavar="FILE",
        help="write the rows, a list of {name, ours, other, ratio = other / ours, unit, "
        "device, commit, …}; auto: bench/results/step-<device>-<date>.json",
    )
    result.add_argument(
        "--model",
        choices=sorted(step_work.SHAPES),
        default=None,
        help="shape of all six models; default: cpu-small on a CPU (4 layers, 256 wide, 32,000 ids, fp32), "
        "0.5b on CUDA; 8b-lora: only ours, adapters on one shared base, compared with 80 GB; tiny, "
        "tiny-lora: for tests",
    )
    result.add_argument(
        "--prompts", type=int, default=32, help="prompts per step, one response each (default: 32)"
    )
    result.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA if there is a GPU"
    )
    result.add_argument(
        "--only",
        nargs="+",
        metavar="SIDE",
        choices=SIDES,
        default=SIDES,
        help=f"the sides to compare with ours: {', '.join(step_rows.OTHERS)} (default: all that import)",
    )
    for name in ("ref", "trl"):
        result.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=True,
            help=f"run {name} if it imports",
        )
    result.add_argument(
        "--growth",
        action="store_true",
        help="also run ours with 4 and 16 times the prompts: tokens/s, peak memory",
    )
    result.add_argument(
        "--processes",
        action="store_true",
        help="also run ours in two CPU processes (gloo) with one thread each",
    )
    result.add_argument(
        "--ptx", action="store_true", help="add the supervised loss on as many examples as prompts (not trl)"
    )
    result.add_argument(
        "--repeat", type=int, default=2, metavar="N", help="measured steps after the warm-up (default: 2)"
    )
    result.add_argument(
        "--quick", action="store_true", help="8 prompts and one step: checks that it runs, measures nothing"
    )
    result.add_argument(
        "--threads", type=int, default=None, help="CPU threads of each side (default: torch's own choice)"
    )
    result.add_argument(
        "--micro",
        type=int,
        default=16,
        metavar="ROWS",
        help="rows of a padded micro-batch of ref and trl "
        "(default: 16, as in the reference's script); ours fills passes by tokens",
    )
    result.add_argument(
        "--micro-tokens",
        type=int,
        default=None,
        metavar="N",
        help="ppo.micro_tokens of ours and unfused "
        "(default: 1024 for cpu-small, 2048 for 8b-lora, else the recipe's)",
    )
    result.add_argument(
        "--seed",
        type=int,
        default=8,
        help="seed of the rows that give the lengths (default: 8, the one of 0 to 11 "
        "whose 32 responses are closest to 2,100 tokens)",
    )
    result.add_argument(
        "--data",
        metavar="FILE",
        help=f"PKU-SafeRLHF rows (default: {step_work.ROWS} in the folder SAFERLHF_DATA)",
    )
    result.add_argument(
        "--lengths",
        choices=("words", "tokens"),
        default="words",
        help="words: 4 tokens for 3 words; tokens: as --tokenizer counts",
    )
    result.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help=f"with --lengths tokens (default: {step_work.TOKENIZER} in SAFERLHF_DATA)",
    )
    result.add_argument(
        "--timeout", type=int, default=1800, metavar="SECONDS", help="limit for one side (default: 1800)"
    )
    return result


def importable(side):
    """Returns None, or the reason why a side cannot run."""
    if side in ("ref", "trl"):
        return importlib.import_module(step_side.MODULES[side]).importable()
    return None


class Bench:
    """Runs each side in its own process."""

    def __init__(self, options, folder):
        self.options, self.folder = options, Path(folder)

    def work(self, factor=1):
        """Returns the path of the work at `factor` times the prompts."""
        path = self.folder / f"work-{factor}.json"
        if not path.exists():
            step_work.write_work(make_work(self.options, factor), path)
        return path

    def run(self, side, factor=1, processes=1, threads=None, check=True, warmup=1, repeat=None):
        """Returns what step_side.py printed for a side, or a sentence that begins with "not run" or "failed".

        factor: times the prompts; check: compare its numbers; warmup: steps that are not counted; repeat:
        steps that are counted.
        """
        o = self.options
        reason = importable(side)
        if reason:
            return f"not run: {reason}"
        if side == "trl" and o.ptx:
            return "not run: trl has no supervised loss beside its own"
        recipe = {
            "device": o.device,
            "micro": o.micro,
            "repeat": o.repeat if repeat is None else repeat,
            "ptx": o.ptx,
            "warmup": warmup,
            "threads": threads or o.threads,
            "check": check,
            "packing": side != "unfused",
            "micro_tokens": o.micro_tokens or step_work.MICRO_TOKENS.get(o.model),
            "lora": step_work.RANKS.get(o.model, 0),
        }
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(HERE / "step_side.py"), side, str(self.work(factor)), json.dumps(recipe)]
        more = (f", {factor} x the prompts" if factor > 1 else "") + (
            f", {processes} processes" if processes > 1 else ""
        )
        print(f"… {side}{more}", file=sys.stderr, flush=True)
        # a new process group, so that torch.distributed.run's children end with it
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=self.environment(side, recipe),
        )
        try:
            out, errors = process.communicate(timeout=o.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"failed: {side} took over {o.timeout} s"
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if process.returncode or not lines:
            messages = [line for line in errors.splitlines() if line.strip()] or [
                f"exit code {process.returncode}"
            ]
            print("\n".join(messages[-15:]), file=sys.stderr)
            return f"failed: {messages[-1][:200]}"
        return json.loads(lines[-1])

    def environment(self, side, recipe):
        more = {"SAFERLHF_IMPL": "reference"} if side == "unfused" else {}
        if recipe["threads"]:
            more["OMP_NUM_THREADS"] = str(recipe["threads"])
        return {**os.environ, **more}


def compared(saferlhf, other, tolerance):
    """Returns `other`, or the reason why it is not compared: its numbers are not those of `saferlhf`."""
    if isinstance(saferlhf, str) or isinstance(other, str):
        return other
    differing = step_rows.disagreements(saferlhf, other, tolerance)
    return f"failed: computes something else than ours: {', '.join(differing)}" if differing else other


def measure(options):
    """Returns the rows, without the fields that all of them share."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        saferlhf = bench.run("ours")
        tolerance = TOLERANCE[step_work.SHAPES[options.model].dtype]
        rows = []
        if options.model in step_work.RANKS:
            return [step_rows.in_80_gb(saferlhf)]
        for side in step_rows.OTHERS:
            wanted = side in options.only and getattr(options, side, True)
            other = bench.run(side, warmup=int(side != "ref")) if wanted else "not run: not asked for"
            rows += step_rows.against(side, saferlhf, compared(saferlhf, other, tolerance))
        if options.growth:
            for factor in GROWTH:
                rows += step_rows.grown(
                    factor, saferlhf, bench.run("ours", factor, check=False, warmup=0, repeat=1)
                )
        if options.processes:
            one = bench.run("ours", threads=1, check=False, repeat=1)
            rows += step_rows.divided(
                one, bench.run("ours", processes=2, threads=1, check=False, repeat=1), 2
            )
        return rows


def make_work(options, factor=1):
    return step_work.make_work(
        options.model,
        options.prompts * factor,
        seed=options.seed,
        data=options.data,
        lengths=options.lengths,
        tokenizer=options.tokenizer,
    )


def shared(options, arguments):
    """Returns the fields that describe the run, the same in every row."""
    from ceilings import device_name
    from conftest import commit

    work, micro = make_work(options), options.micro
    longest = max(len(p) + len(r) for p, r in zip(work.prompts, work.responses))
    most_tokens = options.micro_tokens or step_work.MICRO_TOKENS.get(options.model, 16 * 512)
    return {
        "device": device_name(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python bench/bench_step.py", *arguments]),
        "work": f"{options.model}, {len(work.prompts)} prompts, {work.tokens} response tokens, longest "
        f"sequence {longest}; "
        f"ref and trl in micro-batches of {micro} rows ({work.useful(micro):.0%} of whose tokens are "
        f"useful), "
        f"ours in passes of at most {most_tokens} tokens",
    }


def main(arguments):
    options = parser().parse_args(arguments)
    import torch

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    options.model = options.model or ("0.5b" if options.device == "cuda" else "cpu-small")
    if options.quick:
        options.prompts, options.repeat, options.micro = min(options.prompts, 8), 1, min(options.micro, 4)
    peers = ROOT / "build" / "peers"
    if peers.is_dir():
        sys.path.append(str(peers))
    try:
        common = shared(options, arguments)
        rows = [row | common for row in measure(options)]
    except step_work.Lacking as lacking:
        print(lacking, file=sys.stderr)
        return 2
    print(
        f"Device: {common['device']}. Commit: {common['commit']}. Date: {common['date']}. Work: "
        f"{common['work']}. "
        f"Command: `{common['command']}`.\n"
    )
    print("\n".join(step_rows.table(rows, options.device, options.model)))
    if options.json:
        from run import slug

        stored = HERE / "results" / f"step-{slug(common['device'])}-{common['date']}.json"
        path = stored if options.json == "auto" else Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nwrote {path}")
    return 1 if any(row["note"].startswith("failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
