"""Whether a run may go on from a checkpoint: the same settings, but for those that change no result.

Standard library only.
"""

from ...errors import UserError

FREE = (
    "stage",
    "output",
    "overwrite",
    "resume",
    "log",
    "checkpoint",
    "engine.threads",
    "engine.timeout",
    "engine.max_skips",
    "save_interval",
    "train.save_interval",
    "gradient_checkpointing",
    "train.gradient_checkpointing",
    "train.micro_tokens",
    "ppo.micro_tokens",
    "ppo.micro_batch_size",
    "sampling.memory",
    "sampling.server",
    "sampling.server_weights",
)
"""Settings that may differ: what is shown and kept, and how a step is cut into passes (which moves last bits only)."""


def flat(values, prefix=""):
    """Nested settings -> {dotted key: value}; entries of lists are numbered."""
    out = {}
    for key, value in values.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value)) or None
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def differences(before, now, world_before, world_now, inputs=()):
    """-> ["train.epochs: 2 then, 3 now", …] of settings that a run must not change on its way.

    before, now: settings as nested dicts · inputs: keys whose files are compared by content elsewhere. With
    another number of processes the portion of each may change, if the batch of all stays as it was.
    """
    before, now = flat(before), flat(now)
    skip = [*FREE, *inputs]
    if world_before != world_now:
        sizes = [_batch(before, world_before), _batch(now, world_now)]
        if sizes[0] != sizes[1]:
            return [
                f"batch of all processes: {sizes[0]} then, {sizes[1]} now (a process's portion times "
                f"{world_before} and "
                f"{world_now} processes)"
            ]
        skip += ["train.batch_size", "train.accumulation", "ppo.batch_size"]
    return [
        f"{key}: {_shown(before, key)} then, {_shown(now, key)} now"
        for key in sorted({*before, *now})
        if not any(key == name or key.startswith(f"{name}.") for name in skip)
        and before.get(key) != now.get(key)
    ]


def _batch(values, world):
    own = values.get(
        "ppo.batch_size", values.get("train.batch_size", 1) * values.get("train.accumulation", 1)
    )
    return own * world


def _shown(values, key):
    return values.get(key, "not set")


def refusal(where, found):
    """-> the sentence on differences, of which there is one at least."""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"resume: {where} belongs to other settings: {'; '.join(found[:3])}{more}; expected the same, "
        "another output, or a new start (overwrite=true without resume; in a run of stages resume=never)"
    )


def refuse(where, found):
    """UserError when there are differences."""
    if found:
        raise UserError(refusal(where, found))
