"""Whether a run may resume from a checkpoint: the same settings, except those that change no result.

Standard library only.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
"""Settings that may differ: logging, saving, and how a step is cut into passes (only last bits move)."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested settings into {dotted key: value}; entries of lists are numbered.

    Args:
        values: Nested dicts and lists.
        prefix: Put in front of every key.
    """
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value)) or None
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    world_before: int,
    world_now: int,
    inputs: Iterable[str] = (),
) -> list[str]:
    """Lists the settings that have changed and must not change within a run.

    With another number of processes each process's share of the batch may change, if the batch of all
    processes stays the same.

    Args:
        before: Settings when the run began, as nested dicts.
        now: Settings now, likewise.
        world_before: Number of processes when the run began.
        world_now: Number of processes now.
        inputs: Keys of the inputs, whose files the caller compares by content.

    Returns:
        Lines such as "train.epochs: 2 then, 3 now"; none where the run may resume.
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


def _batch(values: Mapping[str, Any], world: int) -> int:
    """Examples of an optimiser step over all processes."""
    per_process = values.get(
        "ppo.batch_size", values.get("train.batch_size", 1) * values.get("train.accumulation", 1)
    )
    return per_process * world


def _shown(values: Mapping[str, Any], key: str) -> Any:
    return values.get(key, "not set")


def incompatibility_message(where: object, changes: Sequence[str]) -> str:
    """Returns the message of a refusal to resume.

    Args:
        where: Folder of the run or the checkpoint.
        changes: What `differences` listed; at least one.
    """
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return (
        f"resume: {where} belongs to other settings: {'; '.join(changes[:3])}{more}; expected the same, "
        "another output, or a new start (overwrite=true without resume; in a run of stages resume=never)"
    )


def require_compatible(where: object, changes: Sequence[str]) -> None:
    """Raises UserError when there are changes.

    Args:
        where: Folder of the run or the checkpoint.
        changes: What `differences` listed.
    """
    if changes:
        raise UserError(incompatibility_message(where, changes))
