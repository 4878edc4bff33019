"""Prints the tables of docs/scaling.md: python bench/scaling.py [7B 13B 70B 70B+7B] [--write]

Without names it prints all sizes. The tables are for a step of ppo-lag with the defaults (16 prompts per GPU,
sequences of up to 512 tokens of which half is the prompt), checkpointing on, bf16, and Llama 2's shapes. They
have the memory, what is sent, and the least time that arithmetic, links and generation need. No weights and
no GPU are used. PEAKS has the published figures on which the times are based; nothing here is measured.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saferlhf_fast.commands.plan import communication, phases, sizes, usable  # noqa: E402
from saferlhf_fast.commands.plan.phases import Hardware  # noqa: E402
from saferlhf_fast.commands.plan.stage_phases import plan_stage  # noqa: E402
from saferlhf_fast.config import load  # noqa: E402

COMMON = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
SHAPES = {"7B": (4096, 11008, 32, 32, 32), "13B": (5120, 13824, 40, 40, 40), "70B": (8192, 28672, 80, 64, 8)}
"""hidden, intermediate, layers, heads, key-value heads of Llama 2."""
VARIANTS = {"7B": ("7B", "7B"), "13B": ("13B", "13B"), "70B": ("70B", "70B"), "70B+7B": ("70B", "7B")}
"""{name: (size of actor and reference, size of score models and critics)}."""
GPUS = (8, 64, 512)


class Peak(NamedTuple):
    """Published figures of a GPU."""

    memory: int  # GiB as its name says
    flops: float  # dense bf16, per second
    bandwidth: float  # of its memory, bytes per second


PEAKS = {"H100": Peak(80, 989e12, 3.35e12), "H200": Peak(141, 989e12, 4.8e12)}
GIB = 2**30


def folder_of(root, name):
    """Writes a folder with the config.json of a size."""
    hidden, inner, layers, heads, kv = SHAPES[name]
    folder = Path(root) / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(
            {
                **COMMON,
                "hidden_size": hidden,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv,
            }
        )
    )
    return str(folder)


def config_of(root, variant, stage):
    """Returns the PPOConfig of a variant under a ZeRO stage.

    The weights of a 70B actor are not gathered for its rollouts: they fit on no GPU.
    """
    actor, score = (folder_of(root, name) for name in VARIANTS[variant])
    gather = variant in ("7B", "13B") or stage < 3
    return load.build(
        "ppo-lag",
        {
            "model": actor,
            "reward": score,
            "cost": score,
            "data": "none",
            "output": "none",
            "gradient_checkpointing": True,
            "engine": {"zero_stage": stage, "precision": "bf16"},
            "sampling": {"gather": gather},
        },
    )


def plan_of(root, variant, gpus, stage, memory=80):
    """Returns the StagePlan."""
    return plan_stage("ppo-lag", "ppo-lag", config_of(root, variant, stage), Hardware(gpus, memory * GIB), {})


def running(plan):
    """Returns the peak after loading."""
    return max(moment.total for moment in plan.phases if moment.name != "loading")


def loading(plan):
    """Returns the peak while DeepSpeed takes the models."""
    return next(moment.total for moment in plan.phases if moment.name == "loading")


# ---------------------------------------------------------------- least times


def seconds_of(root, variant, stage, plan, gpus, peak):
    """Returns {"arithmetic", "links", "generation"}: the least seconds of a step.

    Generation reads all weights and the cache for each token. The weights arrive once before generation, or
    again for each token while it runs.
    """
    cfg = config_of(root, variant, stage)
    tokens = cfg.ppo.batch_size * cfg.max_length
    work = sum((8 if model.trained else 2) * model.count.all for model in plan.models) * tokens
    actor = next(model for model in plan.models if model.role == "actor")
    new = cfg.max_length // 2
    # from half full to full
    cache = cfg.ppo.batch_size * sizes.cache_bytes(actor.blueprint, cfg.max_length) * 3 // 4
    rolled = [sent for sent in plan.sent if sent.when == "rollout"]
    reading = new * (2 * actor.count.all + cache) / peak.bandwidth
    arriving = communication.seconds(rolled, gpus)
    others = [sent for sent in plan.sent if sent.when != "rollout"]
    return {
        "arithmetic": work / peak.flops,
        "links": communication.seconds(others, gpus),
        "generation": reading + arriving if cfg.sampling.gather else max(reading, arriving),
    }


# ---------------------------------------------------------------- tables


def gib(size):
    """Formats bytes as GiB with at most three digits."""
    return f"{size / GIB:.0f}" if size >= 10 * GIB else f"{size / GIB:.1f}"


def gigabytes(size):
    """Formats bytes as GB, the unit of links."""
    return f"{size / 1e9:,.0f}"


def memory_table(plans, variants):
    """Returns the table of peaks per GPU under each ZeRO stage; bold fits an H100, italic only an H200."""
    lines = [
        "| actor | GPUs | ZeRO-0 | ZeRO-1 | ZeRO-2 | ZeRO-3 | loading (ZeRO-3) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for variant in variants:
        for gpus in GPUS:
            cells = [marked(running(plans[variant, gpus, stage])) for stage in range(4)]
            cells.append(marked(loading(plans[variant, gpus, 3])))
            lines.append(f"| {variant} | {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines)


def marked(size):
    """Formats a size, bold if it fits 80 GiB, italic if it fits 141."""
    h100, h200 = (usable(Hardware(1, PEAKS[name].memory * GIB)) for name in ("H100", "H200"))
    return f"**{gib(size)}**" if size <= h100 else f"*{gib(size)}*" if size <= h200 else gib(size)


def sent_table(plans, variants):
    """Returns the table of GB that each GPU sends.

    It has the step without its rollout, and the rollout under ZeRO-3.
    """
    lines = [
        "| actor | GPUs | ZeRO-0 | ZeRO-1 | ZeRO-2 | ZeRO-3 | its rollout | s on the links |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for variant in variants:
        for gpus in GPUS:
            cells = []
            for stage in range(4):
                sent = plans[variant, gpus, stage].sent
                cells.append(gigabytes(sum(s.wire(gpus) for s in sent if s.when != "rollout")))
            rolled = [s for s in plans[variant, gpus, 3].sent if s.when == "rollout"]
            cells += [
                gigabytes(sum(s.wire(gpus) for s in rolled)),
                f"{communication.seconds(plans[variant, gpus, 3].sent, gpus):.3g}",
            ]
            lines.append(f"| {variant} | {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines)


def limit_table(root, plans, variants):
    """Returns the table of the first ZeRO stage that fits on each GPU.

    It also has the least times, and the largest of them.
    """
    lines = [
        "| actor | GPUs | of | fits from | arithmetic s | links s | by one card a node | generation s | the "
        "limit |",
        "|---|---:|---|---|---:|---:|---:|---:|---|",
    ]
    for variant in variants:
        for gpus in GPUS:
            for name, peak in PEAKS.items():
                room = usable(Hardware(gpus, peak.memory * GIB))
                stage = next((s for s in range(4) if running(plans[variant, gpus, s]) <= room), None)
                if stage is None:
                    least = min(running(plans[variant, gpus, s]) for s in range(4))
                    lines.append(
                        f"| {variant} | {gpus} | {name} | – | – | – | – | – | memory: {gib(least)} GiB at "
                        f"the least |"
                    )
                    continue
                plan = plans[variant, gpus, stage]
                times = seconds_of(root, variant, stage, plan, gpus, peak)
                cells = {key: f"{value:.2g}" for key, value in times.items()}
                others = [sent for sent in plan.sent if sent.when != "rollout"]
                slow = f"{communication.seconds(others, gpus, network=phases.NETWORK / phases.NODE):.2g}"
                most = max(times, key=times.get)
                if loading(plan) > room:
                    most = f"loading ({gib(loading(plan))} GiB), then {most}"
                row = [
                    variant,
                    str(gpus),
                    name,
                    f"ZeRO-{stage}",
                    cells["arithmetic"],
                    cells["links"],
                    slow,
                    cells["generation"],
                    most,
                ]
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def tables(variants=tuple(VARIANTS)):
    """Returns {heading: table}."""
    with tempfile.TemporaryDirectory() as root:
        plans = {
            (variant, gpus, stage): plan_of(root, variant, gpus, stage)
            for variant in variants
            for gpus in GPUS
            for stage in range(4)
        }
        return {
            "Memory": memory_table(plans, variants),
            "Communication": sent_table(plans, variants),
            "The limit": limit_table(root, plans, variants),
        }


def main(words):
    """Prints the tables; with --write it replaces those between the markers of docs/scaling.md."""
    if "--help" in words:
        print(__doc__)
        return
    write = "--write" in words
    new_tables = tables(tuple(word for word in words if word != "--write") or tuple(VARIANTS))
    if not write:
        print("\n".join(f"### {heading}\n\n{table}\n" for heading, table in new_tables.items()))
        return
    path = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
    text = path.read_text(encoding="utf-8")
    for heading, table in new_tables.items():
        before, after = text.split(f"<!-- {heading} -->\n", 1)
        text = f"{before}<!-- {heading} -->\n{table}\n<!-- end -->{after.split('<!-- end -->', 1)[1]}"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
