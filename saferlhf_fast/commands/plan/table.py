"""A plan as people read it, on a terminal of 100 columns or in a file, and as JSON."""

from ...config.stage_table import FAMILIES, STAGE_SPECS
from ...runtime import console
from .communication import seconds
from .phases import PARTS

GIB = 2**30
SHORT = {"activations": "activ."}  # a table must fit 100 columns


def gib(size):
    """Bytes as GiB; a dash for nothing, or for what cannot be."""
    if not size:
        return "–"
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"


def parameters(count):
    """6738415616 as 6.74B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def show(results, hardware, usable):
    """Prints all stages. results: (StagePlan, Advice or None) of each."""
    what = "GPU" if hardware.device == "cuda" else "process"
    for plan, advice in results:
        console.say("")
        _models(plan, hardware, what)
        _moments(plan, usable, what)
        _sent(plan, hardware, what)
        if advice is not None:
            _options(plan, advice, usable)
    console.say("")
    _verdicts(results, hardware, usable, what)


def _models(plan, hardware, what):
    rows = []
    for model in plan.models:
        held, use = model.states, plan.use[model.role]
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
                gib(held.weights),
                gib(held.gradients),
                gib(held.optimizer),
                gib(use["activations"]),
                gib(use["logits"]),
                gib(use["cache"]),
            ]
        )
    console.result_table(
        f"{plan.name}: GiB per {what}, {hardware.gpus} {what}{'s' * (hardware.gpus > 1)}",
        ["model", "parameters", "weights", "gradients", "optimiser", "activations", "logits", "cache"],
        rows,
    )


def _moments(plan, usable, what):
    rows = [
        [moment.name, *(gib(moment.parts[part]) for part in PARTS), gib(moment.total)]
        for moment in plan.phases
    ]
    columns = ["moment", *(SHORT.get(part, part) for part in PARTS), "together"]
    console.result_table(f"{plan.name}: at its worst moments", columns, rows)
    host = f"; {gib(plan.host)} GiB of host memory per process" if plan.host else ""
    console.say(
        f"  peak {gib(plan.worst.total)} GiB per {what} of {gib(usable)} usable ({plan.worst.name}){host}: "
        f"{verdict(plan, usable)}"
    )


def gigabytes(size):
    """Bytes as GB, as links count them."""
    return f"{size / 1e9:.3g}"


def _sent(plan, hardware, what):
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
        ["model", "when", "collective", "times", "GB", f"GB of each {what}"],
        rows,
    )
    total = sum(sent.wire(hardware.gpus) for sent in plan.sent)
    line = f"  {gigabytes(total)} GB of each {what} and {step}"
    if hardware.device == "cuda":
        nodes = -(-hardware.gpus // hardware.node)
        line += f"; at least {link_seconds(plan, hardware):.3g} s at {hardware.nvlink:g} GB/s of NVLink"
        line += f" and {hardware.network:g} GB/s of each GPU between {nodes} nodes" if nodes > 1 else ""
    console.say(line)


def link_seconds(plan, hardware):
    """The least time that the links need for a step."""
    return seconds(plan.sent, hardware.gpus, hardware.node, hardware.nvlink, hardware.network)


def verdict(plan, usable):
    """Fits, fits if the plan is right, or not."""
    if plan.worst.total > usable:
        return "does not fit"
    return (
        "fits"
        if 1.15 * plan.worst.total <= usable
        else "fits, with less to spare than the plan may be off by (15 %)"
    )


def _options(plan, advice, usable):
    rows = [
        [
            option.choice.words(),
            option.choice.cost,
            gib(option.alone),
            gib(option.together),
            "yes" if option.fits else "no",
        ]
        for option in advice.tried
    ]
    if rows:
        console.result_table(
            f"{plan.name}: what makes it fit, cheapest first (peak in GiB)",
            ["setting", "costs", "alone", "with all above", "fits"],
            rows,
        )
    if advice.enough:
        words = " ".join(choice.words(plan.name) for choice in advice.enough)
        console.say(f"  to type: {words}   (peak {gib(advice.peak)} GiB)")
    else:
        why = (
            "each model passes through the GPU in float32 when it is loaded"
            if plan.worst.name == "loading"
            else "more GPUs, shorter sequences (max_length) or a smaller model"
        )
        console.say(f"  nothing that was tried is enough: {gib(advice.peak)} GiB at the least; {why}")


def _verdicts(results, hardware, usable, what):
    rows = [
        [plan.name, gib(plan.worst.total), plan.worst.name, verdict(plan, usable).split(",")[0]]
        for plan, _ in results
    ]
    if len(rows) > 1:
        console.result_table("all stages", ["stage", "peak", "moment", "fits"], rows)
    left = hardware.memory - usable
    if left:
        console.say(
            f"Of {gib(hardware.memory)} GiB {gib(left)} are left to CUDA, NCCL and fragmentation. Every "
            f"sequence counts "
            "as long as max_length allows."
        )


def as_dict(results, hardware, usable):
    """The same, for machines; sizes in bytes."""
    stages = []
    for plan, advice in results:
        models = [
            {
                "role": m.role,
                "start": m.start,
                "parameters": m.count.all,
                "trained": m.count.trained if m.trained else 0,
                **m.states._asdict(),
                **plan.use[m.role],
            }
            for m in plan.models
        ]
        stages.append(
            {
                "stage": plan.name,
                "kind": plan.kind,
                "models": models,
                "host": plan.host,
                "moments": [{"moment": m.name, "total": m.total, **m.parts} for m in plan.phases],
                "sent": [{**s._asdict(), "of_each": s.wire(hardware.gpus)} for s in plan.sent],
                "link_seconds": link_seconds(plan, hardware) if hardware.device == "cuda" else None,
                "peak": plan.worst.total,
                "fits": plan.worst.total <= usable,
                "options": []
                if advice is None
                else [
                    {
                        "setting": o.choice.words(plan.name),
                        "costs": o.choice.cost,
                        "alone": o.alone,
                        "together": o.together,
                        "fits": o.fits,
                    }
                    for o in advice.tried
                ],
                "type": [] if advice is None else [choice.words(plan.name) for choice in advice.enough],
            }
        )
    return {
        "device": hardware.device,
        "gpus": hardware.gpus,
        "memory": hardware.memory,
        "usable": usable,
        "stages": stages,
    }
