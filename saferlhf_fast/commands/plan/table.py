"""A plan as tables, on a terminal of 100 columns or in a file, and as JSON."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...config.stage_table import FAMILIES, STAGE_SPECS
from ...runtime import console
from .communication import seconds
from .phases import PARTS, Hardware

if TYPE_CHECKING:
    from .options import Advice
    from .stage_phases import StagePlan

KIB, MIB, GIB = 2**10, 2**20, 2**30
SHORT = {"activations": "activ."}  # a table must fit 100 columns


def size_text(size: int) -> str:
    """Writes bytes with the largest unit of GiB, MiB and KiB in which the number is at least 0.1."""
    if size == 0:
        return "0 B"
    if size < 0.1 * MIB:
        return f"{-(-size // KIB)} KiB"
    if size < 0.1 * GIB:
        return f"{size / MIB:.1f} MiB"
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def size_cell(size: int | None) -> str:
    """Writes bytes for a cell of a table. A dash means that there are none, or that it is not possible."""
    return size_text(size) if size else "–"


def parameters(count: int) -> str:
    """Writes a number of parameters in a few characters: 6738415616 as 6.74B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def show(results: "Sequence[tuple[StagePlan, Advice | None]]", hardware: Hardware, usable: int) -> None:
    """Prints the plans of all stages.

    Args:
        results: What `plan` returns.
        hardware: What the plan was made for.
        usable: Bytes of a device that a stage may take.
    """
    device = "GPU" if hardware.device == "cuda" else "process"
    for plan, advice in results:
        console.say("")
        _models(plan, hardware, device)
        _phases(plan, usable, device)
        _sent(plan, hardware, device)
        if advice is not None:
            _options(plan, advice)
    console.say("")
    _all_stages(results, hardware, usable)


def _models(plan: "StagePlan", hardware: Hardware, device: str) -> None:
    rows = []
    for model in plan.models:
        states, use = model.states, plan.use[model.role]
        adapted = model.trained and model.count.trained < model.count.all
        size = (
            f"{parameters(model.count.trained)} of {parameters(model.count.all)}"
            if adapted
            else parameters(model.count.all)
        )
        rows.append(
            [
                model.role,
                size,
                size_cell(states.weights),
                size_cell(states.gradients),
                size_cell(states.optimizer),
                size_cell(use["activations"]),
                size_cell(use["logits"]),
                size_cell(use["cache"]),
            ]
        )
    devices = device if hardware.gpus == 1 else f"{device}es" if device == "process" else f"{device}s"
    console.result_table(
        f"{plan.name}: memory per {device}, {hardware.gpus} {devices}",
        ["model", "parameters", "weights", "gradients", "optimiser", "activations", "logits", "cache"],
        rows,
    )


def _phases(plan: "StagePlan", usable: int, device: str) -> None:
    rows = [
        [phase.name, *(size_cell(phase.parts[part]) for part in PARTS), size_cell(phase.total)]
        for phase in plan.phases
    ]
    columns = ["phase", *(SHORT.get(part, part) for part in PARTS), "together"]
    console.result_table(f"{plan.name}: memory per {device} in each phase", columns, rows)
    host = f"; {size_text(plan.host)} of host memory per process" if plan.host else ""
    console.say(
        f"  peak {size_text(plan.worst.total)} per {device} of {size_text(usable)} usable "
        f"({plan.worst.name}){host}: {fit_text(plan, usable)}"
    )


def gigabytes(size: float) -> str:
    """Writes bytes as GB, as links count them."""
    return f"{size / 1e9:.3g}"


