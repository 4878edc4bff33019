"""Where a rank's main thread is, and whether it waits for other ranks: read from its stack."""

import linecache
import re
import sys
import threading
from collections.abc import Collection
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

PACKAGE = Path(__file__).resolve().parents[1]


class StackSampler:
    """Looks at the stack of one thread from time to time.

    Attributes:
        position: Where the thread is, in words.
        seconds: For how long it has not moved.
        waits: Whether it is in a collective.
        collectives: How many collectives this process has called.
    """

    def __init__(self, thread: int, hidden_files: Collection[str]) -> None:
        """Samples nothing yet.

        Args:
            thread: The thread's number (threading.get_ident).
            hidden_files: Files whose frames do not count at the top of the stack.
        """
        self.thread, self.hidden_files = thread, {__file__, *hidden_files}
        self.position, self.seconds, self.waits, self.collectives = "", 0.0, False, 0
        self._signature: tuple[int, list[tuple[int, int]]] | None = None

    def sample(self, passed: float) -> None:
        """Looks at the stack; the same collective, frames and instructions as before mean no progress.

        Args:
            passed: Seconds since the last call.
        """
        frames = sys._current_frames()
        stack: list[FrameType] = []
        frame = frames.get(self.thread)
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
        while stack and stack[0].f_code.co_filename in self.hidden_files:
            stack.pop(0)
        signature = (collective_count(), [(id(frame), frame.f_lasti) for frame in stack])
        self.seconds = self.seconds + passed if signature == self._signature else 0.0
        self._signature, self.collectives = signature, signature[0]
        self.position = position(stack)
        self.waits = bool(stack) and (
            in_collective(stack[0])
            or (
                "torch/autograd" in stack[0].f_code.co_filename  # hooks run in a thread of autograd's
                and any(
                    in_collective(f)
                    for thread, f in frames.items()
                    if thread not in (self.thread, threading.get_ident())
                )
            )
        )


def collective_count() -> int:
    """Collectives that this process has called, in all groups: a rank that is behind has called fewer."""
    try:
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups)
    except (AttributeError, RuntimeError):
        return 0


def in_collective(frame: FrameType) -> bool:
    """Whether a frame is in a collective, waiting for other ranks."""
    name = frame.f_code.co_filename
    if "/torch/distributed/" in name or "/deepspeed/comm/" in name:
        return True
    return (
        "/deepspeed/" in name
        and re.search(r"\b(wait|synchronize)\(", linecache.getline(name, frame.f_lineno)) is not None
    )


def position(stack: list[FrameType]) -> str:
    """Names the innermost line of this package and the innermost of all.

    Args:
        stack: Frames, the innermost first.

    Returns:
        For example "saferlhf_fast/rollout/batch.py:31 generate, in torch/x.py:7 f"; "its end" without frames.
    """
    if not stack:
        return "its end"
    own = next((frame for frame in stack if frame.f_code.co_filename.startswith(str(PACKAGE))), stack[0])

    def shown(path: Path) -> str:
        return str(
            path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else "/".join(path.parts[-2:])
        )

    places = [f"{shown(Path(f.f_code.co_filename))}:{f.f_lineno} {f.f_code.co_name}" for f in (own, stack[0])]
    return ", in ".join(dict.fromkeys(places))


def blames_another_rank(error: BaseException) -> bool:
    """Whether an error only says that another rank has gone or did not come."""
    if isinstance(error, dist.DistError):
        return True
    trace, name = error.__traceback__, ""
    while trace is not None:
        name, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    if "/torch/distributed/" in name or "/deepspeed/comm/" in name:
        return True
    return (
        isinstance(error, RuntimeError)
        and re.search(r"gloo|NCCL|closed by peer|Timed out waiting", str(error)) is not None
    )