def _sent(plan: "StagePlan", hardware: Hardware, device: str) -> None:
    if not plan.sent:
        return
    rows = [
        [
            sent.role,
            sent.when,
            sent.collective,
            str(sent.times),
            gigabytes(sent.size),
            gigabytes(sent.wire(hardware.gpus)),
        ]
        for sent in plan.sent
    ]
    step = FAMILIES[STAGE_SPECS[plan.kind].family].step
    console.result_table(
        f"{plan.name}: what one {step} sends",
        ["model", "when", "collective", "times", "GB", f"GB of each {device}"],
        rows,
    )
    total = sum(sent.wire(hardware.gpus) for sent in plan.sent)
    line = f"  {gigabytes(total)} GB of each {device} and {step}"
    if hardware.device == "cuda":
        nodes = -(-hardware.gpus // hardware.node)
        line += f"; at least {link_seconds(plan, hardware):.3g} s at {hardware.nvlink:g} GB/s of NVLink"
        line += f" and {hardware.network:g} GB/s of each GPU between {nodes} nodes" if nodes > 1 else ""
    console.say(line)


def link_seconds(plan: "StagePlan", hardware: Hardware) -> float:
    """Returns the least time that the links need for a step (seconds)."""
    return seconds(plan.sent, hardware.gpus, hardware.node, hardware.nvlink, hardware.network)


def fit_text(plan: "StagePlan", usable: int) -> str:
    """Says whether a stage fits, and whether it still fits if the plan is off by 15 %.

    Args:
        plan: The stage's plan.
        usable: Bytes of a device that it may take.
    """
    if plan.worst.total > usable:
        return "does not fit"
    return (
        "fits"
        if 1.15 * plan.worst.total <= usable
        else "fits, with less to spare than the plan may be off by (15 %)"
    )


def _options(plan: "StagePlan", advice: "Advice") -> None:
    rows = [
        [
            option.choice.words(),
            option.choice.cost,
            size_cell(option.alone),
            size_cell(option.together),
            "yes" if option.fits else "no",
        ]
        for option in advice.tried
    ]
    if rows:
        console.result_table(
            f"{plan.name}: what makes it fit, cheapest first (peak memory)",
            ["setting", "costs", "alone", "with all above", "fits"],
            rows,
        )
    if advice.enough:
        words = " ".join(choice.words(plan.name) for choice in advice.enough)
        console.say(f"  to type: {words}   (peak {size_text(advice.peak)})")
    else:
        why = (
            "each model passes through the GPU in float32 when it is loaded"
            if plan.worst.name == "loading"
            else "more GPUs, shorter sequences (max_length) or a smaller model"
        )
        console.say(f"  nothing that was tried is enough: {size_text(advice.peak)} at the least; {why}")


def _all_stages(
    results: "Sequence[tuple[StagePlan, Advice | None]]", hardware: Hardware, usable: int
) -> None:
    rows = [
        [plan.name, size_cell(plan.worst.total), plan.worst.name, fit_text(plan, usable).split(",")[0]]
        for plan, _ in results
    ]
    if len(rows) > 1:
        console.result_table("all stages", ["stage", "peak memory", "phase", "fits"], rows)
    reserved = hardware.memory - usable
    if reserved:
        console.say(
            f"Of {size_text(hardware.memory)}, {size_text(reserved)} are reserved for CUDA, NCCL and "
            "fragmentation. Every sequence counts as long as max_length allows."
        )


def as_dict(
    results: "Sequence[tuple[StagePlan, Advice | None]]", hardware: Hardware, usable: int
) -> dict[str, Any]:
    """Returns what `show` prints, as values that JSON can hold; sizes are in bytes.

    Args:
        results: What `plan` returns.
        hardware: What the plan was made for.
        usable: Bytes of a device that a stage may take.
    """
    return {
        "device": hardware.device,
        "gpus": hardware.gpus,
        "memory": hardware.memory,
        "usable": usable,
        "stages": [_stage_as_dict(plan, advice, hardware, usable) for plan, advice in results],
    }


def _stage_as_dict(
    plan: "StagePlan", advice: "Advice | None", hardware: Hardware, usable: int
) -> dict[str, Any]:
    models = [
        {
            "role": model.role,
            "start": model.start,
            "parameters": model.count.all,
            "trained": model.count.trained if model.trained else 0,
            **model.states._asdict(),
            **plan.use[model.role],
        }
        for model in plan.models
    ]
    options = [
        {
            "setting": option.choice.words(plan.name),
            "costs": option.choice.cost,
            "alone": option.alone,
            "together": option.together,
            "fits": option.fits,
        }
        for option in (advice.tried if advice else [])
    ]
    return {
        "stage": plan.name,
        "kind": plan.kind,
        "models": models,
        "host": plan.host,
        # readers of this JSON know the phases as moments: the keys stay
        "moments": [{"moment": phase.name, "total": phase.total, **phase.parts} for phase in plan.phases],
        "sent": [{**sent._asdict(), "of_each": sent.wire(hardware.gpus)} for sent in plan.sent],
        "link_seconds": link_seconds(plan, hardware) if hardware.device == "cuda" else None,
        "peak": plan.worst.total,
        "fits": plan.worst.total <= usable,
        "options": options,
        "type": [choice.words(plan.name) for choice in advice.enough] if advice else [],
    }
